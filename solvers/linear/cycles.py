"""What iterative solvers share: steps with a mask over tasks, in cycles from the true residual.

A recurrence drifts from the true residual b − A v, so its claim of convergence is checked; where it
does not hold, a new cycle begins from there. A solver writes the cycle alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bilevel.linear_solver import LinearSolution
from bilevel.operator import MatVec, Operator
from bilevel.preconditioner import Preconditioner
from bilevel.rows import Choice, all_between, check_interval, dot, norm
from bilevel.status import Status, marked, residual_status

__all__ = ["Progress", "check_settings", "prepare", "solve_in_cycles"]


class Progress:
    """Where each task stands.

    Attributes:
        x: Iterate, ``[tasks, n]``.
        r: Its residual by the recurrence.
        rr: ‖r‖², float64.
        floor: Tolerance in ‖r‖.
        max_steps: The most steps of a task.
        steps: Steps taken.
        indefinite: Tasks stopped by negative curvature.
        broken: Tasks stopped by a value that is not finite.
        diverged: Tasks stopped because their residual grew.
        everyone: All tasks iterate, as far as is known; where asking is dear it is never known.
    """

    def __init__(self, x: Tensor, r: Tensor, floor: float, max_steps: int) -> None:
        self.x, self.r, self.rr = x, r, dot(r, r)
        self.floor, self.max_steps = floor, max_steps
        self.steps = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        no = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.indefinite = self.broken = self.diverged = self._none = no
        self.everyone = False
        self._active = self.rr > floor**2
        self._rounds = 0
        self._quotients: list[Tensor] = []
        self._ends: list[float] = []
        self._sound = True

    @property
    def active(self) -> Tensor:
        """Tasks that iterate."""
        return self._active

    @active.setter
    def active(self, tasks: Tensor) -> None:
        self._active, self.everyone = tasks, False

    @property
    def stopped(self) -> Tensor:
        """Tasks for which another cycle is of no use."""
        return self.indefinite | self.broken | self.diverged

    @property
    def unhindered(self) -> bool:
        """No solver had to look for a task that must stop."""
        return all(one is self._none for one in (self.indefinite, self.broken, self.diverged))

    def rounds(self) -> Iterator[int]:
        """Count rounds for as long as a task is active; a device is asked only now and then."""
        interval = check_interval(self.x.device)
        # A task takes a step in each round, so that no more than its steps are of use.
        for k in range(self.max_steps):
            due = interval == 1 or (k > 0 and k % interval == 0)
            if due and not self.everyone:
                self.everyone = interval == 1 and bool(self._active.all())
                if not self.everyone and not bool(self._active.any()):
                    return
            yield k

    def observe(self, quotient: Tensor, *, sound: bool = False) -> None:
        """Note the Rayleigh quotients pᵀAp / pᵀp of the active tasks.

        Args:
            quotient: ``[tasks]``.
            sound: All tasks are active, and all quotients known to be finite.
        """
        if not self.everyone:
            quotient = quotient.masked_fill(~self._active, float("nan"))
        self._quotients.append(quotient)
        self._sound = self._sound and sound

    @property
    def curvature(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest finite quotient met; NaN if none was."""
        quotients = [*self._quotients, *(self.rr.new_tensor([end]) for end in self._ends)]
        if not quotients:
            nan = torch.full_like(self.rr, float("nan"))
            return nan, nan
        met = torch.stack(quotients)
        if self._sound:
            return met.aminmax(dim=0)
        low = met.nan_to_num(math.inf, math.inf, math.inf).amin(0)
        high = met.nan_to_num(-math.inf, -math.inf, -math.inf).amax(0)
        none = low == math.inf
        return low.masked_fill(none, float("nan")), high.masked_fill(none, float("nan"))

    def demand_finite(self, scalar: Tensor) -> Tensor:
        """Stop the active tasks whose scalar is not finite, as broken; return the others."""
        finite = scalar.isfinite()
        self.broken = self.broken | (self._active & ~finite)
        return self._active & finite

    def step(self, choose: Choice, x: Tensor, r: Tensor) -> None:
        """Move the chosen tasks to x with residual r; the others stay where they are, for good."""
        self.x, self.r = choose(x, self.x), choose(r, self.r)
        self.rr = choose(dot(self.r, self.r), self.rr)
        self.steps = self.steps + choose.tasks
        self._rounds += 1
        goes_on = choose.everyone and self._rounds < self.max_steps
        if goes_on and all_between(self.floor**2, self.rr, math.inf):
            self._active, self.everyone = choose.tasks, True
        else:
            going = choose.tasks & (self.rr > self.floor**2)
            self.active = going & (self.steps < self.max_steps)

    @property
    def spent(self) -> bool:
        """Every task has taken all its steps, as far as asking is free."""
        if self.alone:
            return self.steps.item() == self.max_steps
        return Choice(self.steps == self.max_steps).everyone

    # A task alone on a device that answers at once: its steps in numbers

    @property
    def alone(self) -> bool:
        """There is one task, and asking for its numbers is free."""
        # Products of half numbers with a number are rounded otherwise.
        return len(self.x) == 1 and check_interval(self.x.device) == 1 and self.x.itemsize >= 4

    def goes_on(self, rr: float, steps: int) -> bool:
        """Whether the task iterates after so many steps more, with that ‖r‖²."""
        return self.floor**2 < rr < math.inf and self._rounds + steps < self.max_steps

    def strode(self, x: Tensor, r: Tensor, rr: float, quotients: Sequence[float]) -> None:
        """Note steps taken in numbers, one for each Rayleigh quotient."""
        if not quotients:
            return
        self.x, self.r = x, r
        self.rr = torch.tensor([rr], dtype=torch.float64)
        self.steps = self.steps + len(quotients)
        self._rounds += len(quotients)
        self._ends += [min(quotients), max(quotients)]
        self.active = torch.tensor([rr > self.floor**2 and self._rounds < self.max_steps])


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
    progress = Progress(x, r, floor, max_steps)
    last: Tensor | None = None
    while True:
        cycle(progress)
        if rtol == 0.0 and progress.spent:
            residual = progress.rr.sqrt()
            break
        claimed = progress.rr <= floor**2
        if rtol > 0.0:
            progress.r = rhs - operator(progress.x)
            progress.rr = dot(progress.r, progress.r)
        residual = progress.rr.sqrt()
        # Rounding bounds the true residual from below: where a claim was wrong, go on only while
        # that still halves it.
        before = torch.full_like(residual, float("inf")) if last is None else last
        helps = residual < torch.where(claimed, 0.5, 1.0) * before
        progress.active = (
            (residual > target) & helps & ~progress.stopped & (progress.steps < max_steps)
        )
        last = residual
        if not bool(progress.active.any()):
            break
    known = start is None and all_between(target, residual, math.inf)
    if rtol == 0.0 and not known and (start is not None or bool((residual <= target).any())):
        # A recurrence that started elsewhere, or that claims to be at rounding, is not believed.
        residual = norm(rhs - operator(progress.x))
    status = residual_status(residual, target, asked=rtol > 0.0)
    if progress.unhindered:
        return LinearSolution(progress.x, status, residual, progress.steps, *progress.curvature)
    open_ = status != Status.CONVERGED
    status = marked(status, progress.indefinite & open_, Status.INDEFINITE)
    status = marked(status, progress.diverged & open_, Status.DIVERGED)
    status = marked(status, progress.broken | ~residual.isfinite(), Status.NON_FINITE)
    return LinearSolution(progress.x, status, residual, progress.steps, *progress.curvature)


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
