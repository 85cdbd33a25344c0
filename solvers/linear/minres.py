r"""MINRES (Paige and Saunders, 1975), preconditioned and batched over tasks.

Minimises $\|b - A v\|$ over the Krylov space, for symmetric $A$, definite or not (with a
preconditioner $M$, the norm is that of $M$). The Lanczos process builds a basis in which $A$ is
tridiagonal; Givens rotations, one a step, reduce that to a triangle, column by column. In the
notation of Elman, Silvester and Wathen (2014, Algorithm 4.1); the residual itself follows from
$r_k = s_k^2\, r_{k-1} + \eta_k c_k\, \hat v_{k+1}$.

For eigenvalues in $[-b, -a] \cup [c, d]$ with $b - a = d - c$, $2k$ steps reduce the residual to
$2\left(\frac{\sqrt{bd}-\sqrt{ac}}{\sqrt{bd}+\sqrt{ac}}\right)^k$ of the first one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.linear_solver import LinearSolution, LinearSolver
from bilevel.operator import MatVec, Operator
from bilevel.preconditioner import Preconditioner
from bilevel.problem import Structure
from bilevel.registry import LINEAR_SOLVERS
from bilevel.rows import Choice, all_finite, choose, column, dot, norm

from .cycles import Progress, check_settings, prepare, solve_in_cycles
from .lanczos import Lanczos

__all__ = ["MINRES"]


@LINEAR_SOLVERS.register("minres")
@dataclass(frozen=True)
class MINRES(LinearSolver):
    """Minimal residuals for symmetric systems, definite or not.

    An indefinite matrix is solved and not called INDEFINITE: look at ``curvature_min``, which is
    negative where a Lanczos vector met negative curvature.

    Args:
        max_steps: The most products with the matrix spent on iterating.
        rtol: Tolerance in ‖b − A v‖ / ‖b‖ of each task; 0 asks for ``max_steps`` steps only, and
            the residual reported is then that of the recurrence.
        preconditioner: A cheap stand-in for the inverse, positive definite; None: the identity.

    Raises:
        ValueError: A setting is out of range.
    """

    needs: ClassVar[Structure] = Structure.SYMMETRIC
    max_steps: int = 100
    rtol: float = 1e-5
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_settings(self.max_steps, self.rtol, self.preconditioner)

    def _solve(self, operator: Operator, rhs: Tensor, start: Tensor | None) -> LinearSolution:
        precondition = prepare(self.preconditioner, operator, rhs)
        found = minres(operator, rhs, start, precondition, self.max_steps, self.rtol)
        return found if self.preconditioner is None else replace(found, tridiagonal=None)


def minres(
    operator: Operator,
    rhs: Tensor,
    start: Tensor | None,
    precondition: MatVec,
    max_steps: int,
    rtol: float,
) -> LinearSolution:
    """Solve by MINRES with a preconditioner that is prepared already."""
    lanczos = Lanczos(rhs)

    def cycle(progress: Progress) -> None:
        _cycle(operator, precondition, progress, lanczos)
        lanczos.close()

    found = solve_in_cycles(cycle, operator, rhs, start, max_steps=max_steps, rtol=rtol)
    return replace(found, tridiagonal=lanczos.table)


def _cycle(operator: Operator, precondition: MatVec, progress: Progress, lanczos: Lanczos) -> None:
    """Iterate from the residual until no task is active."""
    v, z, size = _normalise(precondition, progress.r, progress.active)
    eta = size
    c = c_before = torch.ones_like(size)
    s = s_before = coupling = torch.zeros_like(size)
    v_before = w = w_before = torch.zeros_like(v)
    for _ in progress.rounds():
        az = operator(z)
        diagonal = dot(z, az)
        progress.observe(diagonal / dot(z, z))
        met = progress.demand_finite(diagonal)
        v_next = az - column(diagonal, v) * v - column(coupling, v) * v_before
        v_next, z_next, size = _normalise(precondition, v_next, met)
        lanczos.add(met, diagonal, size)
        # The two last rotations act on the new column of the tridiagonal matrix; a third one clears
        # the entry below its diagonal.
        top = s_before * coupling
        middle = s * diagonal + c_before * c * coupling
        pivot = c * diagonal - c_before * s * coupling
        corner = (pivot**2 + size**2).sqrt()
        good = met & (corner > 0) & size.isfinite()
        c_next, s_next = pivot / corner, size / corner
        w_next = (z - column(top, w) * w_before - column(middle, w) * w) / column(corner, w)
        x = progress.x + column(c_next * eta, w) * w_next
        eta = -s_next * eta
        r = column(s_next**2, v) * progress.r + column(eta * c_next, v) * v_next
        progress.step(Choice(good & all_finite(x)), x, r)
        v_before, v, z = v, v_next, z_next
        w_before, w = w, w_next
        c_before, c, s_before, s, coupling = c, c_next, s, s_next, size


def _normalise(precondition: MatVec, v: Tensor, tasks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return v and z = M v, both divided by their size √(vᵀz), and that size.

    Where there is nothing to divide, and for all but those tasks, v and z are zero.
    """
    length = norm(v)
    # By length first, so that the product stays within the range of the dtype.
    u = choose(tasks & (length > 0), v / column(length, v), torch.zeros_like(v))
    z = precondition(u)
    # Rounding may leave a zero of either sign.
    root = dot(u, z).clamp_min(0.0).sqrt()
    some = root > 0
    u, z = choose(some, u / column(root, u), u), choose(some, z / column(root, z), z)
    return u, z, torch.where(tasks, length * root, 0.0)
