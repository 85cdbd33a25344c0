"""The abstract hypergradient methods, and what they return."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .brief import brief
from .certificate import certified_bound
from .errors import StructureError
from .flat import FlatProblem
from .inner_solver import InnerReport, InnerSolver, given_solution
from .kernels import Precision
from .linear_solver import LinearSolution, LinearSolver, relative_residual, with_tolerance
from .linearised import linearise
from .minimum import check_symmetry, distance, flag_bent, flag_curvature
from .operator import Operator, SecantPairs
from .point import ErrorEstimate, Point, corrected, estimate_error
from .problem import Structure
from .refinement import refined
from .rows import all_between
from .status import Status, marked, residual_status, worst

__all__ = ["Estimate", "HypergradientMethod", "ImplicitMethod", "Start"]

_ESTIMATE_RTOL = 1e-3


@dataclass(frozen=True)
class Start:
    """Where a method starts; all detached.

    Attributes:
        inner: First inner point ``[tasks, n]``, or None for the problem's own.
        adjoint: First iterate of the adjoint system, or None for zero.
        pairs: What the last solve of the adjoint system learned of its matrix.
    """

    inner: Tensor | None = None
    adjoint: Tensor | None = None
    pairs: SecantPairs | None = None

    def part(self, first: int, last: int) -> Start:
        """The starts of tasks ``first`` to ``last - 1``."""
        return self.select(slice(first, last))

    def select(self, index: Tensor | slice) -> Start:
        """The starts of the tasks at ``index``."""
        return Start(
            None if self.inner is None else self.inner[index],
            None if self.adjoint is None else self.adjoint[index],
            None if self.pairs is None else self.pairs.select(index),
        )


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
        derivative: How much of ∂_z f is left where differentiation begins ``[tasks]``; None for
            methods that do not unroll.
        distance: How far the inner solution is at least, relative to its size ``[tasks]``; None
            where no curvature was met.
        error: The estimate of the error, where it was asked for.
        bound: The certified relative error ``[tasks]``, where it was asked for.
        metrics: The problem's metrics at ``z``, ``[tasks]`` each, where they came with f; None: to
            be computed.
    """

    gradient: tuple[Tensor | None, ...]
    z: Tensor
    inner_value: Tensor
    outer_value: Tensor
    inner: InnerReport
    linear: LinearSolution | None = None
    inner_depends: bool = True
    has_inner_value: bool = True
    derivative: Tensor | None = None
    distance: Tensor | None = None
    error: ErrorEstimate | None = None
    bound: Tensor | None = None
    metrics: dict[str, Tensor] | None = None

    @property
    def status(self) -> Tensor:
        """The worse of the two statuses of each task, NON_FINITE where an objective is."""
        status = self.inner.status
        if self.linear is not None:
            status = worst(status, self.linear.status)
        values = [self.outer_value, *([self.inner_value] if self.has_inner_value else [])]
        if all(all_between(-math.inf, value, math.inf) for value in values):
            return status
        finite = self.outer_value.isfinite()
        if self.has_inner_value:
            finite = finite & self.inner_value.isfinite()
        return marked(status, ~finite, Status.NON_FINITE)


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
            ValueError: A precision of steps is asked for that they cannot have.
        """
        self.check(flat)
        precision = flat.kernels.precision
        self.require_precision(precision)
        if inner_solver is None and precision != "full":
            raise ValueError(
                f"`precision` is {precision!r}, that of the inner solver's steps, but "
                "`inner_solver` is None; pass precision='full', or a solver"
            )
        estimate = self._compute(flat, inner_solver, weights, start or Start())
        return replace(estimate, has_inner_value=False) if flat.problem.is_equilibrium else estimate

    def check(self, flat: FlatProblem) -> None:
        """Refuse a problem that the method cannot treat, before any work."""

    def require_precision(self, precision: Precision) -> None:
        """Refuse a precision of the inner steps that the method cannot treat, before any work."""

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
        error_estimate: Estimate the relative error of each task's hypergradient; costs three more
            solves to 0.001 (or to the number given), one gradient of either objective, and memory
            for one hypergradient per task.
        correct: Take one Newton step in the inner variable first, which squares the inner error;
            costs one further solve and one gradient of either objective.
        check_minimum: Look for negative curvature with 8 more products, from a random vector: this
            sees a saddle that ∂_z f happens to be orthogonal to, which no solve can see.
        refine: Refine the adjoint in float64, by residuals of the problem in float64 and
            corrections in its own dtype, which is what an ill-conditioned system in float32 needs.
            Costs a gradient of either objective and one product for each round, in float64; does
            nothing for a problem that is in float64.
        error_bound: Certify the error of each task's hypergradient from the constants that the
            problem declares (`BilevelProblem.smoothness`); no further solve.
    """

    damping: float = field(default=0.0, kw_only=True)
    error_estimate: bool | float = field(default=False, kw_only=True)
    correct: bool = field(default=False, kw_only=True)
    check_minimum: bool = field(default=False, kw_only=True)
    error_bound: bool = field(default=False, kw_only=True)
    refine: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not (self.damping >= 0.0 and math.isfinite(self.damping)):
            raise ValueError(f"`damping` is {self.damping}; it is finite and ≥ 0")
        if not isinstance(self.refine, bool):
            raise ValueError(f"`refine` is {self.refine!r}; pass True or False")
        if not 0.0 <= float(self.error_estimate) <= 1.0:
            raise ValueError(
                f"`error_estimate` is {self.error_estimate}; pass True, False, or the relative "
                "residual of its solves, in (0, 1)"
            )
        if self.refine and self.damping > 0.0:
            raise ValueError(
                f"`damping` is {self.damping} and `refine` True: damping solves another system, of "
                "which more digits are of no use; pass one of the two"
            )
        solver = self._linear_solver()  # its settings are ours, and it checks them
        if self.refine and solver.rtol == 0.0:
            raise ValueError("`refine` needs a tolerance, but `rtol` is 0; pass one, such as 1e-6")

    def check(self, flat: FlatProblem) -> None:
        """Compare what the linear solver needs with what the problem promises."""
        needed = self._linear_solver().needs
        if not flat.problem.structure.satisfies(needed):
            raise StructureError(
                f"{brief(self)} needs an inner Jacobian that is {needed.name}, but "
                f"the problem promises {flat.problem.structure.name}; use Implicit(GMRES()), "
                "DenseExact(), or NeumannSeries where I − scale · Jacobian contracts; or declare "
                f"`structure = Structure.{needed.name}`, an argument of `problem_from`, if that is "
                "true"
            )

    @abstractmethod
    def _linear_solver(self) -> LinearSolver:
        """The solver of the adjoint system."""

    def toward(self, rtol: float, most: int) -> ImplicitMethod:
        """The same method asked for a relative residual, whatever its own budget.

        Args:
            rtol: The tolerance of the adjoint solve; a direct method has none and stays as it is.
            most: The least number of steps (or terms) that the budget is raised to.
        """
        return with_tolerance(self, rtol, most)

    def _error(self, point: Point) -> ErrorEstimate | None:
        if self.error_estimate is False:
            return None
        rtol = _ESTIMATE_RTOL if self.error_estimate is True else self.error_estimate
        return estimate_error(point, self._linear_solver(), rtol)

    def solve(self, operator: Operator, rhs: Tensor, start: Tensor | None = None) -> LinearSolution:
        """Solve with the damped operator; the residual is that of the undamped one."""
        solver = self._linear_solver()
        found = solver(operator.damped(self.damping), rhs, start)
        if self.damping == 0.0:
            return found
        # Damping makes another system: a solution of it need not be one of ours.
        residual = relative_residual(operator, rhs, found.value)
        judged = residual_status(residual, solver.rtol, asked=solver.rtol > 0)
        judged = torch.where(found.status >= Status.INDEFINITE, found.status, judged)
        # The next outer step adds the damping again.
        pairs = None if found.pairs is None else found.pairs.damped(-self.damping)
        return replace(found, residual=residual, status=judged.to(torch.int8), pairs=pairs)

    def _compute(
        self, flat: FlatProblem, inner_solver: InnerSolver | None, weights: Tensor, start: Start
    ) -> Estimate:
        carry = None if inner_solver is None else inner_solver.solve(flat, start.inner)
        z = flat.start if carry is None else carry.z
        shared = not flat.outer.per_task
        if self.error_estimate or self.error_bound:
            # An error for each task needs a gradient for each task.
            flat = flat.expanded() if shared else flat
        system = linearise(flat, z)
        problem = flat.problem
        if problem.is_equilibrium and problem.structure is not Structure.GENERAL:
            check_symmetry(system)
        learned = None if carry is None or inner_solver is None else inner_solver.pairs(carry)
        operator = system.operator.knowing(learned, start.pairs)
        if self.correct:
            system = corrected(system, operator, self._linear_solver())
            operator = system.operator.knowing(learned, start.pairs)
        adjoint = self.solve(operator, system.rhs, start.adjoint)
        if self.refine:
            adjoint = refined(system, operator, self._linear_solver(), adjoint)
        if not problem.is_equilibrium:
            adjoint = flag_curvature(operator, adjoint)
            adjoint = flag_bent(operator, adjoint) if self.check_minimum else adjoint
        summed = shared and flat.outer.per_task
        point = Point.of(system, operator, adjoint, torch.ones_like(weights) if summed else weights)
        residual = point.residual
        if carry is None or inner_solver is None:
            inner = given_solution(z, residual)
        else:
            carry = replace(carry, z=point.z)
            inner = inner_solver.report(carry, residual, flat.notes.get("first_residual"))
        gradient = point.gradient
        if summed:
            gradient = tuple(
                None if leaf is None else torch.tensordot(weights.to(leaf), leaf, 1)
                for leaf in gradient
            )
        return Estimate(
            gradient,
            point.z,
            system.inner_value,
            system.outer_value.detach(),
            inner,
            adjoint,
            any(leaf is not None for leaf in point.cross),
            distance=None
            if problem.is_equilibrium
            else distance(point.z, residual, adjoint, flat.start),
            error=self._error(point),
            bound=certified_bound(point) if self.error_bound else None,
            metrics=system.metrics,
        )
