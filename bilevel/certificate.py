r"""A certified bound on the error of an implicit hypergradient.

Let G be strongly convex in z with constant $\mu$, $\varepsilon = \|\partial_z G\| / \mu$ at the
returned point and $r = \|\partial_z f - H v\|$ at the returned adjoint. Then
$\|z - z^\star\| \le \varepsilon$, and

$$\|u - u^\star\| \le L_{xf}\,\varepsilon + L_C\,\varepsilon\|v\|
  + \frac{\|C\|}{\mu}\bigl(\rho_H\,\varepsilon\|v\| + L_f\,\varepsilon + r\bigr),
  \qquad C = \partial_x \partial_z G.$$

It follows from $H^\star (v - v^\star) = (H^\star - H) v + (H v - \partial_z f)
+ (\partial_z f - \partial_z f^\star)$; compare Theorem 2.1 of Salehi, Mukherjee, Roberts and
Ehrhardt (2024, arXiv:2308.10098), whose bound is looser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .rows import norm

if TYPE_CHECKING:
    from .point import Point

__all__ = ["Smoothness", "certified_bound"]


@dataclass(frozen=True)
class Smoothness:
    """Constants of one task at one outer point, in Euclidean (spectral) norms.

    They must hold along the segment from the returned inner point to the solution; a bound that
    uses smaller constants than the true ones certifies nothing. Units: those of the problem.

    Args:
        cross_norm: ‖∂_x ∂_z G‖, its largest value.
        outer_gradient: Lipschitz constant in z of ∂_z f.
        hessian: Lipschitz constant in z of ∂²_zz G; 0 for a quadratic.
        cross: Lipschitz constant in z of ∂_x ∂_z G.
        direct: Lipschitz constant in z of ∂_x f.
        strong_convexity: μ of the whole inner objective, > 0. None: the smallest proximal strength,
            which is right where g itself is convex in z.

    Raises:
        ValueError: A constant is negative or not finite.
    """

    cross_norm: float
    outer_gradient: float
    hessian: float = 0.0
    cross: float = 0.0
    direct: float = 0.0
    strong_convexity: float | None = None

    def __post_init__(self) -> None:
        for name in ("cross_norm", "outer_gradient", "hessian", "cross", "direct"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"`{name}` is {value}; a Lipschitz constant is finite and ≥ 0")
        mu = self.strong_convexity
        if mu is not None and not 0.0 < mu < float("inf"):
            raise ValueError(f"`strong_convexity` is {mu}; it is finite and > 0, or None")


def certified_bound(point: Point) -> Tensor:
    """The bound, relative to ‖u‖, for each task ``[tasks]``, float64.

    Raises:
        ObjectiveError: The problem declares no constants.
        ValueError: Nothing is known of its strong convexity.
    """
    flat = point.system.flat
    residual = point.residual
    adjoint = norm(point.adjoint.value)
    linear = norm(point.system.rhs - point.system.pull(point.adjoint.value))
    bounds = []
    for i, task in enumerate(flat.tasks.unstack()):
        constants = flat.problem.smoothness(flat.outer_of(i), task)
        mu = constants.strong_convexity
        if mu is None:
            mu = flat.smallest_strength(i)
        if not mu > 0.0:
            raise ValueError(
                "`smoothness` declares no `strong_convexity` and the proximal strength is not > 0 "
                "everywhere; declare the constant, or add a regularizer"
            )
        error = residual[i].item() / mu
        v, r = adjoint[i].item(), linear[i].item()
        moved = constants.hessian * error * v + constants.outer_gradient * error + r
        bounds.append(
            (constants.direct + constants.cross * v) * error + constants.cross_norm / mu * moved
        )
    size = point.norm
    absolute = torch.tensor(bounds, dtype=torch.float64, device=size.device)
    return torch.where(absolute > 0, absolute / size, 0.0)
