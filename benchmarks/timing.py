"""Honest times: variants take turns in one process, so that what disturbs one disturbs all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bilevel.clock import seconds_of

__all__ = ["Times", "alternate"]


@dataclass(frozen=True)
class Times:
    """Seconds of one variant, in the order in which they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, over the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median

    def over(self, other: Times) -> float:
        """The median of the ratios of times that were taken side by side."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def less(self, other: Times) -> float:
        """The median of the differences of times that were taken side by side."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine - theirs for mine, theirs in pairs)


def alternate(
    variants: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device | str = "cpu"
) -> dict[str, Times]:
    """Time every variant once in each round, in an order that turns from round to round.

    On a CPU the time is that of the process, which other processes do not lengthen much; on a GPU
    it is the wall clock's, with the device waited for.
    """
    cuda = torch.device(device).type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    found: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for name in names:
        variants[name]()  # the first call is slower
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(seconds_of(variants[name], device, clock))
    return {name: Times(tuple(one)) for name, one in found.items()}
