"""Minibatches for the inner solver: data drawn anew at each inner step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .pytree import PyTree, tree_flatten

__all__ = ["LINEARISED", "Stream"]

LINEARISED = -1
"""The step number with which the batch for linearisation and for residuals is drawn."""


@dataclass(frozen=True)
class Stream:
    """Data that changes with the inner step; passed as ``inner_batch``.

    Args:
        draw: ``draw(step)`` returns the batch of inner step ``step`` ≥ 0, and for ``step = -1`` the
            batch on which the inner problem is linearised (a larger or the full batch). It must be
            a function of ``step`` alone, so that a step can be repeated: seed from it.

    Example:
        >>> import torch
        >>> data = torch.arange(6.0)
        >>> stream = Stream(lambda step: data if step < 0 else data[step % 3 :: 3])
        >>> stream.draw(1)
        tensor([1., 4.])
    """

    draw: Callable[[int], PyTree]

    def signature(self) -> Any:
        """Structure and shapes of the batch on which the problem is linearised."""
        leaves, spec = tree_flatten(self.draw(LINEARISED))
        shapes = ((x.shape, x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves)
        return str(spec), tuple(shapes)
