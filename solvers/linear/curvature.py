"""What becomes of a task whose matrix turned out not to be positive definite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from bilevel.errors import SolveError, StructureError
from bilevel.linear_solver import LinearSolution, relative_residual
from bilevel.operator import Operator
from bilevel.rows import all_finite, choose
from bilevel.status import Status

from .lanczos import smallest_ritz_value

__all__ = ["Policy", "repair"]

Policy: TypeAlias = Literal["truncate", "error", "damp", "ggn", "minres"]
Solve: TypeAlias = Callable[[Operator, Tensor], LinearSolution]

_DOUBLINGS = 20
_BISECTIONS = 2


def repair(
    policy: Policy,
    found: LinearSolution,
    operator: Operator,
    rhs: Tensor,
    cg: Solve,
    minres: Solve,
) -> LinearSolution:
    """Mend the tasks that are INDEFINITE; the others keep their solution.

    Args:
        policy: How.
        found: What conjugate gradients found.
        operator: A.
        rhs: b.
        cg: Conjugate gradients for another matrix and right-hand side.
        minres: MINRES likewise.

    Raises:
        SolveError: The policy is ``"error"`` and a task is INDEFINITE.
        StructureError: The policy is ``"ggn"`` and there is no Gauss-Newton matrix.
    """
    flagged = found.status == Status.INDEFINITE
    # Others cost nothing: the solution for a zero right-hand side is zero at once.
    b = choose(flagged, rhs, torch.zeros_like(rhs))
    damping = torch.zeros_like(found.residual) if policy == "damp" else None
    if policy == "truncate" or not bool(flagged.any()):
        return replace(found, damping=damping)
    if policy == "error":
        raise _error(found, flagged)
    if policy == "damp":
        value, steps, damping = _damped(found, flagged, operator, b, cg)
    elif policy == "ggn":
        if operator.gauss_newton is None:
            raise StructureError(
                "`indefinite` is 'ggn', but the Gauss-Newton matrix is not known here; declare "
                "`predict` and `loss` in place of `inner_objective`, or pass 'damp' or 'minres'"
            )
        other = cg(Operator.symmetric(operator.gauss_newton), b)
        value, steps = other.value, other.steps
    else:
        other = minres(operator, b)
        value, steps = other.value, other.steps
    usable = flagged & all_finite(value)
    value = choose(usable, value, found.value)
    residual = torch.where(usable, relative_residual(operator, rhs, value), found.residual)
    steps = found.steps + steps
    return replace(found, value=value, residual=residual, steps=steps, damping=damping)


def _damped(
    found: LinearSolution, flagged: Tensor, operator: Operator, b: Tensor, cg: Solve
) -> tuple[Tensor, Tensor, Tensor]:
    """Find about the least damping with which no negative curvature is met.

    Returns the solution, the steps it took to find, and the damping.

    The Ritz values of A + damping · I are those of A moved by the damping, so that less than the
    most negative one is never enough. From there: double, then bisect the last interval.
    """
    low = -found.curvature_min
    if found.lanczos is not None:
        low = torch.fmax(low, -smallest_ritz_value(found.lanczos))
    # Zero curvature has no scale of its own.
    low = torch.fmax(low, 1e-6 * found.curvature_max)
    low = torch.where(low > 0, low, 1.0)
    value, steps = found.value, torch.zeros_like(found.steps)
    high = torch.full_like(low, float("inf"))
    for k in range(_DOUBLINGS + _BISECTIONS):
        bracketed = high.isfinite()
        open_ = flagged & (bracketed if k >= _DOUBLINGS else ~bracketed)
        if k < _DOUBLINGS and not bool(open_.any()):
            continue
        trial = torch.where(bracketed, (low * high).sqrt(), 2.0 * low)
        solution = cg(operator.damped(trial), choose(open_, b, torch.zeros_like(b)))
        fine = open_ & (solution.status < Status.INDEFINITE)
        value, steps = choose(fine, solution.value, value), steps + solution.steps
        high = torch.where(fine, trial, high)
        low = torch.where(open_ & ~fine, trial, low)
    # Where no damping was found the truncated solution stays, and the damping is infinite.
    return value, steps, torch.where(flagged, high, 0.0)


def _error(found: LinearSolution, flagged: Tensor) -> SolveError:
    tasks = flagged.nonzero().flatten().tolist()
    worst = found.curvature_min[flagged].min().item()
    return SolveError(
        f"tasks {tasks} met negative curvature, pᵀAp / pᵀp = {worst:.3g}: their matrix is not "
        "positive definite; raise the proximal strength, add damping, solve the inner problem "
        "further, or pass `indefinite` = 'damp', 'ggn' or 'minres'"
    )
