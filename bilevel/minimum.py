"""Whether the inner point can be a minimum, as far as a few products tell.

The implicit function theorem holds at any stationary point; the inner problem asks for a minimum.
Negative curvature at a point proves that it is none, however well a linear solver coped with it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .errors import StructureError
from .linear_solver import LinearSolution
from .linearised import LinearisedSystem
from .operator import Operator, signs
from .rows import all_between, column, dot, norm
from .spectrum import extreme_eigenvalues
from .status import Status, marked

__all__ = ["bent", "check_symmetry", "distance", "flag_bent", "flag_curvature"]

_LANCZOS_STEPS = 8


def flag_curvature(operator: Operator, found: LinearSolution) -> LinearSolution:
    """INDEFINITE where a solve met curvature that no minimum has, whichever solver coped with it.

    A solver that notes no curvature costs one product more, along the solution.
    """
    low, high = found.curvature_min, found.curvature_max
    if all_between(0.0, low, math.inf):
        return found
    if bool((low.isnan() & (found.steps > 0)).any()):
        size = norm(found.value)
        unit = found.value / column(torch.where(size > 0, size, 1.0), found.value)
        along = torch.where(size > 0, dot(unit, operator(unit)), float("nan"))
        low, high = torch.fmin(low, along), torch.fmax(high, along)
    noise = torch.finfo(found.value.dtype).eps ** 0.5 * torch.fmax(high.abs(), low.abs())
    return replace(_indefinite(found, low < -noise), curvature_min=low, curvature_max=high)


def bent(operator: Operator, like: Tensor) -> Tensor:
    """Tasks where Lanczos steps from a fixed random vector meet negative curvature, ``[tasks]``.

    It sees the saddle across which the right-hand side of the adjoint system happens to lie. Costs
    8 products.
    """
    low, high = extreme_eigenvalues(operator, like, _LANCZOS_STEPS).unbind(-1)
    noise: float = torch.finfo(like.dtype).eps ** 0.5
    return low < -noise * torch.maximum(low.abs(), high.abs())


def flag_bent(operator: Operator, found: LinearSolution) -> LinearSolution:
    """INDEFINITE where `bent`."""
    return _indefinite(found, bent(operator, found.value))


def check_symmetry(system: LinearisedSystem) -> None:
    """Two products with fixed vectors: ⟨u, A w⟩ = ⟨w, A u⟩ where A is symmetric.

    Raises:
        StructureError: The Jacobian is not symmetric, though the problem promises it.
    """
    u = signs(system.z.detach(), 1)[0]
    w = u * torch.arange(1.0, u.shape[1] + 1, device=u.device).to(u).sqrt()
    au, aw = system.pull(u), system.pull(w)
    gap = (dot(u, aw) - dot(w, au)).abs()
    if bool((gap > 1e-3 * (norm(u) * norm(aw) + norm(w) * norm(au))).any()):
        raise StructureError(
            f"the problem promises a Jacobian that is {system.flat.problem.structure.name}, but it "
            "is not symmetric; declare `structure = Structure.GENERAL`, and use DenseExact(), or "
            "Implicit with GMRES() or BiCGStab()"
        )


def distance(z: Tensor, residual: Tensor, adjoint: LinearSolution, start: Tensor) -> Tensor:
    """‖F‖ / L over the inner variable's size: at least so far is the solution, ``[tasks]``.

    L is the largest curvature that the solve of the adjoint has met. NaN where it met none.
    """
    size = torch.maximum(norm(z), norm(start))
    return residual / adjoint.curvature_max.abs() / torch.where(size > 0, size, 1.0)


def _indefinite(found: LinearSolution, negative: Tensor) -> LinearSolution:
    worse = negative & (found.status < Status.INDEFINITE)
    return replace(found, status=marked(found.status, worse, Status.INDEFINITE))
