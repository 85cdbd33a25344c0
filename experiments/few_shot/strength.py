r"""The least λ that is worth learning, measured at each meta-step.

An implicit gradient prices the inner problem as though it were solved. Few inner steps end where
the gradient they leave, $\|\nabla G\|$, outweighs the pull of a small λ, $\lambda \|\phi -
\theta\|$. There λ is not felt by the steps, and its implicit gradient asks for ever less of it,
until the adjoint systems are hopeless. The two balance at

$$\lambda = \frac{\|\nabla G(\phi)\|}{\|\phi - \theta\|}.$$
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel import Hypergradient

__all__ = ["balancing_strength"]


def balancing_strength(result: Hypergradient) -> Tensor:
    """The λ at which pull and gradient left balance, 0-d: the median over the usable tasks.

    0 where no task moved away from θ.
    """
    usable = [i for i, status in enumerate(result.status) if status.usable]
    diagnostics = result.diagnostics
    assert diagnostics.center_distance is not None  # λ is the strength of a regularizer
    distance = diagnostics.center_distance[usable].double()
    left = diagnostics.inner.residual[usable].to(distance)
    # A task that did not move says nothing about λ.
    quotient = torch.where(distance > 0, left / distance, float("nan"))
    return quotient.nanmedian().nan_to_num(0.0)
