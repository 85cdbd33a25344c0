"""The hypergradient against which `doctor` holds others: implicit, solved to rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .flat import FlatProblem
from .linear_solver import LinearSolution, LinearSolver, relative_residual
from .method import ImplicitMethod
from .operator import Operator
from .rows import column, dot
from .status import Status, marked, residual_status

__all__ = ["PlainCG", "Yardstick"]


@dataclass(frozen=True)
class PlainCG(LinearSolver):
    """Conjugate gradients, on the normal equations where the matrix is not symmetric."""

    rtol: float = 1e-10
    max_steps: int = 1000

    def _solve(self, operator: Operator, rhs: Tensor, start: Tensor | None) -> LinearSolution:
        plain = operator.is_symmetric
        r = rhs.double() if plain else operator.T(rhs).double()
        v, p, rr = torch.zeros_like(r), r, dot(r, r)
        goal = self.rtol**2 * rr
        steps = torch.zeros(len(rhs), dtype=torch.int64, device=rhs.device)
        low = torch.full_like(rr, float("inf"))
        active = rr > 0
        for _ in range(self.max_steps):
            ap = operator(p.to(rhs.dtype))
            ap = ap.double() if plain else operator.T(ap).double()
            pap, pp = dot(p, ap), dot(p, p)
            low = torch.where(active, torch.minimum(low, pap / pp), low)
            active = active & (pap > 0) & rr.isfinite()
            if not bool(active.any()):
                break
            alpha = column(torch.where(active, rr / pap, 0.0), r)
            v, r = v + alpha * p, r - alpha * ap
            new = dot(r, r)
            p = r + column(torch.where(active, new / rr, 0.0), r) * p
            rr = torch.where(active, new, rr)
            steps = steps + active
            active = active & (rr > goal)
        value = v.to(rhs.dtype)
        residual = relative_residual(operator, rhs, value)
        limit = max(self.rtol, 100 * torch.finfo(rhs.dtype).eps)
        status = residual_status(residual, limit, asked=True)
        status = marked(status, low <= 0, Status.INDEFINITE)
        nan = torch.full_like(rr, float("nan"))
        return LinearSolution(value, status, residual, steps, nan, nan)


@dataclass(frozen=True)
class Yardstick(ImplicitMethod):
    """Implicit differentiation with `PlainCG`, for a problem of any structure."""

    def check(self, flat: FlatProblem) -> None:
        """Every problem will do."""

    def _linear_solver(self) -> PlainCG:
        return PlainCG()
