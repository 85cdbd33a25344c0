"""Conjugate gradients as one would write them without a library, nothing checked."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["conjugate_gradients"]


def conjugate_gradients(
    slope: Sequence[Tensor],
    z: Sequence[Tensor],
    rhs: Sequence[Tensor],
    strength: float,
    counts: Collection[int],
) -> Iterator[list[Tensor]]:
    """Iterates of (H + strength · I) v = rhs after each of those numbers of steps.

    Args:
        slope: Gradient of the inner objective without the regularizer, with its graph in ``z``.
        z: The leaves that H belongs to.
        rhs: One tensor for each leaf.
        strength: λ.
        counts: Numbers of steps.
    """
    v, r, p = [torch.zeros_like(b) for b in rhs], list(rhs), list(rhs)
    rr = sum((a * a).sum() for a in r)
    for step in range(1, max(counts) + 1):
        pulled = torch.autograd.grad(slope, z, p, retain_graph=True)
        ap = [h + strength * d for h, d in zip(pulled, p, strict=True)]
        alpha = rr / sum((d * a).sum() for d, a in zip(p, ap, strict=True))
        v = [a + alpha * d for a, d in zip(v, p, strict=True)]
        r = [a - alpha * b for a, b in zip(r, ap, strict=True)]
        new = sum((a * a).sum() for a in r)
        p = [a + new / rr * d for a, d in zip(r, p, strict=True)]
        rr = new
        if step in counts:
            yield v
