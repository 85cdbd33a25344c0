"""The size of a matrix, by power iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.operator import MatVec
from bilevel.rows import column, norm

__all__ = ["safe_step"]

_POWER_STEPS = 12
_SAFETY = 1.1


def safe_step(matvec: MatVec, like: Tensor) -> Tensor:
    """1 / (1.1 · L) for each task, float64, L estimated by 12 steps of power iteration."""
    # Fixed pseudo-random signs: the same bits at every call, and no eigenvector is likely to be
    # orthogonal to them.
    index = torch.arange(like.shape[1], device=like.device, dtype=torch.float64)
    u = torch.sin(index * 12.9898 + 0.5).to(like.dtype).expand_as(like)
    largest = torch.zeros(len(like), dtype=torch.float64, device=like.device)
    for _ in range(_POWER_STEPS):
        u = u / column(norm(u).clamp_min(torch.finfo(like.dtype).tiny), u)
        u = matvec(u)
        largest = torch.fmax(largest, norm(u))
    return torch.where(largest > 0, 1.0 / (_SAFETY * largest), 1.0)
