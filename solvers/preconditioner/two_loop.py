r"""The inverse that L-BFGS builds from pairs: the two-loop recursion (Nocedal, 1980).

$$B_{i+1} = (I - \rho_i s_i y_i^\top)\, B_i\, (I - \rho_i y_i s_i^\top) + \rho_i s_i s_i^\top,
  \qquad \rho_i = \frac{1}{s_i^\top y_i},\qquad B_0 = \gamma I,\quad
  \gamma = \frac{s^\top y}{y^\top y}\ \text{of the newest pair}$$
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.operator import MatVec, SecantPairs
from bilevel.rows import column, dot

__all__ = ["inverse_from_pairs"]


def inverse_from_pairs(pairs: SecantPairs) -> MatVec:
    """Products with B, positive definite; the identity for a task without a pair."""
    s, y = pairs.s, pairs.y
    sy, yy = dot(s, y), dot(y, y)
    valid = pairs.valid & (sy > 0) & sy.isfinite() & yy.isfinite()
    rho = torch.where(valid, 1.0 / sy, 0.0)
    # Not a product with rho = 0: an empty slot may hold anything.
    s = torch.where(valid.unsqueeze(-1), s, 0.0)
    y = torch.where(valid.unsqueeze(-1), y, 0.0)
    gamma = torch.ones(s.shape[1], dtype=torch.float64, device=s.device)
    for i in range(len(s)):
        gamma = torch.where(valid[i], sy[i] / yy[i], gamma)

    def product(v: Tensor) -> Tensor:
        alphas = []
        for i in reversed(range(len(s))):
            alpha = rho[i] * dot(s[i], v)
            v = v - column(alpha, v) * y[i]
            alphas.append(alpha)
        v = column(gamma, v) * v
        for i, alpha in enumerate(reversed(alphas)):
            v = v + column(alpha - rho[i] * dot(y[i], v), v) * s[i]
        return v

    return product
