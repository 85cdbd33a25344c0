r"""Products with the generalised Gauss–Newton matrix (Schraudolph, 2002).

For an inner objective $g = \ell(p(z))$, with `predict` $p$ and `loss` $\ell$,

$$\partial^2_{zz} g = J^\top S J + \sum_k \partial_{p_k}\ell\; \partial^2_{zz} p_k, \qquad
  J = \partial_z p,\quad S = \partial^2_{pp}\ell.$$

The first term is positive semidefinite where the loss is convex in the prediction; the second, left
out, is what makes the Hessian of a network indefinite. The regularizer's curvature is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .flat import FlatProblem
from .operator import MatVec
from .pytree import tree_flatten, tree_unflatten
from .rows import full_precision

__all__ = ["gauss_newton"]


def gauss_newton(flat: FlatProblem, z: Tensor) -> MatVec | None:
    """Products with JᵀSJ + strength, ``[tasks, n] -> [tasks, n]``.

    Nothing is evaluated before the first product.

    Args:
        flat: The problem on stacked tasks.
        z: The inner point ``[tasks, n]``.

    Returns:
        The product, or None where the problem is not stated by `predict` and `loss`.
    """
    if not flat.problem.has_prediction:
        return None
    plain = flat.with_outer(flat.outer.detached(), differentiable=False)
    graph: list[_Graph] = []

    def product(v: Tensor) -> Tensor:
        if not graph:
            graph.append(_Graph(plain, z))
        flat.counts["products"] += flat.count
        return graph[0](v)

    return product


class _Graph:
    """The graphs of the prediction and of the loss's slope, kept for all products."""

    def __init__(self, flat: FlatProblem, z: Tensor) -> None:
        with torch.enable_grad(), full_precision(z.device):
            self.z = z.detach().requires_grad_()
            self.out, spec = tree_flatten(flat.prediction(self.z))
            self.at = [leaf.detach().requires_grad_() for leaf in self.out]
            loss = flat.loss(tree_unflatten(self.at, spec))
            self.slopes = torch.autograd.grad(
                loss.sum(), self.at, create_graph=True, materialize_grads=True
            )
            # Jᵀu, linear in u: its derivative in u along v is J v.
            self.u = [torch.zeros_like(leaf, requires_grad=True) for leaf in self.out]
            (self.pulled,) = torch.autograd.grad(self.out, self.z, self.u, create_graph=True)
        self.strength = flat.strength

    def __call__(self, v: Tensor) -> Tensor:
        with full_precision(v.device):
            pushed = torch.autograd.grad(
                self.pulled, self.u, v, retain_graph=True, materialize_grads=True
            )
            curved = [torch.zeros_like(leaf) for leaf in self.at]
            steep = [(s, p) for s, p in zip(self.slopes, pushed, strict=True) if s.requires_grad]
            if steep:
                curved = list(
                    torch.autograd.grad(
                        [s for s, _ in steep],
                        self.at,
                        [p for _, p in steep],
                        retain_graph=True,
                        materialize_grads=True,
                    )
                )
            (product,) = torch.autograd.grad(self.out, self.z, curved, retain_graph=True)
        return product if self.strength is None else product + self.strength * v
