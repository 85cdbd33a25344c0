r"""The stationarity $F = \partial_z G$ at one point, and products with its derivatives.

The inner variable is cut into its leaves before anything is recorded, and the regularizer's part is
added by its formula: autograd sees the objective alone. Here one graph is kept, and each product is
one pull through it; `recomputed` keeps none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .errors import NotDifferentiableError
from .flat import FlatProblem
from .rows import full_precision, norm

__all__ = ["Stationarity", "StationarityGraph", "pushed", "regularized"]

_LARGEST_BLOCK = 2**17
Output = TypeVar("Output", Tensor, GradientEdge)


@dataclass(frozen=True)
class Stationarity(ABC):
    """F at a point; all tasks at once.

    Attributes:
        flat: The problem, its outer leaves requiring grad where derivatives in them are wanted.
        value: F ``[tasks, n]``, detached.
        inner_value: G ``[tasks]``, detached; NaN for an equilibrium.
    """

    flat: FlatProblem
    value: Tensor
    inner_value: Tensor

    @abstractmethod
    def pull(self, v: Tensor) -> Tensor:
        """(∂_z F)ᵀ v, ``[tasks, n]``: for an inner objective, the product with its Hessian."""

    def pull_block(self, block: Tensor) -> Tensor:
        """`pull` of many vectors, ``[vectors, tasks, n]``."""
        return torch.stack([self.pull(v) for v in block]) if len(block) else block

    @abstractmethod
    def push(self, v: Tensor) -> Tensor:
        """∂_z F v, ``[tasks, n]``; two pulls, of which the first keeps its graph."""

    @abstractmethod
    def cross(self, v: Tensor) -> list[Tensor | None]:
        """(∂_x F)ᵀ v, one tensor for each outer leaf, None where F does not depend on it."""

    @cached_property
    def norm(self) -> Tensor:
        """‖F‖ for each task, float64 ``[tasks]``."""
        return norm(self.value)

    def _regularized(self, product: Tensor, v: Tensor) -> Tensor:
        strength = self.flat.plain_strength
        return product if strength is None else torch.addcmul(product, strength, v)


@dataclass(frozen=True)
class StationarityGraph(Stationarity):
    """F at a point, with its graph.

    Attributes:
        leaves: The leaves of the point, on which the graph hangs.
        slopes: F without the regularizer, leaf by leaf, with its graph.
        pulled: The regularizer's part of F ``[tasks, n]``, with its graph in the outer leaves; None
            without.
    """

    leaves: list[Tensor]
    slopes: list[Tensor]
    pulled: Tensor | None

    @classmethod
    def at(cls, flat: FlatProblem, z: Tensor) -> StationarityGraph:
        """Evaluate F at ``z`` and keep its graph."""
        flat.counts["gradients"] += flat.count
        z = z.detach()
        with torch.enable_grad(), full_precision(z.device):
            tree, leaves = flat.cut(z)
            slopes, inner_value = flat.slopes(tree, leaves, keep_graph=True)
            value = flat.joined([slope.detach() for slope in slopes])
            value, inner_value, pulled = regularized(flat, z, value, inner_value)
        graph = cls(flat, value, inner_value, leaves, slopes, pulled)
        flat.notes.setdefault("first_residual", graph.norm)
        return graph

    def pull(self, v: Tensor) -> Tensor:
        """(∂_z F)ᵀ v, ``[tasks, n]``: for an inner objective, the product with its Hessian."""
        slopes, parts = self._live(v)
        if not slopes:
            return self._regularized(torch.zeros_like(v), v)
        with full_precision(v.device):
            product = torch.autograd.grad(
                slopes, self.leaves, parts, retain_graph=True, materialize_grads=True
            )
        return self._regularized(self.flat.joined(product), v)

    def pull_block(self, block: Tensor) -> Tensor:
        """`pull` of many vectors ``[vectors, tasks, n]``, in one batched pass where that is sound.

        One pass saves launches, which is most of the time of a small problem; of a large one it
        needs the more memory. Its first column is compared with `pull`, since the rules that
        PyTorch batches by are many.
        """
        record = self.flat.stacking
        small = len(block) > 1 and block.numel() <= _LARGEST_BLOCK
        if not (small and self._places and record.pulls_blocks) or self.flat.kernels.compile:
            return super().pull_block(block)
        try:
            found = self._batched(block)
            wanted = self.pull(block[0])
            gap = torch.linalg.vector_norm(found[0] - wanted)
            noise = torch.finfo(block.dtype).eps ** 0.5 * torch.linalg.vector_norm(wanted)
            record.pulls_blocks = bool(gap <= noise)
        except (RuntimeError, NotDifferentiableError):
            # Some operations have no batching rule, such as those on sparse matrices, or `argmin`.
            record.pulls_blocks = False
        return found if record.pulls_blocks else super().pull_block(block)

    def _batched(self, block: Tensor) -> Tensor:
        flat, many = self.flat, len(block)
        rows = block.squeeze(1) if flat.count == 1 else block
        parts = [part.contiguous() for part in flat.vector.parts(rows)]
        with full_precision(block.device):
            product = torch.autograd.grad(
                self._bound,
                self.leaves,
                [parts[i] for i in self._places],
                retain_graph=True,
                is_grads_batched=True,
                materialize_grads=True,
            )
        found = torch.cat([part.reshape(many, flat.count, -1) for part in product], -1)
        return self._regularized(found, block)

    def push(self, v: Tensor) -> Tensor:
        """∂_z F v, ``[tasks, n]``; two pulls, of which the first keeps its graph."""
        product = pushed(self._bound, self._places, self.leaves, self.flat.parts(v))
        return self._regularized(self.flat.joined(product), v)

    def cross(self, v: Tensor) -> list[Tensor | None]:
        """(∂_x F)ᵀ v, one tensor for each outer leaf, None where F does not depend on it."""
        if self.flat.kernels.compile:
            # The compiled gradient takes the outer variable for a constant.
            return self._not_compiled.cross(v)
        outputs, weights = self._live(v)
        if self.pulled is not None and self.pulled.requires_grad:
            outputs, weights = [*outputs, self.pulled], [*weights, v]
        outer = self.flat.outer.leaves
        if not outputs:
            return [None] * len(outer)
        with full_precision(v.device):
            return list(
                torch.autograd.grad(outputs, outer, weights, retain_graph=True, allow_unused=True)
            )

    def _live(self, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The slopes that have a graph, and the parts of v for them."""
        parts = self.flat.parts(v)
        every = len(self._places) == len(parts)
        return self._bound, parts if every else [parts[i] for i in self._places]

    @cached_property
    def _places(self) -> list[int]:
        return [i for i, slope in enumerate(self.slopes) if slope.requires_grad]

    @cached_property
    def _bound(self) -> list[Tensor]:
        return [self.slopes[i] for i in self._places]

    @cached_property
    def _not_compiled(self) -> StationarityGraph:
        z = self.flat.joined([leaf.detach() for leaf in self.leaves])
        return StationarityGraph.at(self.flat.not_compiled(), z)


def regularized(
    flat: FlatProblem, z: Tensor, value: Tensor, inner_value: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """F and G with the regularizer, detached; and its part of F, with its graph; None without."""
    strength = flat.strength
    if strength is None:
        return value, inner_value, None
    offset = z - flat.center
    pulled = strength * offset
    plain = pulled.detach()
    return value + plain, inner_value + 0.5 * (plain * offset.detach()).sum(-1), pulled


def pushed(
    outputs: Sequence[Output], places: Sequence[int], leaves: list[Tensor], v: list[Tensor]
) -> list[Tensor]:
    """The product of the Jacobian of ``outputs`` with v, leaf by leaf, by two pulls.

    Args:
        outputs: Those slopes that have a graph, or their edges in it.
        places: The leaves that they belong to; the product is zero in the others.
        leaves: The leaves of the point.
        v: The vector, leaf by leaf.
    """
    product = [torch.zeros_like(leaf) for leaf in leaves]
    dummies = [torch.zeros_like(leaves[i], requires_grad=True) for i in places]
    if not dummies:
        return product
    with torch.enable_grad(), full_precision(leaves[0].device):
        # Linear in the dummies, so that its derivative in them is the transposed product.
        transposed = torch.autograd.grad(
            outputs, leaves, dummies, create_graph=True, materialize_grads=True
        )
        linear = [(t, p) for t, p in zip(transposed, v, strict=True) if t.requires_grad]
        if linear:
            found = torch.autograd.grad(
                [t for t, _ in linear], dummies, [p for _, p in linear], materialize_grads=True
            )
            for i, part in zip(places, found, strict=True):
                product[i] = part
    return product
