"""What iterative solvers share: steps with a mask over tasks, in cycles from the true residual.

A recurrence drifts from the true residual b − A v, so its claim of convergence is checked; where it
does not hold, a new cycle begins from there. A solver writes the cycle alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.linear_solver import LinearSolution
from bilevel.operator import MatVec, Operator
from bilevel.preconditioner import Preconditioner
from bilevel.rows import check_interval, choose, dot, norm
from bilevel.status import Status, residual_status

__all__ = ["Progress", "check_settings", "prepare", "solve_in_cycles"]


@dataclass
class Progress:
    """Where each task stands.

    Attributes:
        x: Iterate, ``[tasks, n]``.
        r: Its residual by the recurrence.
        rr: ‖r‖², float64.
        floor: Tolerance in ‖r‖.
        max_steps: The most steps of a task.
        steps: Steps taken.
        active: Tasks that iterate.
        indefinite: Tasks stopped by negative curvature.
        broken: Tasks stopped by a value that is not finite.
        diverged: Tasks stopped because their residual grew.
        curvature_min: Smallest Rayleigh quotient met; NaN if none was.
        curvature_max: Largest one.
    """

    x: Tensor
    r: Tensor
    rr: Tensor
    floor: float
    max_steps: int
    steps: Tensor
    active: Tensor
    indefinite: Tensor
    broken: Tensor
    diverged: Tensor
    curvature_min: Tensor
    curvature_max: Tensor

    @classmethod
    def begin(cls, x: Tensor, r: Tensor, floor: float, max_steps: int) -> Progress:
        """No step is taken yet; tasks within the tolerance are not active."""
        rr = dot(r, r)
        steps = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        no = steps > 0
        nan = torch.full_like(rr, float("nan"))
        return cls(x, r, rr, floor, max_steps, steps, rr > floor**2, no, no, no, nan, nan)

    @property
    def stopped(self) -> Tensor:
        """Tasks for which another cycle is of no use."""
        return self.indefinite | self.broken | self.diverged

    def rounds(self) -> Iterator[int]:
        """Count rounds for as long as a task is active; a device is asked only now and then."""
        interval = check_interval(self.x.device)
        # A task takes a step in each round, so that no more than its steps are of use.
        for k in range(self.max_steps):
            due = interval == 1 or (k > 0 and k % interval == 0)
            if due and not bool(self.active.any()):
                return
            yield k

    def observe(self, quotient: Tensor) -> None:
        """Note the Rayleigh quotients pᵀAp / pᵀp of the active tasks."""
        met = torch.where(self.active & quotient.isfinite(), quotient, float("nan"))
        self.curvature_min = torch.fmin(self.curvature_min, met)
        self.curvature_max = torch.fmax(self.curvature_max, met)

    def demand_finite(self, scalar: Tensor) -> Tensor:
        """Stop the active tasks whose scalar is not finite, as broken; return the others."""
        finite = scalar.isfinite()
        self.broken = self.broken | (self.active & ~finite)
        return self.active & finite

    def step(self, good: Tensor, x: Tensor, r: Tensor) -> None:
        """Move good tasks to x with residual r; the others stay where they are, for good."""
        self.x, self.r = choose(good, x, self.x), choose(good, r, self.r)
        self.rr = torch.where(good, dot(self.r, self.r), self.rr)
        self.steps = self.steps + good
        self.active = good & (self.rr > self.floor**2) & (self.steps < self.max_steps)


def solve_in_cycles(
    cycle: Callable[[Progress], None],
    operator: Operator,
    rhs: Tensor,
    start: Tensor | None,
    *,
    max_steps: int,
    rtol: float,
) -> LinearSolution:
    """Run cycles until each task is solved, has spent its steps, or cannot be helped.

    Args:
        cycle: Moves the active tasks until none is active.
        operator: A.
        rhs: b, of norm 1 or 0.
        start: First iterate; None: zero.
        max_steps: The most steps of a task.
        rtol: Tolerance in ‖b − A v‖; 0 asks for the steps only, and believes a recurrence that
            began at zero and claims nothing.
    """
    x = torch.zeros_like(rhs) if start is None else start
    r = rhs if start is None else rhs - operator(x)
    # Below rounding a recurrence is noise; go no further, whatever was asked.
    floor = max(rtol, torch.finfo(rhs.dtype).eps)
    target = rtol or floor
    progress = Progress.begin(x, r, floor, max_steps)
    last = torch.full_like(progress.rr, float("inf"))
    while True:
        cycle(progress)
        claimed = progress.rr <= floor**2
        if rtol > 0.0:
            progress.r = rhs - operator(progress.x)
            progress.rr = dot(progress.r, progress.r)
        residual = progress.rr.sqrt()
        # Rounding bounds the true residual from below: where a claim was wrong, go on only while
        # that still halves it.
        helps = residual < torch.where(claimed, 0.5, 1.0) * last
        progress.active = (
            (residual > target) & helps & ~progress.stopped & (progress.steps < max_steps)
        )
        last = residual
        if not bool(progress.active.any()):
            break
    if rtol == 0.0 and (start is not None or bool((residual <= target).any())):
        # A recurrence that started elsewhere, or that claims to be at rounding, is not believed.
        residual = norm(rhs - operator(progress.x))
    status = residual_status(residual, torch.full_like(residual, target), asked=rtol > 0.0)
    open_ = status != Status.CONVERGED
    status = torch.where(progress.indefinite & open_, int(Status.INDEFINITE), status)
    status = torch.where(progress.diverged & open_, int(Status.DIVERGED), status)
    broken = progress.broken | ~residual.isfinite()
    status = torch.where(broken, int(Status.NON_FINITE), status).to(torch.int8)
    return LinearSolution(
        progress.x,
        status,
        residual,
        progress.steps,
        progress.curvature_min,
        progress.curvature_max,
    )


def prepare(preconditioner: Preconditioner | None, operator: Operator, like: Tensor) -> MatVec:
    """Products with the preconditioner's M; the identity where there is none."""
    return (lambda v: v) if preconditioner is None else preconditioner.prepare(operator, like)


def check_settings(
    max_steps: int, rtol: float, preconditioner: Preconditioner | None = None
) -> None:
    """Refuse settings out of range.

    Raises:
        ValueError: A setting is out of range; it is named.
    """
    if max_steps < 1:
        raise ValueError(f"`max_steps` is {max_steps}; take at least one step")
    if not 0.0 <= rtol < 1.0:
        raise ValueError(f"`rtol` is {rtol}; pass a tolerance in [0, 1), 0 for the budget")
    if not (preconditioner is None or isinstance(preconditioner, Preconditioner)):
        raise ValueError(
            f"`preconditioner` is {preconditioner!r}; pass an instance such as "
            "JacobiPreconditioner(), or None"
        )
