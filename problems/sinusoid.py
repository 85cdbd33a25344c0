r"""Regression of sine waves from a few points (Finn, Abbeel and Levine, 2017, section 5.1).

A task is a wave $y = a \sin(u - b)$ with amplitude $a \sim U[0.1, 5]$ and phase
$b \sim U[0, \pi]$, seen at points $u \sim U[-5, 5]$.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel.pytree import PyTree
from bilevel.registry import PROBLEMS
from bilevel.solvers import LBFGS
from bilevel.stateless import stateless
from bilevel.task import TaskBatch

from .adaptation import Adaptation, Batch, Learned
from .example import Example
from .networks import mlp
from .seeding import generator

__all__ = ["Sinusoid", "SinusoidSampler"]


@PROBLEMS.register("sinusoid")
class Sinusoid(Adaptation):
    """Fit a sine wave after adapting a network to a few of its points, by iMAML.

    The inner variable is the dict of adapted parameters φ. The outer variable is θ, a dict like
    it, or ``{"theta": θ, "log_strength": …}`` where the strength is learned; `initial_outer`
    makes it. Batches are (u ``[points, 1]``, y ``[points, 1]``), as `SinusoidSampler` draws them.

    Args:
        net: ``net(params, u)`` returns ``[points, 1]``; `network` makes one.
        strength: λ ≥ 0 of the proximal regularizer; its first value, > 0, where it is learned.
        learn_strength: Make λ a part of the outer variable, by its logarithm: ``"scalar"``,
            ``"layer"`` or ``"parameter"``.

    Raises:
        ValueError: The strength is out of range.

    Example:
        >>> params, net = Sinusoid.network()
        >>> sum(p.numel() for p in params.values())
        1761
        >>> Sinusoid(net)
        Sinusoid(strength=2.0)
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        strength: float = 2.0,
        learn_strength: Learned | None = None,
    ) -> None:
        super().__init__(net, strength, learn_strength)

    def loss(self, prediction: Tensor, outer: PyTree, batch: Batch) -> Tensor:
        """The mean squared error."""
        return F.mse_loss(prediction, batch[1])

    def scores(self, prediction: Tensor, batch: Batch) -> dict[str, Tensor]:
        """``mse``, the mean squared error on the query batch."""
        return {"mse": F.mse_loss(prediction, batch[1])}

    @staticmethod
    def network(
        width: int = 40,
        activation: Callable[[], nn.Module] = nn.ReLU,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[dict[str, Tensor], Callable[..., Tensor]]:
        """Parameters and function of the network 1-width-width-1.

        Args:
            width: Width of both hidden layers.
            activation: Makes the activation; ``nn.Tanh`` is a smooth one.
            seed: Seed of the initial values; the global generator is not touched.
            dtype: Of the parameters.
        """
        return stateless(mlp((1, width, width, 1), activation=activation, seed=seed).to(dtype))

    @classmethod
    def example(
        cls, *, tasks: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> Example:
        """A small instance with a smooth activation; see `Example`."""
        params, net = cls.network(8, nn.Tanh, seed, dtype)
        # Small outputs and a strong regularizer: positive definite at the start already.
        params = {**params, "4.weight": 0.3 * params["4.weight"]}
        sampler = SinusoidSampler(
            10, 10, 1 if tasks is None else tasks, seed, dtype, amplitudes=(0.5, 1.5)
        )
        batch = sampler(0)
        return Example(
            cls(net, strength=15.0),
            params,
            batch.unstack()[0] if tasks is None else batch,
            LBFGS(max_steps=500, tol=1e-11 if dtype == torch.float64 else 3e-6),
            lipschitz=26.0,
            mu=4.0,
            note="sine waves of different amplitudes, network 1-8-8-1 with tanh",
        )


@dataclass(frozen=True)
class SinusoidSampler:
    """Draws stacks of sine waves; ``sampler(step)`` depends on (seed, step) alone.

    Args:
        shots: Support points of each task.
        queries: Query points.
        tasks: Tasks per call.
        seed: Seed of the sequence.
        dtype: Of the data.
        amplitudes: The interval that amplitudes are drawn from.
        phases: The interval that phases are drawn from.

    Raises:
        ValueError: A count is not positive.

    Example:
        >>> SinusoidSampler(shots=5, tasks=3)(step=0).inner_batch[0].shape
        torch.Size([3, 5, 1])
    """

    shots: int = 10
    queries: int = 10
    tasks: int = 25
    seed: int = 0
    dtype: torch.dtype = torch.float32
    amplitudes: tuple[float, float] = (0.1, 5.0)
    phases: tuple[float, float] = (0.0, math.pi)

    def __post_init__(self) -> None:
        for name in ("shots", "queries", "tasks"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1")

    def __call__(self, step: int) -> TaskBatch:
        """The tasks of one step.

        Args:
            step: Number of the step, ≥ 0.

        Returns:
            Tasks with ``inner_batch`` = (u, y), both ``[tasks, shots, 1]``, ``outer_batch``
            likewise with ``queries``, and ``keys`` (seed, step, position).

        Raises:
            ValueError: ``step`` is negative.
        """
        if step < 0:
            raise ValueError(f"`step` is {step}; steps count from 0")
        random = generator(self.seed, step, "sinusoid")

        def uniform(low: float, high: float, points: int) -> Tensor:
            draws = torch.rand(self.tasks, points, 1, generator=random, dtype=torch.float64)
            return low + (high - low) * draws

        amplitude, phase = uniform(*self.amplitudes, 1), uniform(*self.phases, 1)

        def draw(points: int) -> Batch:
            u = uniform(-5.0, 5.0, points)
            return u.to(self.dtype), (amplitude * (u - phase).sin()).to(self.dtype)

        return TaskBatch(
            draw(self.shots),
            draw(self.queries),
            keys=tuple((self.seed, step, position) for position in range(self.tasks)),
        )
