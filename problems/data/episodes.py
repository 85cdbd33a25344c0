"""Few-shot episodes: tasks of a few classes, each drawn afresh from a pool."""

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
            images alike.

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
    rotations: bool = True

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
                f"`rotations` needs square images, but these are {height}×{width}; pass "
                "rotations=False"
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
        # Drawn on the CPU, so that an episode is the same on every device.
        generator = torch.Generator().manual_seed(_mix(self.seed, step))
        classes = _draw((self.tasks,), len(self.pool), self.ways, generator)
        examples = _draw(
            (self.tasks, self.ways), self.pool.examples, self.shots + self.queries, generator
        )
        turns = torch.randint(4, (self.tasks, self.ways), generator=generator)

        device = self.pool.images.device
        images = self.pool.images[classes.unsqueeze(-1).to(device), examples.to(device)]
        if self.rotations:
            for turn in (1, 2, 3):
                chosen = (turns == turn).to(device)
                images[chosen] = images[chosen].rot90(turn, (-2, -1))
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        images = images.to(torch.float32) / scale
        support, query = images.split([self.shots, self.queries], dim=2)
        return TaskBatch(
            inner_batch=(support.flatten(1, 2), self._labels(self.shots, device)),
            outer_batch=(query.flatten(1, 2), self._labels(self.queries, device)),
            keys=tuple((self.seed, step, task) for task in range(self.tasks)),
        )

    def _labels(self, repeats: int, device: torch.device) -> Tensor:
        labels = torch.arange(self.ways, device=device).repeat_interleave(repeats)
        return labels.repeat(self.tasks, 1)


def _draw(batch: tuple[int, ...], total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct numbers below `total` for each entry of the batch, ``[*batch, count]``."""
    return torch.rand(*batch, total, generator=generator).argsort(-1)[..., :count]


def _mix(seed: int, step: int) -> int:
    """A 64-bit seed; hashed, so that neighbouring seeds and steps share no stream."""
    return int.from_bytes(hashlib.sha256(f"{seed},{step}".encode()).digest()[:8], "big")
