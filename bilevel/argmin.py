r"""`argmin`: the inner solution as a differentiable function of the outer variable.

Implicit methods put one node into the autograd graph. Its backward pass solves the adjoint system
by a second node that is differentiable itself, by the same rule, and so on: every order of
derivative is exact at the solution, whose Jacobian is $-(\partial_z F)^{-1}\partial_x F$.
`Unrolled` leaves the graph of its steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .errors import NotDifferentiableError, SolveError
from .flat import FlatProblem, Outer
from .hypergradient import Group, check_problem, group
from .inner_solver import Carry, InnerSolver, detached
from .linearised import LinearisedSystem
from .method import HypergradientMethod, ImplicitMethod
from .probe import probe
from .problem import BilevelProblem
from .pytree import PyTree, tree_map
from .rows import full_precision, norm
from .status import describe_status, members
from .task import Task, TaskBatch

__all__ = ["argmin"]


def argmin(
    problem: BilevelProblem,
    outer: PyTree,
    task: Task | TaskBatch | Sequence[Task] | None = None,
    *,
    inner_solver: InnerSolver,
    method: HypergradientMethod,
    inner: PyTree = None,
    on_failure: Literal["raise", "ignore"] = "raise",
) -> PyTree:
    """Return the inner solution, in the autograd graph of ``outer``; differentiable to any order.

    Args:
        problem: The bilevel problem; its outer objective is not used.
        outer: The outer variable, a pytree of floating tensors, in a graph or not.
        task: A `Task`, stacked tasks, or a list of tasks; None: one without data.
        inner_solver: Finds the solution.
        method: An implicit method, whose linear solver also serves the backward pass; or one that
            unrolls the steps.
        inner: A constant point to start from.
        on_failure: ``"raise"`` if a solve, forward or backward, is not CONVERGED or BUDGET;
            ``"ignore"`` to go on with what was found.

    Returns:
        A pytree for a `Task`, stacked for a `TaskBatch`, a list of pytrees for a list.

    Raises:
        SolveError: A solve failed and ``on_failure`` is ``"raise"``.
        NotDifferentiableError: ``method`` gives no derivative of the inner solution, or (in the
            second backward pass) PyTorch's third derivative of a norm layer would be wrong.

    Example:
        >>> import torch
        >>> from bilevel import Proximal, argmin, problem_from
        >>> from bilevel.solvers import GradientDescent, ImplicitCG
        >>> problem = problem_from(
        ...     lambda z, x, batch: 0.5 * (z**2).sum(), lambda z, x, batch: z.sum(), Proximal(1.0)
        ... )
        >>> x = torch.ones(2, requires_grad=True)
        >>> solver = GradientDescent(lr=0.5, max_steps=1)
        >>> argmin(problem, x, inner_solver=solver, method=ImplicitCG()).sum().backward()
        >>> x.grad
        tensor([0.5000, 0.5000])
    """
    if on_failure not in ("raise", "ignore"):
        raise ValueError(f"`on_failure` is {on_failure!r}; pass 'raise' or 'ignore'")
    check_problem(problem, inner_solver, method, inner)
    unroll = getattr(method, "unroll", None)
    if unroll is None and not isinstance(method, ImplicitMethod):
        raise NotDifferentiableError(
            f"{method!r} gives a hypergradient but no derivative of the inner solution; use an "
            "implicit method or Unrolled"
        )
    variable = Outer.of(outer)
    if any(forward_ad.unpack_dual(leaf).tangent is not None for leaf in variable.leaves):
        raise NotDifferentiableError(
            "`outer` carries a forward-mode tangent, and argmin is differentiated in reverse: use "
            "`.backward()`, torch.autograd.grad or torch.func.grad"
        )
    strict = on_failure == "raise"
    trees: dict[int, PyTree] = {}
    stacked: PyTree = None
    for one in group(task, inner):
        if unroll is None:
            assert isinstance(method, ImplicitMethod)
            context = _Context(problem, variable, one, inner_solver, method, strict)
            z = _Argmin.apply(context, *variable.leaves)
            flat = context.flat
        else:
            flat = FlatProblem.of(problem, variable, one.tasks, one.inner)
            probe(flat)
            carry = unroll(flat.with_outer(variable, differentiable=True), inner_solver)
            _check_solve(flat, inner_solver, carry, strict=strict)
            z = carry.z
            if not (torch.is_grad_enabled() and any(x.requires_grad for x in variable.leaves)):
                z = z.detach()
        if flat.stacking.native_norms and z.requires_grad:
            z = _FirstOrderOnly.apply(", ".join(sorted(flat.stacking.native_norms)), z)
        stacked = flat.vector.unflatten(z)
        for i, position in enumerate(one.positions):
            trees[position] = tree_map(lambda x, i=i: x[i], stacked)
    if isinstance(task, TaskBatch):
        return stacked
    return trees[0] if task is None or isinstance(task, Task) else [trees[i] for i in sorted(trees)]


def _check_solve(flat: FlatProblem, solver: InnerSolver, carry: Carry, *, strict: bool) -> None:
    if not strict:
        return
    plain = detached(carry)
    residual = norm(flat.gradient(plain.z))
    status = members(solver.report(plain, residual, flat.notes.get("first_residual")).status)
    if not all(s.ok for s in status):
        raise SolveError(
            f"the inner solve failed: {describe_status(status)} Pass on_failure='ignore' to go on."
        )


class _Context:
    """What the nodes share beside tensors."""

    def __init__(
        self,
        problem: BilevelProblem,
        outer: Outer,
        one: Group,
        solver: InnerSolver,
        method: ImplicitMethod,
        strict: bool,
    ) -> None:
        self.problem, self.outer, self.one = problem, outer, one
        self.solver, self.method, self.strict = solver, method, strict
        self.flat: FlatProblem

    def solve_inner(self, leaves: Sequence[Tensor]) -> Tensor:
        """The inner solution ``[tasks, n]``, without a graph."""
        outer = self.outer.with_leaves(leaves).detached()
        with torch.enable_grad():
            self.flat = FlatProblem.of(self.problem, outer, self.one.tasks, self.one.inner)
            probe(self.flat)
            self.method.check(self.flat)
            carry = self.solver.solve(self.flat)
            _check_solve(self.flat, self.solver, carry, strict=self.strict)
        return carry.z.detach().clone()

    def stationarity(self, z: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """F(z, x) with its graph."""
        flat = self.flat.with_outer(self.flat.outer.with_leaves(leaves), differentiable=True)
        with full_precision(z.device):
            return flat.gradient(z)

    def solve_adjoint(
        self, z: Tensor, leaves: Sequence[Tensor], rhs: Tensor, *, transpose: bool
    ) -> Tensor:
        """Solve (∂_z F)ᵀ v = rhs, or ∂_z F v = rhs, without a graph for v."""
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            stationarity = self.stationarity(z, leaves)
        flat = self.flat.with_outer(self.flat.outer.with_leaves(leaves), differentiable=True)
        nothing = z.new_zeros(len(z))
        system = LinearisedSystem(flat, z, stationarity, nothing, nothing, rhs.detach())
        operator = system.operator if transpose else system.operator.T
        found = self.method.solve(operator, system.rhs)
        status = members(found.status)
        if self.strict and not all(s.ok for s in status):
            raise SolveError(
                f"the adjoint solve failed: {describe_status(status)} Pass on_failure='ignore' to "
                "go on."
            )
        return found.value.detach()


class _Argmin(Function):
    """z*(x). Backward: −(∂_x F)ᵀ v with (∂_z F)ᵀ v = cotangent."""

    @staticmethod
    def forward(context: _Context, *leaves: Tensor) -> Tensor:
        return context.solve_inner(leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        context, *leaves = inputs
        ctx.context = context
        ctx.save_for_backward(output, *leaves)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        z, *leaves = ctx.saved_tensors
        v = _Adjoint.apply(ctx.context, True, z, cotangent, *leaves)
        gradients = _cross(ctx.context, z, leaves, v)
        return (None, *gradients)


class _Adjoint(Function):
    """v = (∂_z F)⁻ᵀ b (or without transposition); differentiable, by itself, to any order."""

    @staticmethod
    def forward(
        context: _Context, transpose: bool, z: Tensor, rhs: Tensor, *leaves: Tensor
    ) -> Tensor:
        return context.solve_adjoint(z, leaves, rhs, transpose=transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        context, transpose, z, _, *leaves = inputs
        ctx.context, ctx.transpose = context, transpose
        ctx.save_for_backward(z, output, *leaves)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        context: _Context = ctx.context
        z, v, *leaves = ctx.saved_tensors
        # d(J⁻ᵀ b) = J⁻ᵀ (db − dJᵀ v): one solve with the other transposition, then a derivative.
        w = _Adjoint.apply(context, not ctx.transpose, z, cotangent, *leaves)
        left, right = (v, w) if ctx.transpose else (w, v)
        with torch.enable_grad():
            za = _alias(z)
            la = [_alias(leaf) for leaf in leaves]
            stationarity = context.stationarity(za, la)
            (product,) = torch.autograd.grad(
                stationarity, za, left, create_graph=True, materialize_grads=True
            )
            scalar = (product * right).sum()
        gradients: list[Tensor | None] = [None] * (1 + len(la))
        if scalar.requires_grad:
            gradients = list(
                torch.autograd.grad(
                    scalar, [za, *la], create_graph=torch.is_grad_enabled(), allow_unused=True
                )
            )
        dz, *dx = (None if g is None else -g for g in gradients)
        return (None, None, dz, w, *dx)


class _FirstOrderOnly(Function):
    """The identity, whose second derivative is refused.

    A second derivative of the solution needs the third of the inner objective, and PyTorch's is
    wrong for its native norm layers.
    """

    @staticmethod
    def forward(names: str, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.names = inputs[0]
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        return None, _Refuse.apply(ctx.names, cotangent, *ctx.saved_tensors)


class _Refuse(Function):
    """Hands a cotangent on; differentiating it raises. It takes z to stand on every such path."""

    @staticmethod
    def forward(names: str, cotangent: Tensor, z: Tensor) -> Tensor:
        return cotangent.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.names = inputs[0]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        raise NotDifferentiableError(
            f"a second derivative through argmin needs the third derivative of `{ctx.names}`, and "
            "PyTorch's is 3-20 % wrong for its batch, instance and layer norm; use GroupNorm, "
            "RMSNorm, or a norm written with var_mean and rsqrt, which are exact"
        )


def _cross(
    context: _Context, z: Tensor, leaves: Sequence[Tensor], v: Tensor
) -> list[Tensor | None]:
    """−(∂_x F)ᵀ v for each leaf, differentiable in everything."""
    with torch.enable_grad():
        la = [_alias(leaf) for leaf in leaves]
        stationarity = context.stationarity(_alias(z), la)
    if not stationarity.requires_grad:
        return [None] * len(la)
    gradients = torch.autograd.grad(
        stationarity, la, v, create_graph=torch.is_grad_enabled(), allow_unused=True
    )
    return [None if g is None else -g for g in gradients]


def _alias(tensor: Tensor) -> Tensor:
    """The same tensor as a new node, so that partial derivatives stay partial."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
