r"""The linearised inner system: the inner problem's stationarity at one point, and its products.

With $F(x, z) = \partial_z G$ the implicit function theorem gives

$$\frac{dF}{dx} = \partial_x f - (\partial_x F)^\top v,
  \qquad (\partial_z F)^\top v = \partial_z f.$$

One graph of the stationarity, for all tasks, is kept, and every product is one pull through it;
or none is kept, and every product makes it again (`Kernels.products`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import RandomnessError
from .flat import FlatProblem
from .gauss_newton import gauss_newton
from .graph import reaches
from .operator import Operator
from .problem import Structure
from .recomputed import RecomputedStationarity
from .rows import column, full_precision, ones_for
from .stacking import randomness_message
from .stationarity import Stationarity, StationarityGraph

__all__ = ["LinearisedSystem", "linearise", "outer_at"]


@dataclass(frozen=True)
class LinearisedSystem:
    """The inner problem linearised at ``z``; all tasks at once.

    Attributes:
        flat: The problem, its outer leaves requiring grad.
        z: The point, ``[tasks, n]``, detached.
        graph: F at the point, and the products with its derivatives.
        outer_value: f ``[tasks]``, with its graph where it depends on the outer leaves directly.
        rhs: ∂_z f ``[tasks, n]``, the right-hand side of the adjoint system.
        metrics: The problem's metrics at the point, where they came with f; None: not yet known.
    """

    flat: FlatProblem
    z: Tensor
    graph: Stationarity
    outer_value: Tensor
    rhs: Tensor
    metrics: dict[str, Tensor] | None = None

    @property
    def operator(self) -> Operator:
        """The matrix of the adjoint system, (∂_z F)ᵀ, undamped."""
        symmetric = self.flat.problem.structure is not Structure.GENERAL
        pull = self.pull  # one object, by which the operator knows itself to be symmetric
        positive = gauss_newton(self.flat, self.z) if symmetric else None
        return Operator(pull, pull if symmetric else self.push, positive, together=self.pull_block)

    @property
    def stationarity(self) -> Tensor:
        """F ``[tasks, n]``, detached."""
        return self.graph.value

    @property
    def residual(self) -> Tensor:
        """‖F‖ for each task, float64 ``[tasks]``."""
        return self.graph.norm

    @property
    def inner_value(self) -> Tensor:
        """G ``[tasks]``, detached."""
        return self.graph.inner_value

    def pull(self, v: Tensor) -> Tensor:
        """(∂_z F)ᵀ v, ``[tasks, n]``: for an inner objective, the product with its Hessian."""
        self.flat.counts["products"] += self.flat.count
        return self.graph.pull(v)

    def pull_block(self, block: Tensor) -> Tensor:
        """`pull` of many vectors at once, ``[vectors, tasks, n]``."""
        self.flat.counts["products"] += len(block) * self.flat.count
        return self.graph.pull_block(block)

    def push(self, v: Tensor) -> Tensor:
        """∂_z F v, ``[tasks, n]``; two pulls, of which the first keeps its graph."""
        self.flat.counts["products"] += 2 * self.flat.count
        return self.graph.push(v)

    def cross(self, v: Tensor) -> list[Tensor | None]:
        """(∂_x F)ᵀ v, one tensor for each outer leaf, None where F does not depend on it."""
        return self.graph.cross(v)

    def direct(self, weights: Tensor) -> list[Tensor | None]:
        """Σ weightsᵢ ∂_x fᵢ, one tensor for each outer leaf."""
        if not self.outer_value.requires_grad:
            return [None] * len(self.flat.outer.leaves)
        return list(
            torch.autograd.grad(
                self.outer_value,
                self.flat.outer.leaves,
                weights.to(self.outer_value.dtype),
                retain_graph=True,
                allow_unused=True,
            )
        )


def linearise(flat: FlatProblem, z: Tensor) -> LinearisedSystem:
    """Evaluate both objectives at ``z``, keeping the stationarity's graph where that is asked."""
    flat = flat.with_outer(flat.outer.differentiable(), differentiable=True)
    z = z.detach()
    before = torch.get_rng_state()
    outer_value, metrics, rhs = outer_at(flat, z)
    if not before.equal(torch.get_rng_state()):
        raise RandomnessError(randomness_message("outer_objective"))
    if not reaches(outer_value, flat.outer.leaves):
        # Its graph has done its work: do not hold it beside that of the stationarity.
        outer_value = outer_value.detach()
    kept = flat.kernels.products == "kept"
    graph = (StationarityGraph if kept else RecomputedStationarity).at(flat, z)
    return LinearisedSystem(flat, z, graph, outer_value, rhs, metrics)


def outer_at(flat: FlatProblem, z: Tensor) -> tuple[Tensor, dict[str, Tensor] | None, Tensor]:
    """Return f ``[tasks]`` with its graph, metrics that came with it, and ∂_z f ``[tasks, n]``."""
    with torch.enable_grad(), full_precision(z.device):
        inner, leaves = flat.cut(z)
        value, metrics = flat.evaluate_at(inner)
        if not value.requires_grad:
            return value, metrics, torch.zeros_like(z)
        slopes = torch.autograd.grad(
            value, leaves, ones_for(value), retain_graph=True, materialize_grads=True
        )
    return value, metrics, flat.joined(slopes)


def weighted(v: Tensor, weights: Tensor) -> Tensor:
    """Rows of v scaled by the tasks' weights."""
    return v * column(weights, v)
