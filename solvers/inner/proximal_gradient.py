r"""Proximal gradient descent (forward-backward splitting; Combettes and Wajs, 2005), batched.

A gradient step on the inner objective $g$ alone, then the regularizer's exact minimiser near it:

$$z \leftarrow \frac{z - \eta\, \partial_z g(z) + \eta\lambda\, \mathrm{center}}{1 + \eta\lambda}$$

Its fixed points are the stationary points of $g + r$. The rate η has to suit $g$ alone: gradient
descent on the sum needs η < 2 / (L + λ), and so a new rate whenever λ changes or is learned.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bilevel.errors import StructureError
from bilevel.flat import FlatProblem
from bilevel.inner_solver import InnerSolver, check_rate
from bilevel.pytree import PyTree
from bilevel.registry import INNER_SOLVERS

__all__ = ["ProximalGradient"]


@INNER_SOLVERS.register("proximal-gradient")
@dataclass(frozen=True)
class ProximalGradient(InnerSolver):
    """Gradient steps on the inner objective, the proximal regularizer taken exactly.

    Args:
        lr: Learning rate η > 0; stable for η < 2/L with L the curvature of the inner objective
            without the regularizer, whatever the strength.
        max_steps: The most steps; all are taken where ``tol`` is None.
        tol: Stop a task once ‖∂_z G‖ ≤ tol, looked at every 10 steps; None: take all steps.

    Raises:
        ValueError: A setting is out of range.
    """

    lr: float
    max_steps: int = 100
    tol: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rate(self.lr)

    def _init(self, flat: FlatProblem, z: Tensor) -> PyTree:
        if flat.strength is None:
            raise StructureError(
                "ProximalGradient takes the proximal regularizer exactly, but the problem has "
                "none; use GradientDescent, or set a `regularizer`"
            )
        return ()

    def _step(self, flat: FlatProblem, z: Tensor, state: PyTree) -> tuple[Tensor, PyTree]:
        strength, center = flat.strength, flat.center
        assert strength is not None
        gradient = flat.gradient(z) - strength * (z - center)
        pull = self.lr * strength
        return (z - self.lr * gradient + pull * center) / (1.0 + pull), ()
