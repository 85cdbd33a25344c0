r"""An inner solution that the user knows: $z^\star(x)$ as a function.

Its stationarity is checked, so that a wrong formula is reported and not trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bilevel.errors import ObjectiveError
from bilevel.flat import FlatProblem
from bilevel.inner_solver import Carry, InnerReport, InnerSolver
from bilevel.kernels import Precision
from bilevel.pytree import PyTree, tree_leaves
from bilevel.registry import INNER_SOLVERS

__all__ = ["ClosedForm"]


@INNER_SOLVERS.register("closed-form")
@dataclass(frozen=True)
class ClosedForm(InnerSolver):
    """The inner solution by formula; under `Unrolled` the formula itself is differentiated.

    Args:
        fn: ``fn(outer, batch)`` returns the minimiser of the *regularised* inner objective for one
            task, a pytree like the inner variable.
        tol: Absolute tolerance in ‖∂_z G‖ of the check. None: √ε · max(‖∂_z G(0)‖, 1), with ε of
            the inner dtype.

    A solution beyond the tolerance is MAX_STEPS, with its residual.
    """

    fn: Callable[[PyTree, PyTree], PyTree]
    tol: float | None = None
    max_steps: int = field(default=1, init=False, repr=False)

    def _init(self, flat: FlatProblem, z: Tensor) -> PyTree:
        return ()

    def begin(self, flat: FlatProblem, z: Tensor) -> Carry:
        """The carry before the only step; every task takes it."""
        steps = torch.zeros(flat.count, dtype=torch.int64, device=flat.device)
        return Carry(z, (), torch.ones(flat.count, dtype=torch.bool, device=flat.device), steps)

    def require_precision(
        self, precision: Precision, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Raise unless the precision is full: there are no steps to round.

        Raises:
            ValueError: It is not.
        """
        if precision != "full":
            raise ValueError(
                f"`precision` is {precision!r}, that of the inner solver's steps, but ClosedForm "
                "takes none; pass precision='full'"
            )

    def _step(self, flat: FlatProblem, z: Tensor, state: PyTree) -> tuple[Tensor, PyTree]:
        tree = flat.stacking(
            self.fn,
            (flat.outer.tree, flat.batch),
            (flat.outer.per_task, True),
            flat.count,
            "ClosedForm's fn",
        )
        shapes = [tuple(x.shape[1:]) for x in tree_leaves(flat.vector.matched(tree))]
        expected = [tuple(shape) for shape in flat.vector.shapes]
        if shapes != expected:
            raise ObjectiveError(
                f"ClosedForm's fn returned leaves of shapes {shapes} but the inner variable has "
                f"{expected}; return a pytree like `initial_inner`"
            )
        solution = flat.vector.flatten(tree, batch_dims=1)
        if self.tol is None:
            # The scale of the problem's gradients, against which rounding is judged.
            plain = flat.with_outer(flat.outer.detached(), differentiable=False)
            plain.gradient(torch.zeros_like(z))  # noted as the first residual
        return solution, ()

    def report(self, carry: Carry, residual: Tensor, first_residual: Tensor | None) -> InnerReport:
        """Judge the formula by its stationarity."""
        if self.tol is not None:
            return super().report(carry, residual, None)
        scale = torch.ones_like(residual) if first_residual is None else first_residual
        limit = torch.finfo(carry.z.dtype).eps ** 0.5 * scale.clamp_min(1.0)
        judged = ClosedForm(self.fn, tol=1.0).report(carry, residual / limit, None)
        return replace(judged, residual=residual)
