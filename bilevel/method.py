"""The abstract hypergradient methods, and what they return."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .errors import StructureError
from .flat import FlatProblem
from .inner_solver import InnerReport, InnerSolver, given_solution
from .linear_solver import LinearSolution, LinearSolver, relative_residual
from .linearised import linearise, weighted
from .operator import Operator
from .rows import norm
from .status import Status, residual_status, worst

__all__ = ["Estimate", "HypergradientMethod", "ImplicitMethod", "Start"]


@dataclass(frozen=True)
class Start:
    """Where a method starts; all detached.

    Attributes:
        inner: First inner point ``[tasks, n]``, or None for the problem's own.
        adjoint: First iterate of the adjoint system, or None for zero.
    """

    inner: Tensor | None = None
    adjoint: Tensor | None = None


@dataclass(frozen=True)
class Estimate:
    """A hypergradient of stacked tasks as a method computed it.

    Attributes:
        gradient: For each outer leaf Σ weightᵢ dFᵢ/dx (or one per task, where the outer variable
            has one copy per task); None where nothing depends on the leaf.
        z: The inner point ``[tasks, n]``.
        inner_value: G ``[tasks]``.
        outer_value: f ``[tasks]``.
        inner: How the inner solve ended.
        linear: How the adjoint solve ended, with the adjoint; None for methods without one.
        inner_depends: Whether the inner solution was found to depend on the outer variable.
        has_inner_value: False for an equilibrium, whose ``inner_value`` is NaN.
    """

    gradient: tuple[Tensor | None, ...]
    z: Tensor
    inner_value: Tensor
    outer_value: Tensor
    inner: InnerReport
    linear: LinearSolution | None = None
    inner_depends: bool = True
    has_inner_value: bool = True

    @property
    def status(self) -> Tensor:
        """The worse of the two statuses of each task, NON_FINITE where an objective is."""
        status = self.inner.status
        if self.linear is not None:
            status = worst(status, self.linear.status)
        finite = self.outer_value.isfinite()
        if self.has_inner_value:
            finite = finite & self.inner_value.isfinite()
        return torch.where(finite, status, int(Status.NON_FINITE)).to(torch.int8)


class HypergradientMethod(ABC):
    """Turns a problem, an outer variable and tasks into a hypergradient; a frozen dataclass.

    Authors write `_compute`.
    """

    def __call__(
        self,
        flat: FlatProblem,
        inner_solver: InnerSolver | None,
        weights: Tensor,
        start: Start | None = None,
    ) -> Estimate:
        """Compute the weighted sum of the tasks' hypergradients.

        Args:
            flat: The problem on stacked tasks.
            inner_solver: Finds the inner solution; None: ``flat.start`` is the solution.
            weights: ``[tasks]``.
            start: Warm starts.

        Raises:
            StructureError: The problem's structure is weaker than the method needs.
        """
        self.check(flat)
        estimate = self._compute(flat, inner_solver, weights, start or Start())
        return replace(estimate, has_inner_value=not flat.problem.is_equilibrium)

    def check(self, flat: FlatProblem) -> None:
        """Refuse a problem that the method cannot treat, before any work."""

    @abstractmethod
    def _compute(
        self, flat: FlatProblem, inner_solver: InnerSolver | None, weights: Tensor, start: Start
    ) -> Estimate:
        """The hypergradient; arguments are checked."""


@dataclass(frozen=True)
class ImplicitMethod(HypergradientMethod):
    """A method by the implicit function theorem; authors write `_linear_solver`.

    Args:
        damping: Added to the matrix of the adjoint system, ≥ 0. The status and the residual are
            those of the undamped system.
    """

    damping: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        if not (self.damping >= 0.0 and math.isfinite(self.damping)):
            raise ValueError(f"`damping` is {self.damping}; it is finite and ≥ 0")
        self._linear_solver()  # its settings are ours, and it checks them

    def check(self, flat: FlatProblem) -> None:
        """Compare what the linear solver needs with what the problem promises."""
        needed = self._linear_solver().needs
        if not flat.problem.structure.satisfies(needed):
            raise StructureError(
                f"{self!r} needs an inner Jacobian that is {needed.name}, but "
                f"{type(flat.problem).__name__} promises {flat.problem.structure.name}; use "
                "DenseExact(), or NeumannSeries where I − scale · Jacobian contracts; or declare "
                f"`structure = Structure.{needed.name}` if that is true"
            )

    @abstractmethod
    def _linear_solver(self) -> LinearSolver:
        """The solver of the adjoint system."""

    def solve(self, operator: Operator, rhs: Tensor, start: Tensor | None = None) -> LinearSolution:
        """Solve with the damped operator; the residual is that of the undamped one."""
        solver = self._linear_solver()
        found = solver(operator.damped(self.damping), rhs, start)
        if self.damping == 0.0:
            return found
        # Damping makes another system: a solution of it need not be one of ours.
        residual = relative_residual(operator, rhs, found.value)
        judged = residual_status(
            residual, torch.full_like(residual, solver.rtol), asked=solver.rtol > 0
        )
        judged = torch.where(found.status >= Status.INDEFINITE, found.status, judged)
        return replace(found, residual=residual, status=judged.to(torch.int8))

    def _compute(
        self, flat: FlatProblem, inner_solver: InnerSolver | None, weights: Tensor, start: Start
    ) -> Estimate:
        carry = None if inner_solver is None else inner_solver.solve(flat, start.inner)
        z = flat.start if carry is None else carry.z
        system = linearise(flat, z)
        residual = norm(system.stationarity.detach())
        if carry is None or inner_solver is None:
            inner = given_solution(z, residual)
        else:
            inner = inner_solver.report(carry, residual, flat.notes.get("first_residual"))
        adjoint = self.solve(system.operator, system.rhs, start.adjoint)
        cross = system.cross(weighted(adjoint.value, weights))
        return Estimate(
            add(system.direct(weights), cross, sign=-1.0),
            z.detach(),
            system.inner_value,
            system.outer_value.detach(),
            inner,
            adjoint,
            any(leaf is not None for leaf in cross),
        )


def add(
    first: Sequence[Tensor | None], second: Sequence[Tensor | None], sign: float = 1.0
) -> tuple[Tensor | None, ...]:
    """Leaf by leaf ``first + sign * second``, None standing for a zero without dependence."""
    out: list[Tensor | None] = []
    for a, b in zip(first, second, strict=True):
        if b is None:
            out.append(a)
        else:
            out.append(sign * b if a is None else a + sign * b)
    return tuple(out)
