r"""Hessian-free Newton (Martens, 2010), batched over tasks: Newton-CG with backtracking.

Each step solves

$$(\partial^2_{zz} G)\, d = -\partial_z G$$

by conjugate gradients, from products alone, as far as curvature stays positive (Nocedal and Wright,
2006, Algorithm 7.1), and backtracks along d until Armijo's condition holds. iMAML's second inner
solver (Rajeswaran et al., 2019, section 4) is this one with 5 steps of conjugate gradients.

Where the very first direction has negative curvature, the step is along −∂_z G, over the largest
curvature that the solve met or ‖∂_z G‖, so that it is no longer than 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from bilevel.errors import StructureError
from bilevel.flat import FlatProblem
from bilevel.gauss_newton import gauss_newton
from bilevel.inner_solver import InnerSolver
from bilevel.operator import MatVec, Operator
from bilevel.pytree import PyTree
from bilevel.registry import INNER_SOLVERS
from bilevel.rows import column, dot, full_precision, norm

from ..linear.cg import CG
from .line_search import backtrack

__all__ = ["HessianFree"]

Matrix = Literal["hessian", "gauss-newton"]


@INNER_SOLVERS.register("hessian-free")
@dataclass(frozen=True)
class HessianFree(InnerSolver):
    """Newton's method on the regularised inner objective, by products with its Hessian alone.

    Args:
        max_steps: The most Newton steps.
        tol: Stop a task once ‖∂_z G‖ ≤ tol, looked at after every step; None: take all steps.
        cg_steps: The most CG steps for a direction.
        cg_rtol: Tolerance of a direction, relative to ‖∂_z G‖; 0 asks for ``cg_steps`` steps.
        matrix: ``"hessian"``, or ``"gauss-newton"``, which is positive semidefinite where the loss
            is convex in the prediction; it needs a problem that is stated by `predict` and `loss`.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> import torch
        >>> from bilevel import Proximal, problem_from, solve_inner
        >>> problem = problem_from(
        ...     lambda z, x, batch: z.exp().sum(), lambda z, x, batch: z.sum(), Proximal(1.0)
        ... )
        >>> found = solve_inner(problem, torch.ones(2), inner_solver=HessianFree())
        >>> found.status[0].name, int(found.steps)
        ('CONVERGED', 4)
    """

    differentiable: ClassVar[bool] = False
    needs_objective: ClassVar[bool] = True
    check_every: ClassVar[int] = 1
    max_steps: int = 50
    tol: float | None = 1e-6
    cg_steps: int = 100
    cg_rtol: float = 0.1
    matrix: Matrix = "hessian"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, problem in (
            ("cg_steps", self.cg_steps, self.cg_steps < 1),
            ("cg_rtol", self.cg_rtol, not 0.0 <= self.cg_rtol < 1.0),
        ):
            if problem:
                least = "take at least one step" if name == "cg_steps" else "it lies in [0, 1)"
                raise ValueError(f"`{name}` is {value}; {least}")
        if self.matrix not in get_args(Matrix):
            known = " or ".join(repr(kind) for kind in get_args(Matrix))
            raise ValueError(f"`matrix` is {self.matrix!r}; pass {known}")

    def _init(self, flat: FlatProblem, z: Tensor) -> PyTree:
        if self.matrix == "gauss-newton" and not flat.problem.has_prediction:
            raise StructureError(
                "`matrix` is 'gauss-newton', but the problem states its inner objective as a "
                "whole; declare `predict` and `loss` in its place, or pass matrix='hessian'"
            )
        value, gradient = flat.value_and_gradient(z)
        return {
            "value": value.double(),
            "gradient": gradient,
            "stuck": torch.zeros(len(z), dtype=torch.bool, device=z.device),
        }

    def _residual(self, flat: FlatProblem, z: Tensor, state: PyTree) -> Tensor:
        return norm(state["gradient"])

    def _step(self, flat: FlatProblem, z: Tensor, state: PyTree) -> tuple[Tensor, PyTree]:
        value, gradient, size = state["value"], state["gradient"], norm(state["gradient"])
        # Tasks that are done, or have nowhere to go, must not keep the others searching.
        rest = state["stuck"] | (size <= (self.tol or 0.0)) | ~size.isfinite()
        rhs = torch.where(rest.unsqueeze(-1), 0.0, -gradient)
        found = CG(self.cg_steps, self.cg_rtol)(Operator.symmetric(self._product(flat, z)), rhs)
        curvature = torch.fmax(found.curvature_max, size)
        fallback = rhs / column(torch.where(curvature > 0, curvature, 1.0), rhs)
        slope = dot(gradient, found.value)
        direction = torch.where((slope < 0).unsqueeze(-1), found.value, fallback)
        new_z, new_value, new_gradient, moved = backtrack(
            flat, z, value, gradient, direction, dot(gradient, direction), rest
        )
        return new_z, {
            "value": new_value,
            "gradient": new_gradient,
            "stuck": rest | ~moved,
        }

    def _product(self, flat: FlatProblem, z: Tensor) -> MatVec:
        """Products with the matrix at ``z``; one graph of the gradient serves all of them."""
        if self.matrix == "gauss-newton":
            product = gauss_newton(flat, z)
            assert product is not None
            return product
        z = z.detach().requires_grad_()
        graph = flat.with_outer(flat.outer, differentiable=True)
        with torch.enable_grad(), full_precision(z.device):
            gradient = graph.gradient(z)

        def pull(v: Tensor) -> Tensor:
            flat.counts["products"] += flat.count
            if not gradient.requires_grad:
                return torch.zeros_like(v)
            with full_precision(v.device):
                (product,) = torch.autograd.grad(
                    gradient, z, v, retain_graph=True, materialize_grads=True
                )
            return product

        return pull
