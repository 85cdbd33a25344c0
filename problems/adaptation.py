r"""A network adapted to each task close to common parameters: iMAML (Rajeswaran et al., 2019).

$$\phi^\star(\theta) = \arg\min_\phi \mathcal{L}(\phi, \text{support}) +
  \tfrac\lambda2 \|\phi - \theta\|^2, \qquad
  F(\theta) = \mathcal{L}(\phi^\star(\theta), \text{query})$$

The strength λ may be learned along with θ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.problem import BilevelProblem
from bilevel.pytree import PyTree
from bilevel.regularizer import Proximal

__all__ = ["Adaptation"]

Batch = tuple[Tensor, Tensor]


class Adaptation(BilevelProblem):
    """Adapt a network's parameters to a task, held near θ; subclasses give the `loss`.

    The inner variable is the dict of adapted parameters φ. The outer variable is θ, a dict like
    it, or ``{"theta": θ, "log_strength": 0-d}`` where the strength is learned; `initial_outer`
    makes it. Batches are (inputs, targets).

    Args:
        net: ``net(params, inputs)``, such as `bilevel.stateless` returns.
        strength: λ ≥ 0 of the proximal regularizer; its first value, > 0, where it is learned.
        learn_strength: Make λ a part of the outer variable, by its logarithm.

    Raises:
        ValueError: The strength is out of range.
    """

    def __init__(
        self, net: Callable[..., Any], strength: float = 0.5, learn_strength: bool = False
    ) -> None:
        self.net = net
        self.strength = strength
        self.learn_strength = learn_strength
        if not learn_strength:
            self.regularizer = Proximal(strength)
            return
        if not 0.0 < strength < math.inf:
            raise ValueError(f"`strength` is {strength}; one that is learned starts finite and > 0")
        self.regularizer = Proximal(
            lambda outer: outer["log_strength"].exp(), center=lambda outer: outer["theta"]
        )

    def __repr__(self) -> str:
        learned = ", learn_strength=True" if self.learn_strength else ""
        return f"{type(self).__name__}(strength={self.strength}{learned})"

    def initial_outer(self, params: dict[str, Tensor]) -> PyTree:
        """The outer variable that starts at ``params``."""
        if not self.learn_strength:
            return params
        example = next(iter(params.values()))
        log_strength = torch.full_like(example.detach().flatten()[0], math.log(self.strength))
        return {"theta": params, "log_strength": log_strength}

    def predict(self, inner: dict[str, Tensor], outer: PyTree, batch: Batch) -> Tensor:
        """The network's output."""
        prediction: Tensor = self.net(inner, batch[0])
        return prediction

    def outer_objective(self, inner: dict[str, Tensor], outer: PyTree, batch: Batch) -> Tensor:
        """The loss on the query batch."""
        return self.loss(self.predict(inner, outer, batch), outer, batch)
