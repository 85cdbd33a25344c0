r"""Conjugate gradients (Hestenes and Stiefel, 1952), batched over tasks.

Solves $A v = b$ for symmetric positive definite $A$. After $k$ steps the error in the energy norm
is at most $2\left(\frac{\sqrt\kappa-1}{\sqrt\kappa+1}\right)^k$ times the first one.

Departures from the textbook: every task has its own scalars and stops on its own; curvature
$p^\top A p \le 0$ stops a task at its last good iterate, as INDEFINITE; a claim of convergence is
checked against the true residual, and iteration restarts from there where it does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.linear_solver import LinearSolution, LinearSolver
from bilevel.operator import MatVec, Operator
from bilevel.problem import Structure
from bilevel.registry import LINEAR_SOLVERS
from bilevel.rows import check_interval, column, dot
from bilevel.status import Status, residual_status

__all__ = ["CG"]


@LINEAR_SOLVERS.register("cg")
@dataclass(frozen=True)
class CG(LinearSolver):
    """Conjugate gradients for symmetric positive definite systems.

    Args:
        max_steps: The most products with the matrix spent on iterating.
        rtol: Tolerance in ‖b − A v‖ / ‖b‖ of each task; 0 asks for ``max_steps`` steps only, and
            the residual reported is then that of the recurrence.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[[2.0, 0.0], [0.0, 4.0]]])
        >>> solution = CG(max_steps=2)(lambda v: (matrix @ v[..., None])[..., 0], torch.ones(1, 2))
        >>> solution.value
        tensor([[0.5000, 0.2500]])
    """

    needs: ClassVar[Structure] = Structure.SYMMETRIC
    max_steps: int = 100
    rtol: float = 1e-5

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"`max_steps` is {self.max_steps}; take at least one step")
        if not 0.0 <= self.rtol < 1.0:
            raise ValueError(f"`rtol` is {self.rtol}; pass a tolerance in [0, 1), 0 for the budget")

    def _solve(self, operator: Operator, rhs: Tensor, start: Tensor | None) -> LinearSolution:
        x = torch.zeros_like(rhs) if start is None else start
        r = rhs if start is None else rhs - operator(x)
        state = _State.begin(x, r)
        nonzero = dot(rhs, rhs) > 0
        # Below rounding the recurrence is noise; go no further, whatever was asked.
        floor = max(self.rtol, torch.finfo(rhs.dtype).eps)
        active = nonzero & (dot(r, r) > floor**2)
        spent = 0
        while True:
            spent += _iterate(operator, state, active, floor, self.max_steps - spent)
            residual = dot(state.r, state.r).sqrt()
            if self.rtol == 0.0:
                break
            # The recurrence drifts from the true residual; believe only the latter.
            state.r = rhs - operator(state.x)
            true = dot(state.r, state.r).sqrt()
            wrong = ~state.stopped & nonzero & (true > self.rtol)
            # Rounding bounds the true residual from below: go on only while restarts still help.
            active = wrong & (true < 0.5 * state.last_true)
            state.last_true, residual = true, true
            if spent >= self.max_steps or not bool(active.any()):
                break
        status = residual_status(
            torch.where(nonzero, residual, 0.0),
            torch.full_like(residual, self.rtol or floor),
            asked=self.rtol > 0,
        )
        indefinite = state.indefinite & (status != Status.CONVERGED)
        status = torch.where(indefinite, int(Status.INDEFINITE), status)
        status = torch.where(state.broken, int(Status.NON_FINITE), status).to(torch.int8)
        return LinearSolution(
            state.x,
            status,
            torch.where(nonzero, residual, 0.0),
            state.steps,
            state.curvature_min,
            state.curvature_max,
        )


def _iterate(matvec: MatVec, state: _State, active: Tensor, floor: float, most: int) -> int:
    """Iterate until all tasks' residuals are below ``floor``; return the number of products."""
    p = state.r
    rr = dot(state.r, state.r)
    interval = check_interval(p.device)
    for k in range(most):
        if k % interval == 0 and not bool(active.any()):
            return k
        ap = matvec(p)
        pap, pp = dot(p, ap), dot(p, p)
        good = active & (pap > 0) & pap.isfinite()
        state.observe(active, pap, pp)
        alpha = torch.where(good, rr / pap, 0.0)
        # `where`, not a product with alpha = 0: a failed task's NaN would spread over its row.
        x = state.x + column(alpha, p) * p
        r = state.r - column(alpha, p) * ap
        keep = good.unsqueeze(-1)
        state.x, state.r = torch.where(keep, x, state.x), torch.where(keep, r, state.r)
        new = torch.where(good, dot(state.r, state.r), rr)
        beta = torch.where(good & (rr > 0), new / rr, 0.0)
        p = torch.where(keep, state.r + column(beta, p) * p, p)
        rr = new
        state.steps = state.steps + good
        active = good & (rr > floor**2)
    return most


@dataclass
class _State:
    """What iteration carries across restarts."""

    x: Tensor
    r: Tensor
    steps: Tensor
    indefinite: Tensor
    broken: Tensor
    curvature_min: Tensor
    curvature_max: Tensor
    last_true: Tensor

    @classmethod
    def begin(cls, x: Tensor, r: Tensor) -> _State:
        count, device = len(x), x.device
        flag = torch.zeros(count, dtype=torch.bool, device=device)
        infinite = torch.full((count,), float("inf"), dtype=torch.float64, device=device)
        steps = torch.zeros(count, dtype=torch.int64, device=device)
        nan = torch.full_like(infinite, float("nan"))
        return cls(x, r, steps, flag, flag, nan, nan, infinite)

    @property
    def stopped(self) -> Tensor:
        return self.indefinite | self.broken

    def observe(self, active: Tensor, pap: Tensor, pp: Tensor) -> None:
        quotient = torch.where(active & pap.isfinite(), pap / pp, float("nan"))
        self.curvature_min = torch.fmin(self.curvature_min, quotient)
        self.curvature_max = torch.fmax(self.curvature_max, quotient)
        self.indefinite = self.indefinite | (active & (pap <= 0))
        self.broken = self.broken | (active & ~pap.isfinite())
