r"""`argmin`: the inner solution as a differentiable function of the outer variable.

Implicit methods put one node into the autograd graph, whose derivatives are nodes that are
differentiable by the same rule (`argmin_nodes`, `argmin_maps`): every order is exact at the
solution, whose Jacobian is $-(\partial_z F)^{-1}\partial_x F$. `Unrolled` leaves the graph of its
steps, or, under a transform, takes them again for each derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from .argmin_maps import Steps, call, refuse_norms
from .argmin_nodes import solution
from .argmin_problem import InnerProblem
from .argmin_transforms import depth, has_tangent
from .brief import brief
from .errors import DependenceError, NotDifferentiableError
from .flat import Outer
from .hypergradient import check_problem, group
from .inner_solver import InnerSolver
from .method import HypergradientMethod, ImplicitMethod
from .problem import BilevelProblem
from .pytree import PyTree, leaf_names, tree_leaves, tree_map
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

    It works in modules, under the transforms of `torch.func`, and in forward mode once; `vmap`
    joins the new dimension with the tasks, so that the inner solver runs once. Between the passes
    it keeps the solution, the outer variable and the data.

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
        NotDifferentiableError: ``method`` gives no derivative of the inner solution; or PyTorch
            would answer wrongly: forward mode twice, the older vmap of ``is_grads_batched``, or (in
            the second backward pass) the third derivative of a native norm layer.
        DependenceError: A tensor that is differentiated or mapped was not passed in ``outer`` (or,
            if only mapped, in the batch).

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
    unrolled = hasattr(method, "unroll")
    if not unrolled and not isinstance(method, ImplicitMethod):
        raise NotDifferentiableError(
            f"{brief(method)} gives a hypergradient but no derivative of the inner solution; use "
            "an implicit method or Unrolled"
        )
    variable = Outer.of(outer)
    strict = on_failure == "raise"
    trees: dict[int, PyTree] = {}
    stacked: PyTree = None
    for one in group(task, inner):
        _check_data(one.tasks)
        setting, data = InnerProblem.of(
            problem, inner_solver, method, variable, one.tasks, one.inner, strict=strict
        )
        if unrolled:
            z = _unroll(setting, data, variable.leaves)
        else:
            z = solution(setting, data, variable.leaves)
        stacked = setting.layout.vector.unflatten(z)
        for i, position in enumerate(one.positions):
            trees[position] = tree_map(lambda x, i=i: x[i], stacked)
    if isinstance(task, TaskBatch):
        return stacked
    return trees[0] if task is None or isinstance(task, Task) else [trees[i] for i in sorted(trees)]


def _check_data(tasks: TaskBatch) -> None:
    names, leaves = leaf_names(tasks.inner_batch, "inner_batch"), tree_leaves(tasks.inner_batch)
    for name, leaf in zip(names, leaves, strict=True):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            raise DependenceError(
                f"`{name}` of the task requires grad, but argmin has derivatives in `outer` only, "
                "so that its gradient would be lost: pass it in `outer`, or `.detach()` it"
            )


def _unroll(setting: InnerProblem, data: Sequence[Tensor], leaves: Sequence[Tensor]) -> Tensor:
    if depth() or has_tangent([*data, *leaves]):
        # Below the transforms, the steps taken again for every derivative.
        return call(Steps(setting), [*data, *leaves])[0]
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    z = setting.unroll(data, leaves, keep_graph=differentiable)
    if setting.layout.native_norms and z.requires_grad:
        z = _FirstOrderOnly.apply(setting.layout.native_norms, z)
    return z


class _FirstOrderOnly(Function):
    """The identity, whose second derivative is refused.

    A second derivative of the solution needs the third of the inner objective, and PyTorch's is
    wrong for its native norm layers.
    """

    @staticmethod
    def forward(names: set[str], z: Tensor) -> Tensor:
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
    def forward(names: set[str], cotangent: Tensor, z: Tensor) -> Tensor:
        return cotangent.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.names = inputs[0]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        refuse_norms(ctx.names)
        raise AssertionError  # they are not empty
