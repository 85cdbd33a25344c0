"""Peak memory of a computation: live bytes of tensors, not the process's resident size."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["peak_bytes"]


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
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(activities=activities, profile_memory=True)
    with _quiet(), profiler as profile:
        result = function()
    del result
    assert profile.profiler is not None
    results = profile.profiler.kineto_results
    assert results is not None
    live = peak = 0
    changes = [e for e in results.events() if e.name() == "[memory]"]
    for event in sorted(changes, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


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
