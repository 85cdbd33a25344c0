"""Few-shot classification by iMAML (Rajeswaran, Finn, Kakade and Levine, 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel.pytree import PyTree
from bilevel.registry import PROBLEMS
from bilevel.solvers import LBFGS
from bilevel.stateless import stateless
from bilevel.task import Task

from .adaptation import Adaptation, Batch
from .example import Example
from .networks import conv_strided
from .seeding import generator

__all__ = ["FewShot"]


@PROBLEMS.register("few-shot")
class FewShot(Adaptation):
    """Classify query images after adapting a network to a few support images.

    The inner variable is the dict of adapted parameters φ. The outer variable is θ, or
    ``{"theta": θ, "log_strength": …}`` where the strength is learned; see `Adaptation`. Batches are
    (images ``[batch, channels, height, width]``, labels ``[batch]`` int64). An outer batch may hold
    the support images as a third entry: then the network is called as ``net(params, images,
    reference)``, and its batch norm takes the statistics of the reference, so that no prediction
    depends on the other query images.

    Args:
        net: ``net(params, images)`` returns logits ``[batch, ways]``.
        strength: λ ≥ 0 of the proximal regularizer; its first value, > 0, where it is learned.
        learn_strength: Make λ a part of the outer variable, by its logarithm: ``"scalar"``,
            ``"layer"`` or ``"parameter"``.
        adapted: Names of the parameters that are adapted; None: all.

    Raises:
        ValueError: The strength is out of range.

    Example:
        >>> from bilevel import stateless
        >>> params, net = stateless(conv_strided(ways=5))
        >>> FewShot(net, strength=2.0)
        FewShot(strength=2.0)
    """

    def predict(self, inner: dict[str, Tensor], outer: PyTree, batch: Batch) -> Tensor:
        """The logits ``[batch, ways]``."""
        images, _, *reference = batch
        logits: Tensor = self.net(self.parameters(inner, outer), images, *reference)
        return logits

    def loss(self, prediction: Tensor, outer: PyTree, batch: Batch) -> Tensor:
        """The mean cross entropy."""
        return F.cross_entropy(prediction, batch[1])

    def scores(self, prediction: Tensor, batch: Batch) -> dict[str, Tensor]:
        """``accuracy`` on the query batch."""
        return {"accuracy": (prediction.argmax(-1) == batch[1]).to(prediction.dtype).mean()}

    @classmethod
    def example(
        cls, *, tasks: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> Example:
        """A small instance with batch norm and a smooth activation; see `Example`."""
        ways, size = 3, 6
        module = conv_strided(
            ways, channels=2, size=size, blocks=2, activation=nn.Tanh, init="imaml", seed=seed
        ).to(dtype)
        params, net = stateless(module)
        # Batch norm divides by the size of the filters, and curvature with it; together with small
        # logits and a strong regularizer it is positive definite at the start already.
        factors = {"0.weight": 2.0, "3.weight": 2.0, "7.weight": 0.2}
        params = {name: factors.get(name, 1.0) * p for name, p in params.items()}
        count = 1 if tasks is None else tasks
        data = [_noisy_patterns(ways, size, seed, i, dtype) for i in range(count)]
        return Example(
            cls(net, strength=3.0),
            params,
            data[0] if tasks is None else Task.stack(data),
            LBFGS(max_steps=500, tol=1e-11 if dtype == torch.float64 else 3e-6),
            lipschitz=5.5,
            mu=1.0,
            note=f"{ways}-way classification of noisy {size}×{size} patterns, tanh, batch norm",
        )


def _noisy_patterns(ways: int, size: int, seed: int, position: int, dtype: torch.dtype) -> Task:
    """Each class is a random pattern; task i adds more noise than task i − 1."""
    random = generator(seed, position, "few-shot")
    patterns = torch.rand(ways, 1, 1, size, size, generator=random, dtype=torch.float64)

    def draw(shots: int) -> Batch:
        noise = torch.rand(ways, shots, 1, size, size, generator=random, dtype=torch.float64)
        share = 0.3 + 0.5 * position / (position + 2)
        images = ((1 - share) * patterns + share * noise).flatten(0, 1).to(dtype)
        return images, torch.arange(ways).repeat_interleave(shots)

    return Task(draw(2), draw(3), key=position)
