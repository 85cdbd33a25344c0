"""The abstract inner solver: its loop over steps, with per-task stopping."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import NotDifferentiableError, ObjectiveError, StructureError
from .flat import FlatProblem
from .kernels import Precision
from .operator import SecantPairs
from .pytree import PyTree, tree_map
from .rows import all_finite, choose, full_precision, norm
from .status import Status, marked, residual_status

__all__ = ["InnerReport", "InnerSolver"]

DIVERGED_FACTOR = 1e3
"""A residual that grew by this factor over the first one is a divergence."""


@dataclass(frozen=True)
class InnerReport:
    """How the inner solve ended; all ``[tasks]``.

    Attributes:
        status: `Status` codes, int8.
        residual: ‖∂_z G‖ at the returned point, float64.
        steps: Steps taken, int64.
    """

    status: Tensor
    residual: Tensor
    steps: Tensor


@dataclass(frozen=True)
class Carry:
    """What goes from one inner step to the next."""

    z: Tensor
    state: PyTree
    active: Tensor
    steps: Tensor


class InnerSolver(ABC):
    """Minimises the inner objective of stacked tasks; a frozen dataclass of its settings.

    Authors write `_init` and `_step`; a step is differentiable (built from `FlatProblem.gradient`
    and out-of-place operations), or the class says `differentiable = False`.

    Attributes:
        differentiable: Whether the steps can be differentiated.
        needs_objective: Whether values of the inner objective are needed, which an equilibrium
            lacks.
        check_every: The residual is compared with ``tol`` once in so many steps.
        max_steps: The most steps taken; all are taken where ``tol`` is None.
        tol: Absolute tolerance in ‖∂_z G‖, or None to ask for the budget only.
    """

    differentiable: ClassVar[bool] = True
    needs_objective: ClassVar[bool] = False
    check_every: ClassVar[int] = 10
    max_steps: int
    tol: float | None

    def __post_init__(self) -> None:
        if self.max_steps < 0:
            raise ValueError(f"`max_steps` is {self.max_steps}; it is a number of steps ≥ 0")
        if self.tol is not None and not self.tol > 0:
            raise ValueError(f"`tol` is {self.tol}; pass a tolerance > 0, or None for the budget")

    @abstractmethod
    def _init(self, flat: FlatProblem, z: Tensor) -> PyTree:
        """The solver's state before the first step.

        A pytree of tensors with a leading dimension of tasks; 0-d ones are counters, through which
        nothing is differentiated. A solver that is not differentiable may keep objects of its own.
        """

    @abstractmethod
    def _step(self, flat: FlatProblem, z: Tensor, state: PyTree) -> tuple[Tensor, PyTree]:
        """One step of every task."""

    def _residual(self, flat: FlatProblem, z: Tensor, state: PyTree) -> Tensor:
        """‖∂_z G‖ ``[tasks]`` for the stopping test; override where the state knows it."""
        with full_precision(z.device):
            return norm(flat.plain().gradient(z.detach()))

    # The loop, used by every hypergradient method

    def begin(self, flat: FlatProblem, z: Tensor) -> Carry:
        """The carry before the first step.

        Raises:
            StructureError: The solver needs an inner objective, and the problem has none.
        """
        if self.needs_objective and flat.problem.is_equilibrium:
            raise StructureError(
                f"{type(self).__name__} minimises an inner objective, but this problem is an "
                "equilibrium without one; use GradientDescent, which iterates on its stationarity"
            )
        state = self._init(flat, z)
        steps = torch.zeros(flat.count, dtype=torch.int64, device=flat.device)
        active = torch.ones(flat.count, dtype=torch.bool, device=flat.device)
        if self.tol is not None:
            active = self._residual(flat, z, state) > self.tol
        return Carry(z, state, active, steps)

    def advance(
        self, flat: FlatProblem, carry: Carry, first: int, last: int, *, stop: bool = True
    ) -> Carry:
        """Steps ``first`` to ``last - 1``; tasks within the tolerance stay where they are.

        With ``stop=False`` every task takes every step, whatever its residual.
        """
        stop = stop and self.tol is not None
        if not stop:
            carry = replace(carry, active=torch.ones_like(carry.active))
        # Residuals decide; they are of full precision, whatever that of the steps.
        rounded = flat.stepping()
        for step in range(first, last):
            if stop and step % self.check_every == 0 and not carry.active.any():
                break
            z, state = self._step(rounded.at(step), carry.z, carry.state)
            if stop:
                z = choose(carry.active, z, carry.z)
            active = carry.active
            # Where no task stops, steps are counted once at the end.
            steps = carry.steps + active if stop else carry.steps
            if stop and (step + 1) % self.check_every == 0:
                assert self.tol is not None
                active = active & (self._residual(flat, z, state) > self.tol)
            carry = Carry(z, state, active, steps)
        return carry if stop else replace(carry, steps=carry.steps + max(last - first, 0))

    def solve(self, flat: FlatProblem, z: Tensor | None = None) -> Carry:
        """All steps, without any graph; in the precision that the problem's `kernels` allow.

        Raises:
            ValueError: The steps cannot be taken in that precision.
        """
        flat = flat.plain()
        z = flat.start if z is None else z
        self.require_precision(flat.kernels.precision, flat.vector.dtype, flat.device)
        with torch.no_grad():
            if flat.kernels.precision != "full":
                _note_rounding(flat, z)
            carry = self.begin(flat, z)
            return self.advance(flat, carry, 0, self.max_steps)

    def report(self, carry: Carry, residual: Tensor, first_residual: Tensor | None) -> InnerReport:
        """Judge the returned point by its residual."""
        status = residual_status(residual, self.tol or 0.0, asked=self.tol is not None)
        if first_residual is not None:
            floor = torch.finfo(carry.z.dtype).eps ** 0.5 * (1.0 + norm(carry.z.detach()))
            grew = residual > DIVERGED_FACTOR * first_residual + floor
            grew = grew & (status != Status.CONVERGED) & (status != Status.NON_FINITE)
            status = marked(status, grew, Status.DIVERGED)
        status = marked(status, ~all_finite(carry.z.detach()), Status.NON_FINITE)
        return InnerReport(status, residual, carry.steps)

    def toward(self, tol: float | None) -> InnerSolver:
        """The same solver with another tolerance."""
        return replace(self, tol=tol)  # type: ignore[type-var]  # each subclass is a dataclass

    def pairs(self, carry: Carry) -> SecantPairs | None:
        """What the solver learned of the inner Hessian; None where it learns nothing."""
        return None

    def require_differentiable(self) -> None:
        """Raise unless `_step` can be differentiated.

        Raises:
            NotDifferentiableError: It cannot.
        """
        if not self.differentiable:
            raise NotDifferentiableError(
                f"the steps of {type(self).__name__} cannot be differentiated, so it cannot be "
                "unrolled; use an implicit method such as ImplicitCG, or GradientDescent"
            )

    def require_precision(
        self, precision: Precision, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Raise unless steps in this precision are sound, and are what would be taken.

        Raises:
            ValueError: They are not.
        """
        if precision == "full":
            return
        if self.needs_objective:
            raise ValueError(
                f"`precision` is {precision!r}, but {type(self).__name__} compares values of the "
                "inner objective, which rounding makes alike; use GradientDescent, or pass "
                "precision='full'"
            )
        if dtype != torch.float32:
            name = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"`precision` is {precision!r}, which float32 is rounded to, but the inner "
                f"variable is {name}; pass precision='full', or make the problem of float32"
            )
        if precision == "tf32" and not _has_tf32(device):
            raise ValueError(
                f"`precision` is 'tf32', which {device} does not have; pass precision='full' or "
                "'bf16', or use a CUDA device of compute capability 8.0 or later"
            )


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _note_rounding(flat: FlatProblem, z: Tensor) -> None:
    """Note the first residual, and with it how far a step's gradient is off there.

    Steps that begin at a solution leave it by their rounding, which is no divergence; and a
    rounded gradient may be zero where the true one is not.
    """
    with full_precision(z.device):
        exact = flat.gradient(z)
    try:
        rounded = flat.stepping().gradient(z)
    except RuntimeError as error:
        if not any(word in str(error) for word in ("dtype", "scalar type", "BFloat16")):
            raise
        raise ObjectiveError(
            f"`precision` is {flat.kernels.precision!r}, with which the inner problem cannot be "
            f"evaluated ({str(error).strip().splitlines()[0]}): an operation that autocast leaves "
            "alone met two dtypes; write it as a product with `@`, or pass precision='full'"
        ) from error
    flat.notes["first_residual"] = norm(exact) + norm(rounded - exact)


def check_rate(lr: float | Tensor) -> None:
    """Raise ValueError unless ``lr`` is a learning rate, and no variable to be learned."""
    if isinstance(lr, Tensor) and lr.requires_grad:
        raise ValueError(
            "`lr` is a tensor that requires grad, whose gradient would be lost; pass a number, or "
            "write an inner solver whose step reads the rate from `flat.outer`"
        )
    if not 0.0 < float(lr) < math.inf:
        raise ValueError(f"`lr` is {lr}; a learning rate is finite and > 0")


def detached(carry: Carry) -> Carry:
    """The carry without its graph."""

    def detach(leaf: Any) -> Any:
        return leaf.detach() if isinstance(leaf, Tensor) else leaf

    return replace(carry, z=carry.z.detach(), state=tree_map(detach, carry.state))


def given_solution(z: Tensor, residual: Tensor) -> InnerReport:
    """The report on a solution that the user passed in: no solver ran, nothing was asked."""
    status = residual_status(residual, 0.0, asked=False)
    return InnerReport(status, residual, torch.zeros(len(z), dtype=torch.int64, device=z.device))
