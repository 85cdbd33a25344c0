r"""The first-order hypergradient, FOMAML (Finn, Abbeel and Levine, 2017, section 5.2).

$$\frac{dF}{dx} \approx \partial_x f
  + \left(\frac{\partial z_0}{\partial x}\right)^{\!\top} \partial_z f$$

with $z_0(x)$ the initial inner point: the inner steps are taken to have derivative one. No second
derivative is taken. Biased in general; useless where $z_0$ does not depend on $x$ and neither does
$f$ directly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.flat import FlatProblem
from bilevel.inner_solver import InnerSolver, given_solution
from bilevel.linearised import outer_at, weighted
from bilevel.method import Estimate, HypergradientMethod, Start
from bilevel.point import add
from bilevel.registry import METHODS
from bilevel.rows import full_precision, norm

__all__ = ["FirstOrder"]


@METHODS.register("first-order")
@dataclass(frozen=True)
class FirstOrder(HypergradientMethod):
    """First-order approximation (FOMAML): the inner steps count as the identity. Biased."""

    def _compute(
        self, flat: FlatProblem, inner_solver: InnerSolver | None, weights: Tensor, start: Start
    ) -> Estimate:
        carry = None if inner_solver is None else inner_solver.solve(flat, start.inner)
        z = (flat.start if carry is None else carry.z).detach()
        with full_precision(z.device):
            inner_value, gradient = flat.value_and_gradient(z)
        residual = norm(gradient)
        if carry is None or inner_solver is None:
            inner = given_solution(z, residual)
        else:
            inner = inner_solver.report(carry, residual, flat.notes.get("first_residual"))
        graph = flat.with_outer(flat.outer.differentiable(), differentiable=True)
        leaves = graph.outer.leaves
        outer_value, metrics, rhs = outer_at(graph, z)
        with torch.enable_grad():
            # The start as the problem states it, even where the user gave another point.
            stated = replace(graph, start_is_constant=not graph.problem.has_start)
            first = stated.initial()
        through: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if first.requires_grad:
            through = torch.autograd.grad(first, leaves, weighted(rhs, weights), allow_unused=True)
        direct: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if outer_value.requires_grad:
            direct = torch.autograd.grad(
                outer_value, leaves, weights.to(outer_value.dtype), allow_unused=True
            )
        return Estimate(
            add(direct, through),
            z,
            inner_value,
            outer_value.detach(),
            inner,
            metrics=metrics,
        )
