r"""Richardson iteration (Richardson, 1911), preconditioned and batched over tasks.

$$v \leftarrow v + a\, M (b - A v)$$

It converges iff the spectral radius of $I - a M A$ is below 1. For symmetric $A$ with eigenvalues
in $[\mu, L]$ and no preconditioner that is $0 < a < 2/L$, and the error falls by the factor
$1 - a\mu$ a step for $a \le 1/L$.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.linear_solver import LinearSolution, LinearSolver
from bilevel.operator import MatVec, Operator
from bilevel.preconditioner import Preconditioner
from bilevel.problem import Structure
from bilevel.registry import LINEAR_SOLVERS
from bilevel.rows import Choice, column, dot

from .cycles import Progress, check_settings, prepare, solve_in_cycles
from .power import safe_step

__all__ = ["Richardson"]

_BLOW_UP = 1e4


@LINEAR_SOLVERS.register("richardson")
@dataclass(frozen=True)
class Richardson(LinearSolver):
    """Richardson iteration, the simplest fixed point; `Neumann` with a preconditioner.

    A task is DIVERGED if its residual grew, or, without a preconditioner, if a Rayleigh quotient
    proves the step larger than 2/L.

    Args:
        max_steps: The most products with the matrix spent on iterating.
        rtol: Tolerance in ‖b − A v‖ / ‖b‖ of each task; 0 asks for ``max_steps`` steps only.
        preconditioner: A cheap stand-in for the inverse; None: the identity.
        step: The step a. None: 1 with a preconditioner, else found for each task as 1 / (1.1 · L),
            L estimated by 12 steps of power iteration.

    Raises:
        ValueError: A setting is out of range.
    """

    needs: ClassVar[Structure] = Structure.GENERAL
    max_steps: int = 100
    rtol: float = 1e-5
    preconditioner: Preconditioner | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        check_settings(self.max_steps, self.rtol, self.preconditioner)
        if self.step is not None and not (self.step > 0 and math.isfinite(self.step)):
            raise ValueError(f"`step` is {self.step}; it lies between 0 and 2/L, or is None")

    def _solve(self, operator: Operator, rhs: Tensor, start: Tensor | None) -> LinearSolution:
        precondition, step = None, self.step
        if self.preconditioner is not None:
            precondition = prepare(self.preconditioner, operator, rhs)
            step = 1.0 if step is None else step
        return richardson(
            operator, rhs, start, step, self.max_steps, self.rtol, precondition=precondition
        )


def richardson(
    operator: Operator,
    rhs: Tensor,
    start: Tensor | None,
    step: float | None,
    max_steps: int,
    rtol: float,
    *,
    precondition: MatVec | None = None,
) -> LinearSolution:
    """Solve by Richardson iteration; a step of None is found by power iteration."""
    if step is None:
        size = safe_step(operator, rhs)
    else:
        size = torch.full((len(rhs),), step, dtype=torch.float64, device=rhs.device)

    def cycle(progress: Progress) -> None:
        _cycle(operator, precondition, size, progress)

    return solve_in_cycles(cycle, operator, rhs, start, max_steps=max_steps, rtol=rtol)


def _cycle(
    operator: Operator, precondition: MatVec | None, size: Tensor, progress: Progress
) -> None:
    """Iterate from the residual until no task is active."""
    entered, first = progress.active, progress.rr
    for _ in progress.rounds():
        z = progress.r if precondition is None else precondition(progress.r)
        az = operator(z)
        curvature = dot(z, az)
        progress.observe(curvature / dot(z, z))
        good = progress.demand_finite(curvature)
        a = column(size, z)
        progress.step(Choice(good), progress.x + a * z, progress.r - a * az)
        # A task that blows up is frozen before it overflows.
        progress.active = progress.active & (progress.rr < _BLOW_UP**2 * first)
    grew = progress.rr > first
    low, high = progress.curvature
    if precondition is None:
        grew = grew | (size * high > 2.0)
    progress.diverged = progress.diverged | (entered & grew)
    progress.indefinite = progress.indefinite | (entered & (low <= 0))
