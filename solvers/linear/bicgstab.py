r"""BiCGStab (van der Vorst, 1992), right-preconditioned and batched over tasks.

Biconjugate gradients without the transposed matrix, each step smoothed by one step of minimal
residuals, for general $A$: two products and a fixed number of vectors a step. The residual is not
monotone, so that the best iterate is kept. Where a scalar vanishes that the next step divides by (a
breakdown), the task begins anew from its best iterate, for as long as that helps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.linear_solver import LinearSolution, LinearSolver
from bilevel.operator import MatVec, Operator
from bilevel.preconditioner import Preconditioner
from bilevel.problem import Structure
from bilevel.registry import LINEAR_SOLVERS
from bilevel.rows import Choice, choose, column, dot, norm

from .cycles import Progress, check_settings, prepare, solve_in_cycles

__all__ = ["BiCGStab"]


@LINEAR_SOLVERS.register("bicgstab")
@dataclass(frozen=True)
class BiCGStab(LinearSolver):
    """Stabilised biconjugate gradients, for systems without symmetry.

    Args:
        max_steps: The most steps, of two products each.
        rtol: Tolerance in ‖b − A v‖ / ‖b‖ of each task; 0 asks for ``max_steps`` steps only, and
            the residual reported is then that of the recurrence.
        preconditioner: A cheap stand-in for the inverse; None: the identity.

    Raises:
        ValueError: A setting is out of range.
    """

    needs: ClassVar[Structure] = Structure.GENERAL
    max_steps: int = 100
    rtol: float = 1e-5
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_settings(self.max_steps, self.rtol, self.preconditioner)

    def _solve(self, operator: Operator, rhs: Tensor, start: Tensor | None) -> LinearSolution:
        precondition = prepare(self.preconditioner, operator, rhs)

        def cycle(progress: Progress) -> None:
            _cycle(operator, precondition, progress)

        return solve_in_cycles(
            cycle, operator, rhs, start, max_steps=self.max_steps, rtol=self.rtol
        )


def _cycle(operator: Operator, precondition: MatVec, progress: Progress) -> None:
    """Iterate from the residual until no task is active."""
    eps = torch.finfo(progress.r.dtype).eps
    shadow = p = progress.r
    length, rho = progress.rr.sqrt(), progress.rr
    best_x, best_r, best = progress.x, progress.r, progress.rr
    for _ in progress.rounds():
        p_hat = precondition(p)
        v = operator(p_hat)
        across, size = dot(shadow, v), norm(v)
        met = progress.demand_finite(size)
        sound = met & (across.abs() > eps * length * size)
        alpha = torch.where(sound, rho / across, 0.0)
        s = progress.r - column(alpha, v) * v
        s_hat = precondition(s)
        t = operator(s_hat)
        # Not ⟨t, t⟩, which may leave the range of the dtype.
        size = norm(t)
        omega = torch.where(size > 0, dot(t, s) / size / size, 0.0)
        good = sound & progress.demand_finite(size)
        x = progress.x + column(alpha, v) * p_hat + column(omega, v) * s_hat
        progress.step(Choice(good), x, s - column(omega, v) * t)
        better = good & (progress.rr < best)
        best = torch.where(better, progress.rr, best)
        best_x, best_r = choose(better, progress.x, best_x), choose(better, progress.r, best_r)
        new = dot(shadow, progress.r)
        beta = new / rho * (alpha / omega)
        r = progress.r
        broken_down = (new.abs() <= eps * length * progress.rr.sqrt()) | ~beta.isfinite()
        progress.active = progress.active & ~broken_down
        p = choose(progress.active, r + column(beta, p) * (p - column(omega, p) * v), p)
        rho = new
    progress.x, progress.r, progress.rr = best_x, best_r, best
