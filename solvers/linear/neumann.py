r"""The truncated Neumann series, batched over tasks (Lorraine, Vicol and Duvenaud, 2020, eq. 3).

$$v = a \sum_{j=0}^{K-1} (I - aA)^j b$$

It converges for symmetric $A$ with eigenvalues in $[\mu, L]$, $\mu > 0$, iff $0 < a < 2/L$; for
$a \le 1/L$ the relative residual is at most $(1 - a\mu)^K$. Summed as Richardson iteration,
$v \leftarrow v + a r,\ r \leftarrow r - aAr$, so that the true residual comes at no cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.linear_solver import LinearSolution, LinearSolver
from bilevel.operator import MatVec, Operator
from bilevel.registry import LINEAR_SOLVERS
from bilevel.rows import check_interval, column, dot, norm
from bilevel.status import Status, residual_status

__all__ = ["Neumann"]

_POWER_STEPS = 12
_SAFETY = 1.1
_BLOW_UP = 1e4


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
        scale = self._scale(operator, rhs)
        x = torch.zeros_like(rhs) if start is None else start
        r = rhs if start is None else rhs - operator(x)
        first = norm(r)
        low = torch.full_like(first, float("nan"))
        high = low
        # Below rounding the residual is noise; go no further, whatever was asked.
        floor = max(self.rtol, torch.finfo(rhs.dtype).eps)
        active = first > floor
        steps = torch.zeros(len(rhs), dtype=torch.int64, device=rhs.device)
        interval = check_interval(rhs.device)
        for k in range(self.terms):
            if k % interval == 0 and not bool(active.any()):
                break
            ar = operator(r)
            quotient = torch.where(active, dot(r, ar) / dot(r, r), float("nan"))
            low, high = torch.fmin(low, quotient), torch.fmax(high, quotient)
            keep = active.unsqueeze(-1)
            a = column(scale, r)
            x = torch.where(keep, x + a * r, x)
            r = torch.where(keep, r - a * ar, r)
            steps = steps + active
            size = norm(r)
            # A task that blows up is frozen before it overflows.
            active = active & (size > floor) & (size < _BLOW_UP * first)
        residual = norm(r)
        status = residual_status(
            residual, torch.full_like(residual, self.rtol or floor), asked=self.rtol > 0
        )
        beyond = (scale * high > 2.0) | (residual > first)
        diverged = beyond & (status != Status.CONVERGED) & (status != Status.NON_FINITE)
        status = torch.where(diverged, int(Status.DIVERGED), status)
        indefinite = (low <= 0) & (status != Status.NON_FINITE) & (first > 0)
        status = torch.where(indefinite & ~diverged, int(Status.INDEFINITE), status)
        return LinearSolution(x, status.to(torch.int8), residual, steps, low, high)

    def _scale(self, matvec: MatVec, rhs: Tensor) -> Tensor:
        if self.scale is not None:
            return torch.full((len(rhs),), self.scale, dtype=torch.float64, device=rhs.device)
        # Fixed pseudo-random signs: the same bits at every call, and no eigenvector is likely to be
        # orthogonal to them.
        index = torch.arange(rhs.shape[1], device=rhs.device, dtype=torch.float64)
        u = torch.sin(index * 12.9898 + 0.5).to(rhs.dtype).expand_as(rhs)
        largest = torch.zeros(len(rhs), dtype=torch.float64, device=rhs.device)
        for _ in range(_POWER_STEPS):
            u = u / column(norm(u).clamp_min(torch.finfo(rhs.dtype).tiny), u)
            u = matvec(u)
            largest = torch.fmax(largest, norm(u))
        return torch.where(largest > 0, 1.0 / (_SAFETY * largest), 1.0)
