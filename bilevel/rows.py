"""Row-wise algebra on ``[tasks, n]``: scalars are ``[tasks]``, sums accumulate in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["check_interval", "choose", "column", "dot", "full_precision", "norm"]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ for each row, float64 ``[tasks]``."""
    if a.dtype.itemsize < 4:
        a, b = a.float(), b.float()  # the squares of half numbers leave their range
    return (a * b).sum(-1, dtype=torch.float64)


def norm(a: Tensor) -> Tensor:
    """‖a‖ for each row, float64 ``[tasks]``; neither underflows nor overflows."""
    largest = a.abs().amax(-1, keepdim=True)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    unit = a / scale
    return dot(unit, unit).sqrt() * scale.squeeze(-1).double()


def column(scalars: Tensor, like: Tensor) -> Tensor:
    """``[tasks]`` as ``[tasks, 1]`` in the dtype of ``like``, to scale rows by."""
    return scalars.to(like.dtype).unsqueeze(-1)


def choose(tasks: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Rows of ``yes`` for those tasks, and of ``no`` for the others.

    It never multiplies by a mask: 0 · NaN is NaN. Where asking is free, all tasks cost no copy.
    """
    if check_interval(tasks.device) == 1 and bool(tasks.all()):
        return yes
    return torch.where(tasks.unsqueeze(-1), yes, no)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch TF32 off for curvature products, and restore it afterwards."""
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (matmul.allow_tf32, cudnn.allow_tf32)
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def check_interval(device: torch.device) -> int:
    """How many iterations pass between questions to the device; on a CPU asking is free."""
    return 1 if device.type == "cpu" else 8
