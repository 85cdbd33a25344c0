"""Peak memory of a computation: live bytes of tensors, not the process's resident size."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch

__all__ = ["held_bytes", "peak_bytes"]


def peak_bytes(function: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Run ``function`` and return the peak of the tensor bytes that it held beyond the start.

    On a CPU every allocation and release is read from the profiler; on a GPU the allocator's own
    peak is read.

    Example:
        >>> import torch
        >>> peak_bytes(lambda: (torch.ones(1000), torch.ones(1000)))
        8000
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return max(accumulate(_changes(function), initial=0))


def held_bytes(function: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Run ``function`` and return the tensor bytes that its result holds: a kept graph, say.

    Example:
        >>> import torch
        >>> held_bytes(lambda: torch.ones(1000) + torch.ones(1000))
        4000
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        after = torch.cuda.memory_allocated(device)
        del result
        return after - before
    return sum(_changes(function))


def _changes(function: Callable[[], Any]) -> list[int]:
    """Bytes allocated (released: negative) by ``function``, in order, its result still held."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(activities=activities, profile_memory=True)
    with _quiet(), profiler as profile:
        result = function()
    del result
    assert profile.profiler is not None
    results = profile.profiler.kineto_results
    assert results is not None
    changes = [e for e in results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(changes, key=lambda e: e.start_ns())]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the profiler of torch 2.13 from writing to stderr; it reads its level on first use."""
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "6"
    try:
        yield
    finally:
        del os.environ[name]
