r"""The implicit hypergradient with any linear solver.

$$\frac{dF}{dx} = \partial_x f - (\partial_x \partial_z G)^\top v,
  \qquad (\partial^2_{zz} G)\, v = \partial_z f$$
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bilevel.linear_solver import LinearSolver
from bilevel.method import ImplicitMethod
from bilevel.registry import METHODS

__all__ = ["Implicit"]


@METHODS.register("implicit")
@dataclass(frozen=True)
class Implicit(ImplicitMethod):
    """Implicit differentiation with the linear solver of your choice.

    Args:
        linear_solver: Solves the adjoint system.
        damping: Added to the matrix, ≥ 0.

    Raises:
        ValueError: ``linear_solver`` is no linear solver.
    """

    linear_solver: LinearSolver

    def __post_init__(self) -> None:
        if not isinstance(self.linear_solver, LinearSolver):
            raise ValueError(
                f"`linear_solver` is {self.linear_solver!r}; pass an instance such as CG()"
            )
        super().__post_init__()

    def _linear_solver(self) -> LinearSolver:
        return self.linear_solver

    def toward(self, rtol: float, most: int) -> Implicit:
        """The same method, its linear solver asked for another relative residual."""
        return replace(self, linear_solver=self.linear_solver.toward(rtol, most))
