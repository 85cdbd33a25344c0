"""What `hypergradient` returns: the value, and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .engine import Engine
from .operator import SecantPairs
from .pytree import PyTree, tree_flatten, tree_leaves
from .status import Status, describe_status

__all__ = ["Diagnostics", "Hypergradient", "SolveReport", "State"]


@dataclass(frozen=True)
class SolveReport:
    """How a solve ended, task by task.

    Attributes:
        status: One `Status` per task.
        residual: Inner: ‖∂_z G‖, absolute. Linear: relative to ‖∂_z f‖. ``[tasks]``, float64.
        steps: Steps taken, ``[tasks]``.
        curvature: Linear only: smallest and largest Rayleigh quotient met, ``[tasks, 2]``; NaN
            where none was.
        damping: Linear only: damping that the solver itself added, ``[tasks]``; None where it never
            adds any.
    """

    status: tuple[Status, ...]
    residual: Tensor
    steps: Tensor
    curvature: Tensor | None = None
    damping: Tensor | None = None
    _lanczos: Callable[[], Tensor] | None = field(default=None, repr=False)

    @cached_property
    def ritz(self) -> Tensor | None:
        """Smallest and largest Ritz value ``[tasks, 2]``, float64; None for solvers without.

        They lie inside the spectrum of the inner Hessian and approach its ends from within, so that
        their ratio is a lower bound on the condition number. NaN where no step was taken.
        """
        return None if self._lanczos is None else ritz_values(self._lanczos())


@dataclass(frozen=True)
class Diagnostics:
    """What there is to know about a hypergradient beside its value.

    Attributes:
        inner: How the inner solve ended.
        linear: How the adjoint solve ended; None for methods without one.
        counts: Evaluations summed over tasks: ``gradients`` of the inner objective, curvature
            ``products``, objective ``values``.
        unused: Names of outer leaves on which nothing depends; their gradient is zero.
        failed: Positions of tasks that were left out of the mean.
        inner_distance: ‖∂_z G‖ / L over the size of the inner variable, ``[tasks]``, with L the
            largest curvature met: the inner solution is at least about so far. NaN where no
            curvature was met, None for methods that meet none.
        derivative_residual: Unrolled only: ‖(∂z_T/∂z_0)ᵀ ∂_z f‖ / ‖∂_z f‖ over the steps that were
            differentiated, ``[tasks]``. It falls to 0 as the derivative forgets where the steps
            began, which is when unrolling agrees with the implicit hypergradient; near 1 or above,
            the steps end far from a minimum, or too few were differentiated.
        error_estimate: ‖gradient − exact‖ / ‖gradient‖ of each task, estimated, ``[tasks]``; inf
            where no estimate could be made. None unless the method was asked, ``error_estimate``.
        inner_error: The part of the estimate that comes from the inner solve; more inner steps cure
            it.
        linear_error: The part that comes from the adjoint solve; a lower ``rtol`` cures it.
        gradient_norm: ‖gradient‖ of each task, to which the errors are relative.
        error_status: How the estimate's own solves ended; MAX_STEPS means that it may be low.
        error_bound: The same, certified from the problem's constants; None unless asked.
        engine: ``"batched"`` or ``"loop"`` for each group of tasks of one shape.
    """

    inner: SolveReport
    linear: SolveReport | None
    counts: dict[str, int]
    unused: tuple[str, ...] = ()
    failed: tuple[int, ...] = ()
    inner_distance: Tensor | None = None
    derivative_residual: Tensor | None = None
    error_estimate: Tensor | None = None
    inner_error: Tensor | None = None
    linear_error: Tensor | None = None
    gradient_norm: Tensor | None = None
    error_status: tuple[Status, ...] = ()
    error_bound: Tensor | None = None
    engine: tuple[Engine, ...] = ()


@dataclass(frozen=True)
class State:
    """What one call leaves for the next: warm starts. Detached; solvers hold none themselves.

    Attributes:
        inner: Inner points, one ``[tasks, n]`` for each group of equal shapes.
        adjoint: Adjoints likewise, None for methods without one.
        pairs: What the linear solver learned of the Hessian, where its preconditioner recycles.
    """

    inner: tuple[Tensor, ...]
    adjoint: tuple[Tensor | None, ...]
    pairs: tuple[SecantPairs | None, ...] = ()


@dataclass(frozen=True)
class Hypergradient:
    """A hypergradient and how far it can be trusted.

    Attributes:
        gradient: Pytree like ``outer``: the weighted mean over usable tasks, or, with
            ``reduction="none"``, per task along dimension 0.
        inner: The inner solution, like the task it was computed for: a pytree for a `Task`, stacked
            for a `TaskBatch`, a list of pytrees for a list.
        outer_value: f at the inner solution, ``[tasks]``.
        inner_value: G at the inner solution, ``[tasks]``; NaN for equilibria.
        metrics: The problem's own, ``[tasks]`` each.
        status: The worst `Status` of each task.
        state: Warm starts for the next call.
        diagnostics: Residuals, steps, curvature and counts.
    """

    gradient: PyTree
    inner: PyTree
    outer_value: Tensor
    inner_value: Tensor
    metrics: dict[str, Tensor]
    status: tuple[Status, ...]
    state: State
    diagnostics: Diagnostics
    _spec: object = field(repr=False, default=None)

    @property
    def ok(self) -> bool:
        """Every task is CONVERGED, or BUDGET where no tolerance was set."""
        return all(status.ok for status in self.status)

    def set_grad(self, outer: PyTree) -> None:
        """Write the gradient into ``.grad`` of the leaves of ``outer``.

        Raises:
            ValueError: ``outer`` has another structure or shapes than the gradient.
        """
        write_gradient(
            outer, self.gradient, self._spec, "; pass the same one, and reduction='mean'"
        )

    def summary(self) -> str:
        """The statuses in words: how many tasks, what was found, what to do."""
        return describe_status(self.status)

    def __repr__(self) -> str:
        worst = max(self.status)
        residual = self.diagnostics.inner.residual.max().item()
        linear = self.diagnostics.linear
        adjoint = "" if linear is None else f", linear residual {linear.residual.max().item():.1e}"
        error = self.diagnostics.error_estimate
        if error is not None:
            adjoint += f", estimated error {error.max().item():.1e}"
        return (
            f"Hypergradient({len(self.status)} task{'s' * (len(self.status) != 1)}, worst status "
            f"{worst.name}, inner residual {residual:.1e}{adjoint})"
        )


def write_gradient(outer: PyTree, gradient: PyTree, spec: object, cure: str) -> None:
    """Write a gradient into ``.grad`` of the leaves of ``outer``.

    Args:
        outer: The outer variable.
        gradient: A pytree like it.
        spec: Structure of the variable that the gradient was taken for.
        cure: What to do where ``outer`` differs from that.

    Raises:
        ValueError: ``outer`` has another structure or shapes than the gradient.
    """
    leaves, mine = tree_flatten(outer)
    gradients = tree_leaves(gradient)
    if mine != spec or any(a.shape != b.shape for a, b in zip(leaves, gradients, strict=True)):
        raise ValueError(
            "`outer` differs in structure or shapes from the variable this hypergradient was taken "
            f"for{cure}"
        )
    for leaf, one in zip(leaves, gradients, strict=True):
        leaf.grad = one.detach().clone()


def ritz_values(lanczos: Tensor) -> Tensor:
    """The extreme eigenvalues of tridiagonal matrices.

    Args:
        lanczos: Diagonals and off-diagonals ``[tasks, steps, 2]``, NaN after a task's last step.

    Returns:
        ``[tasks, 2]``, float64; NaN for a task without steps.
    """
    table = lanczos.detach().cpu().double()
    diagonal, off = table.unbind(-1)
    known = diagonal.isfinite()
    # What is missing repeats the first entry, uncoupled: that is a Rayleigh quotient, inside.
    diagonal = torch.where(known, diagonal, diagonal[:, :1])
    coupled = known[:, :-1] & known[:, 1:]
    off = torch.where(coupled, off[:, :-1], 0.0)
    matrix = torch.diag_embed(diagonal) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    usable = matrix.isfinite().all(-1).all(-1)
    values = torch.linalg.eigvalsh(torch.where(usable[:, None, None], matrix, 0.0))
    ends = torch.stack([values.amin(-1), values.amax(-1)], -1)
    return torch.where(usable.unsqueeze(-1), ends, float("nan"))
