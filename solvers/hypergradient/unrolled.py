r"""Reverse-mode differentiation through the inner solver's steps (Domke, 2012; Finn et al., 2017).

$$\frac{dF}{dx} = \partial_x f + \sum_{t} \Big(\frac{\partial \Phi_t}{\partial x}\Big)^{\!\top}
  \Big(\frac{\partial z_T}{\partial z_t}\Big)^{\!\top} \partial_z f,
  \qquad z_t = \Phi_t(z_{t-1}, x)$$

Exact for the T-step map, whether or not it has converged. ``truncate=K`` differentiates the last K
steps only (Shaban et al., 2019). ``checkpoint`` stores one point for every segment of steps and
computes each segment again in the backward pass (Griewank and Walther, 2000): memory falls from T
to about 2√T steps for one more forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from bilevel.errors import NotDifferentiableError, StructureError
from bilevel.flat import FlatProblem
from bilevel.graph import fresh_leaf
from bilevel.inner_solver import Carry, InnerSolver, detached
from bilevel.kernels import Precision
from bilevel.method import Estimate, HypergradientMethod, Start
from bilevel.pytree import tree_flatten, tree_unflatten
from bilevel.registry import METHODS
from bilevel.rows import norm
from bilevel.status import Status, marked

__all__ = ["Unrolled"]

_FORGOTTEN = 1e-3


@METHODS.register("unrolled")
@dataclass(frozen=True)
class Unrolled(HypergradientMethod):
    """Differentiate through the inner solver's steps, and through `initial_inner` (MAML).

    Args:
        truncate: Differentiate the last K steps only; None: all.
        checkpoint: None or False: keep every step, memory linear in steps. True: segments of √T
            steps, memory about √T. A number: segments of that many steps.

    Raises:
        ValueError: A setting is out of range.
    """

    truncate: int | None = None
    checkpoint: bool | int | None = None

    def __post_init__(self) -> None:
        if self.truncate is not None and self.truncate < 1:
            raise ValueError(f"`truncate` is {self.truncate}; differentiate at least one step")
        if self.checkpoint is not None and self.checkpoint < 0:
            raise ValueError(f"`checkpoint` is {self.checkpoint}; pass True or a segment length")

    def require_precision(self, precision: Precision) -> None:
        """Refuse steps of low precision.

        Raises:
            NotDifferentiableError: The precision is not full.
        """
        if precision != "full":
            raise NotDifferentiableError(
                f"`precision` is {precision!r}, but Unrolled differentiates the "
                "steps, and all that rounding does to them; pass precision='full', or use an "
                "implicit method such as ImplicitCG"
            )

    def _compute(
        self, flat: FlatProblem, inner_solver: InnerSolver | None, weights: Tensor, start: Start
    ) -> Estimate:
        graph = flat.with_outer(flat.outer.differentiable(), differentiable=True)
        with torch.enable_grad():
            # No warm start: the derivative would lose the steps that led there.
            entry, carry = self._unroll(graph, inner_solver)
            outer_value, metrics = graph.evaluate(carry.z)
        z = carry.z.detach()
        if outer_value.requires_grad:
            # The backward pass takes about one product for each step differentiated.
            steps = int(carry.steps.max())
            if self.truncate is not None:
                steps = min(steps, self.truncate)
            flat.counts["products"] += steps * flat.count
        inner_value, gradient = flat.value_and_gradient(z)
        assert inner_solver is not None
        inner = inner_solver.report(
            detached(carry), norm(gradient), flat.notes.get("first_residual")
        )
        leaves = graph.outer.leaves
        gradients: Sequence[Tensor | None] = [None] * len(leaves)
        left = torch.zeros(flat.count, dtype=torch.float64, device=flat.device)
        if outer_value.requires_grad:
            *gradients, at_entry, at_end = torch.autograd.grad(
                outer_value,
                [*leaves, entry, carry.z],
                weights.to(outer_value.dtype),
                allow_unused=True,
            )
            left = _left(at_entry, at_end, left)
        # A tolerance asks for the solution's derivative, which has forgotten where steps began.
        unforgotten = (inner.status == Status.CONVERGED) & (left > _FORGOTTEN)
        status = marked(inner.status, unforgotten, Status.MAX_STEPS)
        inner = replace(inner, status=status)
        return Estimate(
            tuple(gradients),
            z,
            inner_value,
            outer_value.detach(),
            inner,
            derivative=left,
            metrics=metrics,
        )

    def unroll(self, graph: FlatProblem, inner_solver: InnerSolver | None) -> Carry:
        """Run the inner solver and keep the graph of the steps to differentiate.

        All steps are taken, whatever the tolerance: a point that is good enough, such as one that
        began at the solution, says nothing of the derivative, which begins anew.

        Raises:
            StructureError: There is no inner solver to differentiate.
            NotDifferentiableError: The solver's steps cannot be differentiated.
        """
        return self._unroll(graph, inner_solver)[1]

    def _unroll(self, graph: FlatProblem, inner_solver: InnerSolver | None) -> tuple[Tensor, Carry]:
        """The point at which differentiation begins, and the carry after the last step."""
        if inner_solver is None:
            raise StructureError(
                "Unrolled differentiates the inner solver's steps, but `inner_solver` is None; "
                "pass the solver, or use an implicit method"
            )
        inner_solver.require_differentiable()
        total = inner_solver.max_steps
        first = 0 if self.truncate is None else max(0, total - self.truncate)
        z = graph.initial()
        if first:
            plain = graph.with_outer(graph.outer.detached(), differentiable=False)
            with torch.no_grad():
                carry = inner_solver.begin(plain, z.detach())
                carry = detached(inner_solver.advance(plain, carry, 0, first))
            entry = fresh_leaf(carry.z)
            carry = replace(carry, z=entry)
        else:
            entry = z if z.requires_grad else fresh_leaf(z)
            carry = inner_solver.begin(graph, entry)
        if not self.checkpoint:
            return entry, inner_solver.advance(graph, carry, first, total, stop=False)
        length = self.checkpoint
        if length is True:
            length = max(1, math.isqrt(total - first))
        for left in range(first, total, length):
            last = min(left + length, total)
            carry = _segment(graph, inner_solver, carry, left, last)
        return entry, carry


def _left(at_entry: Tensor | None, at_end: Tensor | None, zero: Tensor) -> Tensor:
    """‖(∂z_T/∂z_0)ᵀ ∂f‖ / ‖∂f‖ for each task, float64."""
    if at_entry is None or at_end is None:
        return zero
    size = norm(at_end)
    return torch.where(size > 0, norm(at_entry) / torch.where(size > 0, size, 1.0), 0.0)


def _segment(graph: FlatProblem, solver: InnerSolver, carry: Carry, first: int, last: int) -> Carry:
    tensors, spec = tree_flatten([carry.z, carry.state, carry.active, carry.steps])
    work = _Work(graph, solver, spec, range(first, last), len(tensors))
    out = _Segment.apply(work, *tensors, *graph.outer.leaves)
    return Carry(*tree_unflatten(out, work.out_spec))


class _Work:
    """What a segment computes: some steps of the solver, as a function of tensors."""

    def __init__(
        self,
        graph: FlatProblem,
        solver: InnerSolver,
        spec: Any,
        steps: range,
        count: int,
    ) -> None:
        self.graph, self.solver, self.spec = graph, solver, spec
        self.steps, self.count = steps, count
        self.out_spec: Any = None

    def __call__(self, tensors: tuple[Tensor, ...], *, differentiable: bool) -> tuple[Tensor, ...]:
        carry = Carry(*tree_unflatten(tensors[: self.count], self.spec))
        outer = self.graph.outer.with_leaves(tensors[self.count :])
        graph = self.graph.with_outer(outer, differentiable=differentiable)
        first, last = self.steps.start, self.steps.stop
        carry = self.solver.advance(graph, carry, first, last, stop=False)
        out, self.out_spec = tree_flatten([carry.z, carry.state, carry.active, carry.steps])
        return tuple(out)


class _Segment(Function):
    """Some steps without a graph; the backward pass takes them again with one."""

    @staticmethod
    def forward(ctx: Any, work: _Work, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.work = work
        ctx.save_for_backward(*tensors)
        with torch.no_grad():
            out = work(tuple(t.detach() for t in tensors), differentiable=False)
        # An output that is an input (state that a step leaves alone) needs a tensor of its own.
        out = tuple(o.clone() for o in out)
        ctx.mark_non_differentiable(*(o for o in out if not _carries_gradient(o)))
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        work: _Work = ctx.work
        with torch.enable_grad():
            # Aliases keep partial derivatives partial where one input depends on another.
            inputs = tuple(t.view_as(t) if t.requires_grad else t for t in ctx.saved_tensors)
            out = work(inputs, differentiable=True)
        pairs = [(o, c) for o, c in zip(out, cotangents, strict=True) if o.requires_grad]
        wanted = [t for t in inputs if t.requires_grad]
        if not pairs or not wanted:
            return (None, *(None for _ in inputs))
        gradients = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [c for _, c in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        )
        return (None, *(next(gradients) if t.requires_grad else None for t in inputs))


def _carries_gradient(tensor: Tensor) -> bool:
    # State without a dimension of tasks counts steps.
    return tensor.is_floating_point() and tensor.ndim > 0
