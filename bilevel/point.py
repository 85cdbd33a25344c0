r"""The implicit hypergradient at one inner point, and at the Newton step from it.

At any point $z$ let $u(z) = \partial_x f - (\partial_x F)^\top v$ with
$(\partial_z F)^\top v = \partial_z f$, where $F = \partial_z G$. The hypergradient is
$u(z^\star)$. One Newton step,

$$z_+ = z - s, \qquad \partial_z F\, s = F,$$

squares the inner error, so that $u(z_+)$ stands for the exact hypergradient: it is the corrected
one, and $\|u(z) - u(z_+)\|$ is the error of $u(z)$, up to terms quadratic in the inner error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .flat import FlatProblem
from .linear_solver import LinearSolution, LinearSolver
from .linearised import LinearisedSystem, linearise, weighted
from .minimum import bent
from .operator import Operator
from .problem import Structure
from .rows import norm
from .status import Status, worst

__all__ = ["ErrorEstimate", "Point", "add", "corrected", "estimate_error"]

_ESTIMATE_STEPS = 1000
_CONTRACTION = 0.5
_UNFINISHED = 0.1


@dataclass(frozen=True)
class Point:
    """A hypergradient at one inner point.

    Attributes:
        system: The inner problem linearised there.
        operator: The matrix of the adjoint system, with what solvers learned of it.
        adjoint: How the adjoint system was solved.
        cross: (∂_x F)ᵀ v for each outer leaf.
        gradient: ∂_x f − (∂_x F)ᵀ v for each outer leaf; weighted sums over tasks, or one per task
            where the outer variable has one copy per task.
    """

    system: LinearisedSystem
    operator: Operator
    adjoint: LinearSolution
    cross: list[Tensor | None]
    gradient: tuple[Tensor | None, ...]

    @classmethod
    def of(
        cls,
        system: LinearisedSystem,
        operator: Operator,
        adjoint: LinearSolution,
        weights: Tensor,
    ) -> Point:
        """Assemble the hypergradient from the adjoint."""
        cross = system.cross(weighted(adjoint.value, weights))
        gradient = add(system.direct(weights), cross, sign=-1.0)
        return cls(system, operator, adjoint, cross, gradient)

    @property
    def z(self) -> Tensor:
        """The inner point ``[tasks, n]``."""
        return self.system.z.detach()

    @property
    def residual(self) -> Tensor:
        """‖F‖ for each task."""
        return self.system.residual

    @property
    def norm(self) -> Tensor:
        """‖u‖ for each task, where the outer variable has one copy per task."""
        return leaves_norm(self.gradient, self.system.flat)


@dataclass(frozen=True)
class ErrorEstimate:
    """How far a hypergradient is from that of the solved problem, as far as it can be told.

    Attributes:
        relative: ‖u(z) − u(z*)‖ / ‖u(z)‖ for each task, estimated, float64; infinite where the
            estimate itself failed.
        inner: The part of it that comes from the inner error.
        linear: The part that comes from the residual of the adjoint system.
        norm: ‖u(z)‖ for each task.
        status: How the worst of the further solves ended, `Status` codes.
    """

    relative: Tensor
    inner: Tensor
    linear: Tensor
    norm: Tensor
    status: Tensor


def newton_step(
    system: LinearisedSystem, operator: Operator, solver: LinearSolver
) -> tuple[Tensor, LinearSolution]:
    """The point z − s with ∂_z F s = F, and how s was found."""
    found = solver(operator.T, system.stationarity.detach())
    return system.z.detach() - found.value, found


def corrected(
    system: LinearisedSystem, operator: Operator, solver: LinearSolver
) -> LinearisedSystem:
    """The inner problem linearised at the Newton step; a task whose residual grew stays."""
    z, step = newton_step(system, operator, solver)
    ahead = linearise(system.flat, z)
    before, after = system.residual, ahead.residual
    turned = _turned(system, ahead, step)
    good = (after <= before) & (step.status < Status.INDEFINITE) & (turned <= before)
    if bool(good.all()):
        return ahead
    return linearise(system.flat, torch.where(good.unsqueeze(-1), z, system.z.detach()))


def estimate_error(point: Point, solver: LinearSolver, rtol: float) -> ErrorEstimate:
    """Compare a hypergradient with the one at the Newton step, its adjoint solved further.

    Args:
        point: The hypergradient, whose outer variable has one copy per task.
        solver: The linear solver.
        rtol: What the three solves are solved to. Where the Hessian is ill conditioned a residual
            says less of an error, so that the estimate needs a lower one there.
    """
    solver = solver.toward(rtol, _ESTIMATE_STEPS)
    system, v = point.system, point.adjoint.value
    problem = system.flat.problem
    z, step = newton_step(system, point.operator, solver)
    ahead = linearise(system.flat, z)
    # What the adjoint lacks: for its own residual, and for the move from z to the Newton step.
    unsolved = system.rhs - system.pull(v)
    own = solver(ahead.operator, unsolved)
    moved = solver(ahead.operator, ahead.rhs - ahead.pull(v) - unsolved)
    ones = torch.ones(len(z), dtype=torch.float64, device=z.device)
    value = v + own.value + moved.value
    better = Point.of(ahead, ahead.operator, replace(moved, value=value), ones)
    gap = add(point.gradient, better.gradient, sign=-1.0)
    by_residual = ahead.cross(own.value)
    parts = (gap, add(gap, by_residual, sign=-1.0), by_residual)
    # Beside a hypergradient of zero any error is infinite.
    found = (leaves_norm(leaves, system.flat) for leaves in parts)
    total, inner, linear = (torch.where(x > 0, x / point.norm, 0.0) for x in found)
    # Where a Newton step that matters does not contract, z is too far from a solution to tell.
    matters = norm(step.value) > torch.finfo(z.dtype).eps ** 0.5 * norm(point.z)
    left = torch.maximum(better.residual, _turned(system, ahead, step))
    lost = matters & (left > _CONTRACTION * point.residual)
    if not (problem.is_equilibrium or problem.structure is Structure.POSITIVE_DEFINITE):
        lost = lost | bent(ahead.operator, z)
    solves = (step, own, moved)
    status = worst(*(one.status for one in solves))
    unfinished = torch.stack([one.residual for one in solves]).amax(0)
    lost = lost | (status > Status.MAX_STEPS) | ~(unfinished <= _UNFINISHED) | total.isnan()
    total, inner, linear = (torch.where(lost, float("inf"), x) for x in (total, inner, linear))
    return ErrorEstimate(total, inner, linear, point.norm, status)


def _turned(system: LinearisedSystem, ahead: LinearisedSystem, step: LinearSolution) -> Tensor:
    """‖∂_z F₊ s − F‖ for each task: how far the Jacobian changes along the Newton step s.

    Where it vanishes together with F, as in a flat valley, F alone would seem to contract.
    """
    return norm(ahead.operator.T(step.value) - system.stationarity.detach())


def leaves_norm(leaves: Sequence[Tensor | None], flat: FlatProblem) -> Tensor:
    """Norm over all leaves for each task, float64 ``[tasks]``."""
    total = torch.zeros(flat.count, dtype=torch.float64, device=flat.device)
    for leaf in leaves:
        if leaf is not None:
            rows = leaf.reshape(flat.count, -1)
            size = norm(rows) if rows.shape[1] else rows.new_zeros(flat.count).double()
            total = total + size.to(total.device).square()
    return total.sqrt()


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
