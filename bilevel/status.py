"""How a solve ended, for each task: decided by residuals, never by the step count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from functools import reduce

import torch
from torch import Tensor

from .rows import check_interval

__all__ = ["Status"]


class Status(IntEnum):
    """How a solve ended. Members are ordered from best to worst; each knows its cure."""

    CONVERGED = 0
    BUDGET = 1
    MAX_STEPS = 2
    INDEFINITE = 3
    DIVERGED = 4
    NON_FINITE = 5

    @property
    def ok(self) -> bool:
        """The solve did all that was asked of it: CONVERGED, or BUDGET with no tolerance set."""
        return self <= Status.BUDGET

    @property
    def usable(self) -> bool:
        """The task's hypergradient takes part in the mean."""
        return self < Status.DIVERGED

    @property
    def meaning(self) -> str:
        """What was found, in a few words."""
        return _MEANING[self]

    @property
    def cure(self) -> str:
        """What to change, in a few words."""
        return _CURE[self]


_MEANING = {
    Status.CONVERGED: "the residual is within the tolerance",
    Status.BUDGET: "no tolerance was set and the budget is spent",
    Status.MAX_STEPS: "the tolerance was not reached within the permitted steps",
    Status.INDEFINITE: "negative curvature: the inner Hessian is not positive definite",
    Status.DIVERGED: "the residual grew",
    Status.NON_FINITE: "a value is NaN or infinite",
}
_CURE = {
    Status.CONVERGED: "nothing to do",
    Status.BUDGET: "set `tol` or `rtol` to be told about convergence",
    Status.MAX_STEPS: "raise `max_steps`, loosen the tolerance, or add damping",
    Status.INDEFINITE: "raise the proximal strength, add damping, or solve further",
    Status.DIVERGED: "lower the learning rate or the Neumann scale below 2/L",
    Status.NON_FINITE: "look for log(0), 0/0 or overflow in an objective, an exactly singular "
    "Hessian, or a square root at 0 in an unrolled optimizer; lower the learning rate",
}


def status_codes(count: int, status: Status, device: torch.device) -> Tensor:
    """Codes ``[count]``, all equal to ``status``."""
    return torch.full((count,), int(status), dtype=torch.int8, device=device)


def worst(*codes: Tensor) -> Tensor:
    """The worse status of each task."""
    return reduce(torch.maximum, codes)


def members(codes: Tensor) -> tuple[Status, ...]:
    """Codes as `Status` members (asks the device)."""
    return tuple(Status(code) for code in codes.tolist())


def residual_status(residual: Tensor, target: float, *, asked: bool) -> Tensor:
    """CONVERGED within the target; else BUDGET, or MAX_STEPS where a target was asked for."""
    other = Status.MAX_STEPS if asked else Status.BUDGET
    if check_interval(residual.device) == 1:
        # One look at the numbers costs less than operations on tensors so small.
        judged = [
            (Status.CONVERGED if one <= target else other)
            if math.isfinite(one)
            else Status.NON_FINITE
            for one in residual.tolist()
        ]
        return torch.tensor(judged, dtype=torch.int8, device=residual.device)
    codes = torch.full_like(residual, int(other), dtype=torch.int8)
    codes = marked(codes, residual <= target, Status.CONVERGED)
    return marked(codes, ~residual.isfinite(), Status.NON_FINITE)


def marked(codes: Tensor, where: Tensor, status: Status) -> Tensor:
    """The codes, with another one for some tasks."""
    return codes.masked_fill(where, int(status))


def describe_status(status: Sequence[Status]) -> str:
    """How many tasks have which status, what it means, and what to do."""
    sentences = []
    for kind in sorted(set(status), reverse=True):
        where = [i for i, s in enumerate(status) if s == kind]
        which = f"task{'s' * (len(where) > 1)} {', '.join(map(str, where[:8]))}"
        which += ", …" if len(where) > 8 else ""
        sentences.append(f"{which}: {kind.name} ({kind.meaning}; {kind.cure})")
    return "; ".join(sentences) + "."
