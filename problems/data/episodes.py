"""Few-shot episodes: tasks of a few classes, each drawn afresh from a pool.

Drawn on the pool's own device, without a question to it, from a counter-based generator: a number
is a hash of (seed, step) and of its place, so that an episode is the same on every device.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.task import TaskBatch

from .images import ImageClasses

__all__ = ["EpisodeSampler"]


@dataclass(frozen=True)
class EpisodeSampler:
    """Draws stacks of classification tasks; ``sampler(step)`` depends on (seed, step) alone.

    Each task picks `ways` classes without replacement, and of each class `shots` support and
    `queries` query examples that are disjoint. A run that resumes at some step sees the tasks it
    would have seen, on any device.

    Args:
        pool: Classes to draw from; the tasks live on its device.
        ways: Classes per task.
        shots: Support images per class.
        queries: Query images per class.
        tasks: Tasks per call.
        seed: Seed of the sequence of episodes.
        rotations: Turn each class of each task by a random multiple of 90°, support and query
            images alike; customary for Omniglot, where it makes four classes of one.
        reference: Add the support images to each outer batch as a third entry, from which batch
            norm takes its statistics: then no prediction depends on the other query images.

    Raises:
        ValueError: A count is not positive, the pool is too small, or images that shall be turned
            are not square.
    """

    pool: ImageClasses
    ways: int
    shots: int
    queries: int
    tasks: int
    seed: int = 0
    rotations: bool = False
    reference: bool = False

    def __post_init__(self) -> None:
        for name in ("ways", "shots", "queries", "tasks"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1")
        if self.ways > len(self.pool):
            raise ValueError(
                f"`ways` is {self.ways}, but the pool has {len(self.pool)} classes; lower `ways` "
                "or pass a larger pool"
            )
        if self.shots + self.queries > self.pool.examples:
            raise ValueError(
                f"`shots` + `queries` is {self.shots} + {self.queries}, but each class has "
                f"{self.pool.examples} examples; lower one of them"
            )
        height, width = self.pool.images.shape[-2:]
        if self.rotations and height != width:
            raise ValueError(
                f"`rotations` needs square images, but these are {height}×{width}; leave it False"
            )

    def __call__(self, step: int) -> TaskBatch:
        """The tasks of one step.

        Args:
            step: Number of the step, ≥ 0.

        Returns:
            Tasks with ``inner_batch`` = (images ``[tasks, ways·shots, channels, height, width]``
            float32 in [0, 1], labels ``[tasks, ways·shots]`` int64), ``outer_batch`` likewise
            with `queries` in place of `shots`, and ``keys`` (seed, step, position). Images stand
            class by class.

        Raises:
            ValueError: `step` is negative.
        """
        if step < 0:
            raise ValueError(f"`step` is {step}; steps count from 0")
        device = self.pool.images.device
        sizes = (
            self.tasks * len(self.pool),
            self.tasks * self.ways * self.pool.examples,
            self.tasks * self.ways,
        )
        numbers = _numbers(_mix(self.seed, step), sum(sizes), device).split(sizes)
        classes = _draw(numbers[0].view(self.tasks, len(self.pool)), self.ways)
        examples = _draw(
            numbers[1].view(self.tasks, self.ways, self.pool.examples), self.shots + self.queries
        )
        images = self.pool.images[classes.unsqueeze(-1), examples]
        if self.rotations:
            turns = (numbers[2] & 3).view(self.tasks, self.ways, 1, 1, 1, 1)
            turned = [images.rot90(turn, (-2, -1)) for turn in (1, 2, 3)]
            for turn, other in enumerate(turned, start=1):
                images = torch.where(turns == turn, other, images)
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        images = images.to(torch.float32) / scale
        support, query = images.split([self.shots, self.queries], dim=2)
        support, query = support.flatten(1, 2), query.flatten(1, 2)
        reference = (support,) if self.reference else ()
        return TaskBatch(
            inner_batch=(support, self._labels(self.shots, device)),
            outer_batch=(query, self._labels(self.queries, device), *reference),
            keys=tuple((self.seed, step, task) for task in range(self.tasks)),
        )

    def _labels(self, repeats: int, device: torch.device) -> Tensor:
        labels = torch.arange(self.ways, device=device).repeat_interleave(repeats)
        return labels.repeat(self.tasks, 1)


def _draw(numbers: Tensor, count: int) -> Tensor:
    """`count` distinct positions along the last dimension, ``[..., count]``."""
    return numbers.argsort(-1)[..., :count]


def _numbers(key: int, count: int, device: torch.device) -> Tensor:
    """Pseudo-random int64 ``[count]``: splitmix64 (Steele, Lea and Flood, 2014) from ``key`` on.

    Integers wrap around on every device alike.
    """
    x = torch.arange(1, count + 1, device=device) * _signed(0x9E3779B97F4A7C15) + _signed(key)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifted right, zeros moving in: PyTorch's own shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """A 64-bit word as the int64 of the same bits."""
    return word - (1 << 64) if word >= 1 << 63 else word


def _mix(seed: int, step: int) -> int:
    """A 64-bit seed; hashed, so that neighbouring seeds and steps share no stream."""
    return int.from_bytes(hashlib.sha256(f"{seed},{step}".encode()).digest()[:8], "big")
