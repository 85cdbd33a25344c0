r"""Gradient descent, with Polyak or Nesterov momentum, batched over tasks.

$$m \leftarrow \beta m + \partial_z G(z),\qquad z \leftarrow z - \eta m$$

With Nesterov momentum (Nesterov, 1983) the step is
$z \leftarrow z - \eta(\partial_z G(z) + \beta m)$, the form of Sutskever et al. (2013, eqs. 3-4)
as `torch.optim.SGD` writes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.flat import FlatProblem
from bilevel.inner_solver import InnerSolver, check_rate
from bilevel.pytree import PyTree
from bilevel.registry import INNER_SOLVERS

__all__ = ["GradientDescent"]


@INNER_SOLVERS.register("gradient-descent")
@dataclass(frozen=True)
class GradientDescent(InnerSolver):
    """Gradient descent on the regularised inner objective.

    Args:
        lr: Learning rate η > 0; stable for η < 2/L without momentum.
        max_steps: The most steps; all are taken where ``tol`` is None.
        momentum: β in [0, 1).
        tol: Stop a task once ‖∂_z G‖ ≤ tol, looked at every 10 steps; None: take all steps.
        nesterov: Nesterov's momentum instead of Polyak's.

    Raises:
        ValueError: A setting is out of range.
    """

    lr: float
    max_steps: int = 100
    momentum: float = 0.0
    tol: float | None = None
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rate(self.lr)
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"`momentum` is {self.momentum}; it lies in [0, 1)")
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("`nesterov` needs `momentum` > 0, such as momentum=0.9")

    def _init(self, flat: FlatProblem, z: Tensor) -> PyTree:
        return () if self.momentum == 0.0 else (torch.zeros_like(z),)

    def _step(self, flat: FlatProblem, z: Tensor, state: PyTree) -> tuple[Tensor, PyTree]:
        gradient = flat.gradient(z)
        if self.momentum == 0.0:
            return z - self.lr * gradient, ()
        buffer = self.momentum * state[0] + gradient
        direction = gradient + self.momentum * buffer if self.nesterov else buffer
        return z - self.lr * direction, (buffer,)
