r"""The stationarity $F = \partial_z G$ with no graph kept: each product evaluates it again.

Reverse mode twice, as with a kept graph, and so for the same operations and to the same digits. The
graph of one product is released while it is pulled through.

Forward mode is not used, though reverse mode over it would need less memory still. In PyTorch 2.13
its derivative is wrong in silence, by 7 to 80 %, for native batch, instance and layer norm and for
`torch.linalg`'s `solve`, `det` and `slogdet`. Forward mode over reverse mode is right, but needs
more memory than the kept graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .flat import FlatProblem
from .rows import full_precision
from .stationarity import Stationarity, pushed, regularized

__all__ = ["RecomputedStationarity"]


@dataclass(frozen=True)
class RecomputedStationarity(Stationarity):
    """F at a point, without its graph.

    Attributes:
        z: The point ``[tasks, n]``, detached.
    """

    z: Tensor

    @classmethod
    def at(cls, flat: FlatProblem, z: Tensor) -> RecomputedStationarity:
        """Evaluate F at ``z``."""
        flat.counts["gradients"] += flat.count
        flat = flat.drawn()
        z, plain = z.detach(), flat.plain()
        with full_precision(z.device):
            slopes, inner_value = plain.slopes(*plain.cut(z), keep_graph=False)
            value = plain.joined([slope.detach() for slope in slopes])
            value, inner_value, _ = regularized(plain, z, value, inner_value)
        found = cls(flat, value, inner_value, z)
        flat.notes.setdefault("first_residual", found.norm)
        return found

    def pull(self, v: Tensor) -> Tensor:
        """(∂_z F)ᵀ v, ``[tasks, n]``: for an inner objective, the product with its Hessian."""
        leaves, edges, places = self._graph(self._plain)
        if not edges:
            return self._regularized(torch.zeros_like(v), v)
        parts = self.flat.parts(v)
        with full_precision(v.device):
            product = torch.autograd.grad(
                edges, leaves, [parts[i] for i in places], materialize_grads=True
            )
        return self._regularized(self.flat.joined(product), v)

    def push(self, v: Tensor) -> Tensor:
        """∂_z F v, ``[tasks, n]``; two pulls, of which the first keeps its graph."""
        leaves, edges, places = self._graph(self._plain)
        product = pushed(edges, places, leaves, self.flat.parts(v))
        return self._regularized(self.flat.joined(product), v)

    def cross(self, v: Tensor) -> list[Tensor | None]:
        """(∂_x F)ᵀ v, one tensor for each outer leaf, None where F does not depend on it."""
        outer = self.flat.outer.leaves
        found: list[Tensor | None] = [None] * len(outer)
        _, edges, places = self._graph(self.flat.not_compiled())
        if edges:
            parts = self.flat.parts(v)
            with full_precision(v.device):
                found = list(
                    torch.autograd.grad(edges, outer, [parts[i] for i in places], allow_unused=True)
                )
        strength = self.flat.strength
        if strength is None:
            return found
        with torch.enable_grad():
            pulled = strength * (self.z - self.flat.center)
        if not pulled.requires_grad:
            return found
        # Center and strength are made once: their graphs are kept.
        more = torch.autograd.grad(pulled, outer, v, retain_graph=True, allow_unused=True)
        return [_sum(a, b) for a, b in zip(found, more, strict=True)]

    @cached_property
    def _plain(self) -> FlatProblem:
        """Without a graph in the outer leaves, for products in the inner variable alone."""
        return self.flat.plain()

    def _graph(self, flat: FlatProblem) -> tuple[list[Tensor], list[GradientEdge], list[int]]:
        """The leaves of the point, and F's edges in a graph on them with the leaves they stand for.

        An edge keeps the graph but not the value at it, which is as large as v.
        """
        with torch.enable_grad(), full_precision(self.z.device):
            tree, leaves = flat.cut(self.z)
            slopes, _ = flat.slopes(tree, leaves, keep_graph=True)
        places = [i for i, slope in enumerate(slopes) if slope.requires_grad]
        return leaves, [get_gradient_edge(slopes[i]) for i in places], places


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
