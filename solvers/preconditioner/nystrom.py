r"""The randomised Nyström preconditioner (Frangella, Tropp and Udell, 2023).

With $U \Lambda U^\top$ the randomised Nyström approximation of rank $l$ and $\lambda_l$ its
smallest eigenvalue,

$$M = (\lambda_l + \mu)\, U (\Lambda + \mu I)^{-1} U^\top + (I - U U^\top)$$

brings the large eigenvalues of $A + \mu I$ down to about $\lambda_l + \mu$ and leaves the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.operator import MatVec, Operator
from bilevel.preconditioner import Preconditioner
from bilevel.registry import PRECONDITIONERS

from ..linear.low_rank import nystrom

__all__ = ["NystromPreconditioner"]


@PRECONDITIONERS.register("nystrom")
@dataclass(frozen=True)
class NystromPreconditioner(Preconditioner):
    """Flatten the largest eigenvalues, for a few of them above a flat tail.

    Args:
        rank: Number of probes l, one product each; somewhat more than there are large eigenvalues.
        damping: What the matrix adds to its low-rank part, μ ≥ 0: a proximal strength, say. None:
            the smallest eigenvalue kept.

    Raises:
        ValueError: A setting is out of range.
    """

    rank: int = 20
    damping: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"`rank` is {self.rank}; take at least one probe")
        if self.damping is not None and not (self.damping >= 0 and math.isfinite(self.damping)):
            raise ValueError(f"`damping` is {self.damping}; it is finite and ≥ 0, or None")

    def prepare(self, operator: Operator, like: Tensor) -> MatVec:
        """Approximate A from ``rank`` products."""
        n = like.shape[1]
        generator = torch.Generator().manual_seed(0)
        gaussian = torch.randn(n, min(self.rank, n), generator=generator, dtype=torch.float64)
        found = nystrom(operator, torch.linalg.qr(gaussian)[0].to(like.device), like)
        smallest, largest = found.values[:, -1:], found.values[:, :1]
        damping = smallest if self.damping is None else torch.full_like(smallest, self.damping)
        # A matrix of lower rank than asked for has λ = 0 at the end: stay away from 0 / 0.
        damping = torch.maximum(damping, torch.finfo(like.dtype).eps * largest)
        damping = torch.where(damping > 0, damping, 1.0)
        # M = I + U (weights) Uᵀ.
        weights = ((smallest + damping) / (found.values + damping) - 1).to(like.dtype)
        basis = found.basis.to(like.dtype)

        def product(v: Tensor) -> Tensor:
            inside = (basis.mT @ v.unsqueeze(-1)) * weights.unsqueeze(-1)
            return v + (basis @ inside).squeeze(-1)

        return product
