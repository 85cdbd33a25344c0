r"""The graph of the stationarity $F = \partial_z G$ at one point, and pulls through it.

The inner variable is cut into its leaves before anything is recorded, and the regularizer's part is
added by its formula: autograd sees the objective alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .flat import FlatProblem
from .pytree import tree_leaves
from .rows import full_precision, norm, ones_for

__all__ = ["StationarityGraph"]


@dataclass(frozen=True)
class StationarityGraph:
    """F at a point; all tasks at once.

    Attributes:
        flat: The problem, its outer leaves requiring grad where derivatives in them are wanted.
        leaves: The leaves of the point, on which the graph hangs.
        slopes: F without the regularizer, leaf by leaf, with its graph.
        pulled: The regularizer's part of F ``[tasks, n]``, with its graph in the outer leaves; None
            without.
        value: F ``[tasks, n]``, detached.
        inner_value: G ``[tasks]``, detached; NaN for an equilibrium.
    """

    flat: FlatProblem
    leaves: list[Tensor]
    slopes: list[Tensor]
    pulled: Tensor | None
    value: Tensor
    inner_value: Tensor

    @classmethod
    def at(cls, flat: FlatProblem, z: Tensor) -> StationarityGraph:
        """Evaluate F at ``z`` and keep its graph."""
        flat.counts["gradients"] += flat.count
        z = z.detach()
        with torch.enable_grad(), full_precision(z.device):
            tree, leaves = flat.cut(z)
            if flat.kernels.compile:
                values, slopes = flat.compiled(leaves)
                inner_value = values.detach()
            elif flat.problem.is_equilibrium:
                found = tree_leaves(
                    flat.vector.matched(flat.call("stationarity", tree, flat.batch))
                )
                slopes = [one.reshape(x.shape) for one, x in zip(found, leaves, strict=True)]
                inner_value = z.new_full((flat.count,), float("nan"))
            else:
                values = flat.call("inner_objective", tree, flat.batch)
                slopes = list(
                    torch.autograd.grad(
                        values, leaves, ones_for(values), create_graph=True, materialize_grads=True
                    )
                )
                inner_value = values.detach()
            strength, pulled = flat.strength, None
            value = flat.joined([slope.detach() for slope in slopes])
            if strength is not None:
                offset = z - flat.center
                pulled = strength * offset
                plain = pulled.detach()
                value = value + plain
                inner_value = inner_value + 0.5 * (plain * offset.detach()).sum(-1)
        graph = cls(flat, leaves, slopes, pulled, value, inner_value)
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

    def push(self, v: Tensor) -> Tensor:
        """∂_z F v, ``[tasks, n]``; two pulls, of which the first keeps its graph."""
        dummies = [torch.zeros_like(slope, requires_grad=True) for slope in self.slopes]
        live = [(s, d) for s, d in zip(self.slopes, dummies, strict=True) if s.requires_grad]
        product: Sequence[Tensor] = [torch.zeros_like(slope) for slope in self.slopes]
        with torch.enable_grad(), full_precision(v.device):
            # Linear in the dummies, so that its derivative in them is the transposed product.
            transposed = torch.autograd.grad(
                [s for s, _ in live],
                self.leaves,
                [d for _, d in live],
                create_graph=True,
                materialize_grads=True,
            )
            linear = [
                (t, p)
                for t, p in zip(transposed, self.flat.parts(v), strict=True)
                if t.requires_grad
            ]
            if linear:
                product = torch.autograd.grad(
                    [t for t, _ in linear],
                    dummies,
                    [p for _, p in linear],
                    materialize_grads=True,
                )
        return self._regularized(self.flat.joined(product), v)

    def cross(self, v: Tensor) -> list[Tensor | None]:
        """(∂_x F)ᵀ v, one tensor for each outer leaf, None where F does not depend on it."""
        outputs, weights = self._live(v)
        if self.flat.kernels.compile:
            if self.flat.stacking.inner_uses_outer:
                # The compiled gradient takes the outer variable for a constant.
                return self._not_compiled.cross(v)
            outputs, weights = [], []
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
        return self._bound, [parts[i] for i in self._places]

    @cached_property
    def _places(self) -> list[int]:
        return [i for i, slope in enumerate(self.slopes) if slope.requires_grad]

    @cached_property
    def _bound(self) -> list[Tensor]:
        return [self.slopes[i] for i in self._places]

    @cached_property
    def _not_compiled(self) -> StationarityGraph:
        flat = replace(self.flat, kernels=replace(self.flat.kernels, compile=False))
        return StationarityGraph.at(flat, flat.joined([leaf.detach() for leaf in self.leaves]))

    @cached_property
    def norm(self) -> Tensor:
        """‖F‖ for each task, float64 ``[tasks]``."""
        return norm(self.value)

    def _regularized(self, product: Tensor, v: Tensor) -> Tensor:
        strength = self.flat.plain_strength
        return product if strength is None else torch.addcmul(product, strength, v)
