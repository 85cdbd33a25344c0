r"""The linearised inner system: the inner problem's stationarity at one point, and its products.

With $F(x, z) = \partial_z G$ the implicit function theorem gives

$$\frac{dF}{dx} = \partial_x f - (\partial_x F)^\top v,
  \qquad (\partial_z F)^\top v = \partial_z f.$$

One graph of the stationarity, for all tasks, is kept; every product is one pull through it.
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
from .rows import column, full_precision
from .stacking import randomness_message

__all__ = ["LinearisedSystem", "linearise"]


@dataclass(frozen=True)
class LinearisedSystem:
    """The inner problem linearised at ``z``; all tasks at once.

    Attributes:
        flat: The problem, its outer leaves requiring grad.
        z: The point, ``[tasks, n]``.
        stationarity: F at the point, with its graph.
        inner_value: G ``[tasks]``, detached.
        outer_value: f ``[tasks]``, with its graph where it depends on the outer leaves directly.
        rhs: ∂_z f ``[tasks, n]``, the right-hand side of the adjoint system.
        metrics: The problem's metrics at the point, where they came with f; None: not yet known.
    """

    flat: FlatProblem
    z: Tensor
    stationarity: Tensor
    inner_value: Tensor
    outer_value: Tensor
    rhs: Tensor
    metrics: dict[str, Tensor] | None = None

    @property
    def operator(self) -> Operator:
        """The matrix of the adjoint system, (∂_z F)ᵀ, undamped."""
        symmetric = self.flat.problem.structure is not Structure.GENERAL
        pull = self.pull  # one object, by which the operator knows itself to be symmetric
        positive = gauss_newton(self.flat, self.z) if symmetric else None
        return Operator(pull, pull if symmetric else self.push, positive)

    def pull(self, v: Tensor) -> Tensor:
        """(∂_z F)ᵀ v, ``[tasks, n]``: for an inner objective, the product with its Hessian."""
        self.flat.counts["products"] += self.flat.count
        if not self.stationarity.requires_grad:
            return torch.zeros_like(v)
        with full_precision(v.device):
            (product,) = torch.autograd.grad(
                self.stationarity, self.z, v, retain_graph=True, allow_unused=True
            )
        return torch.zeros_like(v) if product is None else product

    def push(self, v: Tensor) -> Tensor:
        """∂_z F v, ``[tasks, n]``; two pulls, of which the first keeps its graph."""
        self.flat.counts["products"] += 2 * self.flat.count
        if not self.stationarity.requires_grad:
            return torch.zeros_like(v)
        dummy = torch.zeros_like(v, requires_grad=True)
        with torch.enable_grad(), full_precision(v.device):
            # Linear in the dummy, so that its derivative in it is the transposed product.
            (transposed,) = torch.autograd.grad(
                self.stationarity, self.z, dummy, create_graph=True, materialize_grads=True
            )
            if not transposed.requires_grad:
                return torch.zeros_like(v)
            (product,) = torch.autograd.grad(transposed, dummy, v, materialize_grads=True)
        return product

    def cross(self, v: Tensor) -> list[Tensor | None]:
        """(∂_x F)ᵀ v, one tensor for each outer leaf, None where F does not depend on it."""
        if not self.stationarity.requires_grad:
            return [None] * len(self.flat.outer.leaves)
        with full_precision(v.device):
            return list(
                torch.autograd.grad(
                    self.stationarity,
                    self.flat.outer.leaves,
                    v,
                    retain_graph=True,
                    allow_unused=True,
                )
            )

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
    """Evaluate both objectives at ``z`` and keep the graph of the stationarity."""
    flat = flat.with_outer(flat.outer.differentiable(), differentiable=True)
    z = z.detach().requires_grad_()
    with torch.enable_grad(), full_precision(z.device):
        before = torch.get_rng_state()
        outer_value, metrics = flat.evaluate(z)
        if not before.equal(torch.get_rng_state()):
            raise RandomnessError(randomness_message("outer_objective"))
        rhs = gradient_of_outer(outer_value, z)
        if not reaches(outer_value, flat.outer.leaves):
            # Its graph has done its work: do not hold it beside that of the stationarity.
            outer_value = outer_value.detach()
        inner_value, stationarity = flat.value_and_gradient(z)
    return LinearisedSystem(flat, z, stationarity, inner_value, outer_value, rhs, metrics)


def gradient_of_outer(outer_value: Tensor, z: Tensor) -> Tensor:
    """∂_z f ``[tasks, n]``; zero where f does not depend on z."""
    if not outer_value.requires_grad:
        return torch.zeros_like(z)
    (rhs,) = torch.autograd.grad(outer_value.sum(), z, retain_graph=True, allow_unused=True)
    return torch.zeros_like(z) if rhs is None else rhs


def weighted(v: Tensor, weights: Tensor) -> Tensor:
    """Rows of v scaled by the tasks' weights."""
    return v * column(weights, v)
