r"""A network adapted to each task close to common parameters: iMAML (Rajeswaran et al., 2019).

$$\phi^\star(\theta) = \arg\min_\phi \mathcal{L}(\phi, \text{support}) +
  \tfrac\lambda2 \|\phi - \theta\|^2, \qquad
  F(\theta) = \mathcal{L}(\phi^\star(\theta), \text{query})$$

The strength λ may be learned along with θ, and only some of the parameters may be adapted: with the
last layer alone this is ANIL (Raghu et al., 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from bilevel.problem import BilevelProblem
from bilevel.pytree import PyTree, tree_map
from bilevel.regularizer import Proximal

__all__ = ["Adaptation", "Learned"]

Batch = tuple[Tensor, ...]

Learned: TypeAlias = Literal["scalar", "layer", "parameter"]
"""One strength for all parameters, one for each layer, or one for each parameter."""


class Adaptation(BilevelProblem):
    """Adapt a network's parameters to a task, held near θ; subclasses give the `loss`.

    The inner variable is the dict of adapted parameters φ. The outer variable is θ, the dict of all
    parameters, or ``{"theta": θ, "log_strength": …}`` where the strength is learned;
    `initial_outer` makes it. Batches are (inputs, targets).

    Args:
        net: ``net(params, inputs)``, such as `bilevel.stateless` returns.
        strength: λ ≥ 0 of the proximal regularizer; its first value, > 0, where it is learned.
        learn_strength: Make λ a part of the outer variable, by its logarithm: ``"scalar"``, one
            0-d tensor; ``"layer"``, a dict of them by layer; ``"parameter"``, a dict of tensors
            like θ. None: λ is fixed.
        adapted: Names of the parameters that are adapted; the others stay at θ in every task. None:
            all.

    Raises:
        ValueError: The strength is out of range, or ``learn_strength`` or ``adapted`` names nothing
            known.
    """

    def __init__(
        self,
        net: Callable[..., Any],
        strength: float = 0.5,
        learn_strength: Learned | None = None,
        adapted: Collection[str] | None = None,
    ) -> None:
        self.net = net
        self.strength = strength
        self.learn_strength = learn_strength
        self.adapted = None if adapted is None else tuple(adapted)
        if adapted is not None and not self.adapted:
            raise ValueError("`adapted` is empty; name at least one parameter, or pass None")
        if learn_strength is None:
            self.regularizer = Proximal(strength, None if adapted is None else self._adapted)
            return
        if learn_strength not in get_args(Learned):
            known = ", ".join(repr(kind) for kind in get_args(Learned))
            raise ValueError(
                f"`learn_strength` is {learn_strength!r}; pass one of {known}, or None"
            )
        if not 0.0 < strength < math.inf:
            raise ValueError(f"`strength` is {strength}; one that is learned starts finite and > 0")
        self.regularizer = Proximal(
            lambda outer: self._strength(outer["log_strength"], self._adapted(outer["theta"])),
            center=lambda outer: self._adapted(outer["theta"]),
        )

    def __repr__(self) -> str:
        learned = self.learn_strength
        more = "" if learned is None else f", learn_strength='{learned}'"
        if self.adapted is not None:
            more += f", adapted={list(self.adapted)}"
        return f"{type(self).__name__}(strength={self.strength}{more})"

    def initial_outer(self, params: dict[str, Tensor]) -> PyTree:
        """The outer variable that starts at ``params``.

        Raises:
            ValueError: ``adapted`` names a parameter that is not there.
        """
        chosen = params if self.adapted is None else self._adapted(params)
        if self.learn_strength is None:
            return params

        def constant(like: Tensor) -> Tensor:
            return torch.full_like(like.detach(), math.log(self.strength))

        log_strength: PyTree = {name: constant(value) for name, value in chosen.items()}
        if self.learn_strength != "parameter":
            scalars = {_layer(name): value.flatten()[0] for name, value in log_strength.items()}
            scalars = {name: value.clone() for name, value in scalars.items()}
            scalar = next(iter(scalars.values()))
            log_strength = scalar if self.learn_strength == "scalar" else scalars
        return {"theta": params, "log_strength": log_strength}

    def parameters(self, inner: dict[str, Tensor], outer: PyTree) -> dict[str, Tensor]:
        """All parameters of the network adapted to a task: φ, and θ where nothing is adapted."""
        if self.adapted is None:
            return inner
        theta = outer if self.learn_strength is None else outer["theta"]
        return {**theta, **inner}

    def predict(self, inner: dict[str, Tensor], outer: PyTree, batch: Batch) -> Tensor:
        """The network's output."""
        prediction: Tensor = self.net(self.parameters(inner, outer), batch[0])
        return prediction

    def outer_objective(self, inner: dict[str, Tensor], outer: PyTree, batch: Batch) -> Tensor:
        """The loss on the query batch."""
        return self.loss(self.predict(inner, outer, batch), outer, batch)

    def evaluate(
        self, inner: dict[str, Tensor], outer: PyTree, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss on the query batch and `scores`, from one prediction."""
        if not self.shares_evaluation:
            return super().evaluate(inner, outer, batch)
        prediction = self.predict(inner, outer, batch)
        return self.loss(prediction, outer, batch), self.scores(prediction.detach(), batch)

    def metrics(self, inner: dict[str, Tensor], outer: PyTree, batch: Batch) -> dict[str, Tensor]:
        """`scores` of the prediction on the query batch."""
        return self.scores(self.predict(inner, outer, batch), batch)

    def scores(self, prediction: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Quantities to report of a prediction, 0-d tensors by name."""
        return {}

    def _adapted(self, theta: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.adapted is None:
            return theta
        unknown = [name for name in self.adapted if name not in theta]
        if unknown:
            raise ValueError(f"`adapted` names '{unknown[0]}'; known: {', '.join(theta)}")
        return {name: theta[name] for name in self.adapted}

    def _strength(self, log_strength: PyTree, like: dict[str, Tensor]) -> PyTree:
        strength = tree_map(torch.exp, log_strength)
        if self.learn_strength == "layer":
            return {name: strength[_layer(name)] for name in like}
        return strength


def _layer(name: str) -> str:
    """The layer of a parameter: ``"0"`` of ``"0.weight"``."""
    return name.rpartition(".")[0] or name
