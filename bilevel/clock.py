"""How long a computation takes, the device's work included."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["seconds_of"]


def seconds_of(
    run: Callable[[], object],
    device: torch.device | str,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Run once and return the seconds it took; a GPU is waited for, before and after.

    Args:
        run: The computation.
        device: Where its tensors lie.
        clock: What is read: the wall clock, or `time.process_time` on a busy CPU.
    """
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    started = clock()
    run()
    if cuda:
        torch.cuda.synchronize(device)
    return clock() - started
