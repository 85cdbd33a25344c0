r"""Limited-memory BFGS (Liu and Nocedal, 1989), batched over tasks.

The direction is $-B\,\partial_z G$ with $B$ built from the last ``memory`` pairs $s, y$ (Nocedal
and Wright, 2006, Algorithm 7.4, in the compact form); the step length is found by backtracking
until Armijo's condition holds. Pairs with $s^\top y \le 0$ are skipped, so that $B$ stays positive
definite. Every task has its own pairs, step length and stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.flat import FlatProblem
from bilevel.inner_solver import Carry, InnerSolver
from bilevel.operator import SecantPairs
from bilevel.pytree import PyTree
from bilevel.registry import INNER_SOLVERS
from bilevel.rows import Choice, column, dot, norm

from ..preconditioner.secant_inverse import SecantInverse
from .line_search import backtrack

__all__ = ["LBFGS"]


@INNER_SOLVERS.register("lbfgs")
@dataclass(frozen=True)
class LBFGS(InnerSolver):
    """L-BFGS with backtracking, for smooth deterministic inner objectives.

    Args:
        max_steps: The most steps.
        tol: Stop a task once ‖∂_z G‖ ≤ tol, looked at after every step; None: take all steps.
        memory: Number of pairs kept, for each task.

    Raises:
        ValueError: A setting is out of range.
    """

    differentiable: ClassVar[bool] = False
    needs_objective: ClassVar[bool] = True
    check_every: ClassVar[int] = 1
    max_steps: int = 200
    tol: float | None = 1e-6
    memory: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 1:
            raise ValueError(f"`memory` is {self.memory}; keep at least one pair")

    def _init(self, flat: FlatProblem, z: Tensor) -> PyTree:
        value, gradient = flat.value_and_gradient(z)
        return {
            "value": value.double(),
            "gradient": gradient,
            "inverse": SecantInverse(self.memory, z).scaled(1.0 / norm(gradient).clamp_min(1.0)),
            "stuck": torch.zeros(len(z), dtype=torch.bool, device=z.device),
        }

    def _residual(self, flat: FlatProblem, z: Tensor, state: PyTree) -> Tensor:
        return norm(state["gradient"])

    def pairs(self, carry: Carry) -> SecantPairs:
        """The pairs kept, from which `SecantPreconditioner` builds an inverse (SHINE)."""
        inverse: SecantInverse = carry.state["inverse"]
        return inverse.pairs()

    def _step(self, flat: FlatProblem, z: Tensor, state: PyTree) -> tuple[Tensor, PyTree]:
        gradient, inverse = state["gradient"], state["inverse"]
        direction = -inverse(gradient)
        slope = dot(gradient, direction)
        # Where rounding made it no descent direction, fall back to the gradient.
        downhill = Choice(slope < 0)
        if not downhill.everyone:
            direction = downhill(direction, -column(inverse.scale, z) * gradient)
            slope = dot(gradient, direction)
        # Tasks that are done, or have nowhere to go, must not keep the others searching.
        size = norm(gradient)
        rest = state["stuck"] | (size <= (self.tol or 0.0)) | ~size.isfinite()
        new_z, value, new_gradient, found = backtrack(
            flat, z, state["value"], gradient, direction, slope, rest
        )
        stuck = rest | (~found & inverse.empty)
        s, y = new_z - z, new_gradient - gradient
        # A NaN fails the comparison and is skipped like negative curvature.
        keep = dot(s, y) > torch.finfo(z.dtype).eps * norm(s) * norm(y)
        inverse.add(s, y, keep)
        # Without a step length the same search would fail for ever: start over from the gradient.
        inverse.forget(~found)
        return new_z, {
            "value": value,
            "gradient": new_gradient,
            "inverse": inverse,
            "stuck": stuck,
        }
