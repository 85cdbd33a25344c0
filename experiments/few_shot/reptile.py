r"""Reptile (Nichol, Achiam and Schulman, 2018): θ moves towards where adaptation ends.

$$\theta \leftarrow \theta - \eta\, (\theta - \phi_T)$$

No derivative of the outer objective is taken; what stands in for the hypergradient is
$(\partial z_0 / \partial x)^\top (z_0 - z_T)$, with $z_0(x)$ the initial inner point.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.flat import FlatProblem
from bilevel.inner_solver import InnerSolver, given_solution
from bilevel.linearised import weighted
from bilevel.method import Estimate, HypergradientMethod, Start
from bilevel.rows import norm

__all__ = ["Reptile"]


@dataclass(frozen=True)
class Reptile(HypergradientMethod):
    """The direction of Reptile in place of a hypergradient."""

    def _compute(
        self, flat: FlatProblem, inner_solver: InnerSolver | None, weights: Tensor, start: Start
    ) -> Estimate:
        carry = None if inner_solver is None else inner_solver.solve(flat, start.inner)
        z = flat.start if carry is None else carry.z
        inner_value, gradient = flat.value_and_gradient(z)
        residual = norm(gradient)
        if carry is None or inner_solver is None:
            inner = given_solution(z, residual)
        else:
            inner = inner_solver.report(carry, residual, flat.notes.get("first_residual"))
        graph = flat.with_outer(flat.outer.differentiable(), differentiable=True)
        # The start as the problem states it, even where the user gave another point.
        graph = replace(graph, start_is_constant=not flat.problem.has_start)
        with torch.enable_grad():
            first = graph.initial()
        gradients: tuple[Tensor | None, ...] = (None,) * len(graph.outer.leaves)
        if first.requires_grad:
            moved = weighted(first.detach() - z, weights)
            gradients = torch.autograd.grad(first, graph.outer.leaves, moved, allow_unused=True)
        with torch.no_grad():
            outer_value = flat.outer_value(z)
        return Estimate(gradients, z, inner_value, outer_value, inner)
