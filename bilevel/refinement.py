r"""Iterative refinement of the adjoint system (Wilkinson, 1963; Higham, 2002, chapter 12).

The residual $r = b - A v$ is evaluated in float64, with the problem itself in float64; the
correction $A d \approx r$ is solved in the problem's own dtype, and $v \leftarrow v + d$ kept in
float64. A recurrence in float32 stalls at a residual of about $\kappa \cdot 6 \cdot 10^{-8}$; this
one does not.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .errors import ObjectiveError, StructureError
from .flat import FlatProblem
from .kernels import Kernels
from .linear_solver import LinearSolution, LinearSolver
from .linearised import LinearisedSystem, linearise
from .operator import Operator
from .rows import choose, norm
from .status import Status, residual_status

__all__ = ["refined"]

_ROUNDS = 20
_HELPS = 0.5


def refined(
    system: LinearisedSystem, operator: Operator, solver: LinearSolver, found: LinearSolution
) -> LinearSolution:
    """Refine a solution until it is within the solver's tolerance, or a round no longer helps.

    Tasks that met negative curvature or failed keep what they have. The residual is that of v in
    float64, before it is rounded to the problem's dtype.

    Args:
        system: The system in the problem's dtype.
        operator: Its matrix, with what solvers learned of it.
        solver: Solves for the corrections; 0.01 is enough for each, whatever its tolerance.
        found: The solution to refine.

    Raises:
        StructureError: The problem cannot be evaluated in float64.
    """
    if system.rhs.dtype == torch.float64:
        return found
    exact = _in_float64(system)
    size = norm(exact.rhs)
    scale = torch.where(size > 0, size, 1.0)
    rough = solver.toward(max(solver.rtol, 1e-2), 0)
    v, steps = found.value.double(), found.steps
    r = exact.rhs - exact.pull(v)
    residual = norm(r) / scale
    good = found.status < Status.INDEFINITE
    going = good & (residual > solver.rtol) & residual.isfinite()
    for _ in range(_ROUNDS):
        if not bool(going.any()):
            break
        d = rough(operator, choose(going, r, torch.zeros_like(r)).to(system.rhs.dtype))
        trial = v + d.value
        steps = steps + torch.where(going, d.steps, 0)
        left = exact.rhs - exact.pull(trial)
        now = norm(left) / scale
        better = going & (now < residual)
        going = better & (now < _HELPS * residual) & (now > solver.rtol)
        v, r = choose(better, trial, v), choose(better, left, r)
        residual = torch.where(better, now, residual)
    judged = residual_status(residual, solver.rtol, asked=solver.rtol > 0)
    return replace(
        found,
        value=choose(good, v.to(found.value.dtype), found.value),
        residual=torch.where(good, residual, found.residual),
        status=torch.where(good, judged, found.status),
        steps=steps,
    )


def _in_float64(system: LinearisedSystem) -> LinearisedSystem:
    """The same system, evaluated in float64 at the same point."""
    flat = system.flat
    twin = FlatProblem(
        flat.problem,
        flat.outer.with_leaves([_double(leaf) for leaf in flat.outer.leaves]),
        flat.tasks.to(torch.float64),
        replace(flat.vector, dtype=torch.float64),
        flat.stacking,
        flat.start.double(),
        start_is_constant=True,
        kernels=Kernels(),
        counts=flat.counts,
    )
    try:
        return linearise(twin, system.z.double())
    except (RuntimeError, TypeError, ObjectiveError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StructureError(
            f"`refine` evaluates the problem in float64, which fails ({reason[:200]}): pass the "
            "tensors that the problem holds in the batch or in `outer`, or refine=False"
        ) from error


def _double(leaf: Tensor) -> Tensor:
    return leaf.detach().double()
