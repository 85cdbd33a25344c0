"""The abstract linear solver: A v = b for stacked tasks, given only products with A."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from .operator import MatVec, Operator, SecantPairs
from .problem import Structure
from .rows import all_between, all_finite, column, norm
from .status import Status, marked

__all__ = ["LinearSolution", "LinearSolver"]

T = TypeVar("T")


@dataclass(frozen=True)
class LinearSolution:
    """What a linear solver returns; scalars are ``[tasks]``.

    Attributes:
        value: The solution v, ``[tasks, n]``.
        status: `Status` codes, int8.
        residual: ‖b − A v‖ / ‖b‖, float64; 0 where b is zero.
        steps: Steps taken, int64.
        curvature_min: Smallest Rayleigh quotient pᵀAp / pᵀp met; NaN if none was.
        curvature_max: Largest one.
        damping: Damping that the solver added to restore positive curvature, float64; None where
            it never does.
        tridiagonal: Makes `lanczos`, which most callers never ask for.
        pairs: What the solver learned of the matrix, for its next use; None where nothing was asked
            to be kept.
    """

    value: Tensor
    status: Tensor
    residual: Tensor
    steps: Tensor
    curvature_min: Tensor
    curvature_max: Tensor
    damping: Tensor | None = None
    tridiagonal: Callable[[], Tensor] | None = None
    pairs: SecantPairs | None = None

    @cached_property
    def lanczos(self) -> Tensor | None:
        """Diagonal and off-diagonal of the tridiagonal matrix that the solver built.

        ``[tasks, steps, 2]``, float64, NaN where a task took fewer steps; None for solvers that
        build none.
        """
        return None if self.tridiagonal is None else self.tridiagonal()


class LinearSolver(ABC):
    """Solves A v = b for stacked tasks from products with A alone; a frozen dataclass.

    Authors write `_solve`, which sees right-hand sides of norm 1 (or exactly 0) and finite entries,
    so that tolerances are relative to each task's own right-hand side.

    Attributes:
        needs: What the solver needs of the inner problem's structure.
        rtol: Tolerance in ‖b − A v‖ / ‖b‖; 0 asks for the budget only.
    """

    needs: ClassVar[Structure] = Structure.GENERAL
    rtol: float

    def __call__(
        self, matvec: MatVec | Operator, rhs: Tensor, start: Tensor | None = None
    ) -> LinearSolution:
        """Solve A v = b.

        Args:
            matvec: Product with A, ``[tasks, n] -> [tasks, n]``; or an `Operator`, which knows
                more.
            rhs: b, ``[tasks, n]``.
            start: First iterate ``[tasks, n]``; default: zero.

        Raises:
            ValueError: A shape is wrong; the argument is named.
        """
        if rhs.ndim != 2 or not rhs.is_floating_point():
            raise ValueError(f"`rhs` is {rhs.dtype} {tuple(rhs.shape)}; pass a floating [tasks, n]")
        if start is not None and (start.shape != rhs.shape or start.dtype != rhs.dtype):
            raise ValueError(
                f"`start` is {start.dtype} {tuple(start.shape)} but `rhs` is {rhs.dtype} "
                f"{tuple(rhs.shape)}; pass the solution of a system of the same size"
            )
        size = norm(rhs)
        least, most = torch.finfo(rhs.dtype).tiny ** 0.5, torch.finfo(rhs.dtype).max ** 0.5
        plain = all_between(least, size, most)
        # By the largest entry and by the length: their product may leave the range of the dtype.
        usable = _same if plain else _usable
        largest = usable(rhs.abs().amax(-1, keepdim=True))
        unit = rhs / largest
        length = usable(column(norm(unit), rhs))
        unit = unit / length
        if not plain or start is not None:
            regular = (all_finite(rhs) & (size > 0)).unsqueeze(-1)
            unit = torch.where(regular, unit, 0.0)
            if start is not None:
                first = start / largest / length
                start = torch.where(regular & start.isfinite(), first, 0.0)
        found = self._solve(Operator.of(matvec), unit, start)
        value = found.value * length * largest
        long = norm(value)
        if plain and all_between(least, long, most):
            return replace(found, value=value)
        # Below the normal numbers a value has lost its digits; ∂_x F may be large enough to matter.
        tiny = torch.finfo(value.dtype).tiny
        lost = (long < tiny) & (size >= tiny) & (norm(found.value) > 0)
        bad = (lost | ~all_finite(value)) & (found.status < Status.DIVERGED)
        status = marked(found.status, bad | ~all_finite(rhs), Status.NON_FINITE)
        return replace(found, value=value, status=status)

    def toward(self, rtol: float, most: int) -> LinearSolver:
        """The same solver asked for a relative residual, whatever its own budget.

        Args:
            rtol: The tolerance.
            most: The least number of steps (or terms) that the budget is raised to.
        """
        return with_tolerance(self, rtol, most)

    @abstractmethod
    def _solve(self, operator: Operator, rhs: Tensor, start: Tensor | None) -> LinearSolution:
        """Solve for right-hand sides of norm 1 or 0; zero ones return zero, CONVERGED."""


def _same(scale: Tensor) -> Tensor:
    return scale


def _usable(scale: Tensor) -> Tensor:
    """The scale where one can divide by it, else 1."""
    return torch.where((scale > 0) & scale.isfinite(), scale, 1.0)


def relative_residual(operator: Operator, rhs: Tensor, value: Tensor) -> Tensor:
    """‖b − A v‖ / ‖b‖ for each task, float64; 0 where b is zero."""
    size = norm(rhs)
    residual = norm(rhs - operator(value)) / torch.where(size > 0, size, 1.0)
    return torch.where(size > 0, residual, 0.0)


def with_tolerance(thing: T, rtol: float, most: int) -> T:
    """A copy of a frozen dataclass with another ``rtol``, and a budget of at least ``most``."""
    names = {field.name for field in fields(thing)}  # type: ignore[arg-type]
    changes: dict[str, object] = {"rtol": rtol} if "rtol" in names else {}
    for name in names & {"max_steps", "terms"}:
        changes[name] = max(getattr(thing, name), most)
    return replace(thing, **changes)  # type: ignore[type-var]
