r"""Gradient descent that lowers a task's rate where a step does not decrease its objective enough.

$$z^+ = z - \eta\, \partial_z G(z) \quad\text{is taken where}\quad
  G(z^+) \le G(z) - 10^{-4}\, \eta\, \|\partial_z G(z)\|^2,$$

Armijo's condition (Armijo, 1966); a task whose step fails it stays where it is, and its rate η is
halved. Each step costs one evaluation, taken or not, and asks the host nothing. Where descent at
the first rate is stable this is gradient descent, step by step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.flat import FlatProblem
from bilevel.inner_solver import InnerSolver, check_rate
from bilevel.pytree import PyTree
from bilevel.registry import INNER_SOLVERS
from bilevel.rows import all_finite, choose, column, dot, norm

__all__ = ["BacktrackingDescent"]

_ARMIJO = 1e-4
_ROUNDING = 8


@INNER_SOLVERS.register("backtracking-descent")
@dataclass(frozen=True)
class BacktrackingDescent(InnerSolver):
    """Gradient descent that cannot diverge: no objective rises by more than rounding.

    Args:
        lr: The first learning rate η > 0 of every task.
        max_steps: The most steps, each of one gradient; all are taken where ``tol`` is None.
        tol: Stop a task once ‖∂_z G‖ ≤ tol, looked at every 10 steps; None: take all steps.

    Raises:
        ValueError: A setting is out of range.
    """

    differentiable: ClassVar[bool] = False
    needs_objective: ClassVar[bool] = True
    lr: float
    max_steps: int = 100
    tol: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rate(self.lr)

    def _init(self, flat: FlatProblem, z: Tensor) -> PyTree:
        value, gradient = flat.value_and_gradient(z)
        return {
            "value": value.double(),
            "gradient": gradient,
            "lr": torch.full_like(value, self.lr, dtype=torch.float64),
        }

    def _residual(self, flat: FlatProblem, z: Tensor, state: PyTree) -> Tensor:
        return norm(state["gradient"])

    def _step(self, flat: FlatProblem, z: Tensor, state: PyTree) -> tuple[Tensor, PyTree]:
        start, slope, lr = state["value"], state["gradient"], state["lr"]
        trial = z - column(lr, z) * slope
        value, gradient = flat.value_and_gradient(trial)
        value = value.double()
        decrease = _ARMIJO * lr * dot(slope, slope)
        noise = _ROUNDING * torch.finfo(z.dtype).eps * start.abs()
        taken = (value <= start - decrease + noise) & all_finite(gradient)
        return choose(taken, trial, z), {
            "value": torch.where(taken, value, start),
            "gradient": choose(taken, gradient, slope),
            "lr": torch.where(taken, lr, 0.5 * lr),
        }
