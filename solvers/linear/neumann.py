r"""The truncated Neumann series, batched over tasks (Lorraine, Vicol and Duvenaud, 2020, eq. 3).

$$v = a \sum_{j=0}^{K-1} (I - aA)^j b$$

It converges for symmetric $A$ with eigenvalues in $[\mu, L]$, $\mu > 0$, iff $0 < a < 2/L$; for
$a \le 1/L$ the relative residual is at most $(1 - a\mu)^K$. Summed as Richardson iteration,
$v \leftarrow v + a r,\ r \leftarrow r - aAr$, so that the true residual comes at no cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from bilevel.linear_solver import LinearSolution, LinearSolver
from bilevel.operator import Operator
from bilevel.registry import LINEAR_SOLVERS

from .richardson import richardson

__all__ = ["Neumann"]


@LINEAR_SOLVERS.register("neumann")
@dataclass(frozen=True)
class Neumann(LinearSolver):
    """Truncated Neumann series.

    Args:
        terms: Number of terms K, which is also the number of products.
        scale: The scale a. None: found for each task as 1 / (1.1 · L), L estimated by 12 steps of
            power iteration.
        rtol: Tolerance in ‖b − A v‖ / ‖b‖; a task stops early within it. 0 asks for ``terms``
            terms only.

    A task is DIVERGED if its residual grew, or if a Rayleigh quotient proves ``scale`` > 2/L.

    Raises:
        ValueError: A setting is out of range.
    """

    terms: int = 100
    scale: float | None = None
    rtol: float = 0.0

    def __post_init__(self) -> None:
        if self.terms < 1:
            raise ValueError(f"`terms` is {self.terms}; sum at least one term")
        if self.scale is not None and not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f"`scale` is {self.scale}; it lies between 0 and 2/L, or is None")
        if not 0.0 <= self.rtol < 1.0:
            raise ValueError(f"`rtol` is {self.rtol}; pass a tolerance in [0, 1), 0 for the budget")

    def _solve(self, operator: Operator, rhs: Tensor, start: Tensor | None) -> LinearSolution:
        return richardson(operator, rhs, start, self.scale, self.terms, self.rtol)
