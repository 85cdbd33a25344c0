"""The one verb: `hypergradient`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .assembly import Part, Verdict, assemble
from .engine import Engine, check_engine, chunk_size
from .errors import BilevelWarning, InPlaceError
from .flat import FlatProblem, Outer
from .inner_solver import InnerSolver
from .kernels import Kernels, check_kernels
from .method import Estimate, HypergradientMethod, Start
from .probe import probe
from .problem import BilevelProblem
from .pytree import PyTree, tree_map
from .result import Hypergradient, State
from .rows import all_finite
from .status import Status
from .task import Task, TaskBatch, group_by_shape

__all__ = ["hypergradient"]

_FAR = 0.05


def hypergradient(
    problem: BilevelProblem,
    outer: PyTree,
    task: Task | TaskBatch | Sequence[Task] | None = None,
    *,
    inner_solver: InnerSolver | None,
    method: HypergradientMethod,
    inner: PyTree = None,
    state: State | None = None,
    reduction: Literal["mean", "none"] = "mean",
    engine: Engine = "batched",
    task_chunk: int | None = None,
    kernels: Kernels | None = None,
) -> Hypergradient:
    r"""Compute the hypergradient of $F(x) = f(x, z^\star(x))$, the mean over tasks.

    $$\frac{dF}{dx} = \partial_x f - (\partial_x \partial_z G)^\top v, \qquad
      (\partial^2_{zz} G)\, v = \partial_z f$$

    (implicit methods; Pedregosa, 2016, eq. 2; Rajeswaran et al., 2019, eq. 6 is the instance with
    the proximal regularizer at the identity). Tasks whose status is DIVERGED or NON_FINITE are
    left out of the mean and named in ``diagnostics.failed``.

    Args:
        problem: The problem, written for one task.
        outer: The outer variable x, a pytree of floating tensors. It is not changed.
        task: A `Task`, stacked tasks, or a list of tasks of any shapes (stacked by shape inside).
            None: one task without data.
        inner_solver: Finds z*. None: ``inner`` is the solution already.
        method: How the hypergradient is computed.
        inner: A constant point to start from instead of `initial_inner`: a pytree like the inner
            variable for a `Task`, stacked for a `TaskBatch`, a list for a list.
        state: ``state`` of an earlier result on the same tasks: warm starts.
        reduction: ``"mean"``, or ``"none"`` for one gradient per task.
        engine: ``"batched"``: tasks of one shape are stacked and solved at once. ``"loop"``: one
            after the other. ``"auto"``: whichever is faster, measured at the first call for each
            problem, device, shape, and kind of solver and method; on a CPU it stacks 8 tasks at a
            time. The two differ by rounding, so that ``"auto"`` may give other bits in another
            process.
        task_chunk: Stack at most so many tasks at a time, which bounds memory; None: all.
        kernels: Compilation, precision of the inner steps, and how products are computed; None:
            `Kernels()`, nothing of the kind.

    Raises:
        SolveError: No task has a usable hypergradient; nothing is returned.
        DependenceError: Nothing depends on ``outer``.
        ObjectiveError: A user's function returns something of the wrong kind.
        ValueError: An argument has the wrong kind, shape or value; it is named.

    Example:
        >>> import torch
        >>> from bilevel import Proximal, hypergradient, problem_from
        >>> from bilevel.solvers import GradientDescent, ImplicitCG
        >>> problem = problem_from(
        ...     lambda z, x, batch: 0.5 * (z**2).sum(),
        ...     lambda z, x, batch: z.sum(),
        ...     Proximal(1.0),
        ... )
        >>> result = hypergradient(
        ...     problem,
        ...     torch.ones(3),
        ...     inner_solver=GradientDescent(lr=0.5, max_steps=100, tol=1e-6),
        ...     method=ImplicitCG(),
        ... )
        >>> result.gradient
        tensor([0.5000, 0.5000, 0.5000])
        >>> result.ok
        True
    """
    result = compute(
        problem,
        outer,
        task,
        inner_solver=inner_solver,
        method=method,
        inner=inner,
        state=state,
        reduction=reduction,
        engine=engine,
        task_chunk=task_chunk,
        kernels=kernels,
    )
    _warn_if_far(result)
    return result


def compute(
    problem: BilevelProblem,
    outer: PyTree,
    task: Task | TaskBatch | Sequence[Task] | None = None,
    *,
    inner_solver: InnerSolver | None,
    method: HypergradientMethod,
    inner: PyTree = None,
    state: State | None = None,
    reduction: Literal["mean", "none"] = "mean",
    engine: Engine = "batched",
    task_chunk: int | None = None,
    kernels: Kernels | None = None,
) -> Hypergradient:
    """`hypergradient` for callers that choose the tolerance of the inner solver themselves."""
    if reduction not in ("mean", "none"):
        raise ValueError(f"`reduction` is {reduction!r}; pass 'mean' or 'none'")
    check_engine(engine, task_chunk)
    check_kernels(kernels)
    check_problem(problem, inner_solver, method, inner)
    variable = Outer.of(outer)
    groups = group(task, inner)
    if state is not None and len(state.inner) != len(groups):
        raise ValueError(
            f"`state` holds {len(state.inner)} groups of tasks but `task` has {len(groups)}; pass "
            "the state of a call on the same tasks"
        )
    parts: list[list[Part]] = []
    engines: list[Engine] = []
    for i, one in enumerate(groups):
        start = _start(state, i)

        def run(count: int, size: int, one: Group = one, start: Start = start) -> list[Part]:
            return [
                _group_hypergradient(
                    problem,
                    variable,
                    one.part(first, first + size),
                    inner_solver,
                    method,
                    start.part(first, first + size),
                    kernels,
                    per_task=reduction == "none",
                )
                for first in range(0, count, size)
            ]

        # Kinds alone: tolerances may change from call to call.
        settings = (type(inner_solver), type(method), kernels, reduction)
        place = (problem, variable, one.tasks, one.inner)
        size = chunk_size(*place, engine, task_chunk, settings, run)
        engines.append("loop" if size == 1 < one.tasks.count else "batched")
        parts.append(run(one.tasks.count, size))
    return assemble(variable, task, parts, engines, method, reduction)


# Tasks of one shape


@dataclass(frozen=True)
class Group:
    """Stacked tasks of one shape, their positions in the user's list, and their start."""

    tasks: TaskBatch
    positions: list[int]
    inner: PyTree

    def part(self, first: int, last: int) -> Group:
        """Its tasks ``first`` to ``last - 1``, as far as there are."""
        if last - first >= self.tasks.count:
            return self
        inner = None if self.inner is None else tree_map(lambda x: x[first:last], self.inner)
        return Group(self.tasks.part(first, last), self.positions[first:last], inner)


def check_problem(problem: object, inner_solver: object, method: object, inner: PyTree) -> None:
    """Check the kinds of the arguments that every verb shares.

    Raises:
        ValueError: One is of the wrong kind, or there is no inner solution.
    """
    for name, value, kind in (
        ("problem", problem, BilevelProblem),
        ("method", method, HypergradientMethod),
    ):
        if not isinstance(value, kind):
            what = (
                value.__name__ + " (a class)" if isinstance(value, type) else type(value).__name__
            )
            raise ValueError(f"`{name}` is a {what}; pass an instance of {kind.__name__}")
    if inner_solver is None:
        if inner is None:
            raise ValueError(
                "`inner_solver` is None but no `inner` is given; pass a solver, or the solution"
            )
    elif not isinstance(inner_solver, InnerSolver):
        what = type(inner_solver).__name__
        raise ValueError(f"`inner_solver` is a {what}; pass an InnerSolver, or None with `inner`")


def group(task: Task | TaskBatch | Sequence[Task] | None, inner: PyTree) -> list[Group]:
    """Stack whatever was passed as ``task`` into groups of one shape."""
    if task is None:
        task = Task()
    if isinstance(task, Task):
        return [Group(task.alone, [0], lift(inner))]
    if isinstance(task, TaskBatch):
        return [Group(task, list(range(task.count)), inner)]
    if not isinstance(task, list | tuple):
        raise ValueError(
            f"`task` is a {type(task).__name__}; pass a Task, a TaskBatch or a list of Task"
        )
    if inner is not None and (not isinstance(inner, list | tuple) or len(inner) != len(task)):
        raise ValueError("`inner` must be a list with one point per task where `task` is a list")
    return [
        Group(tasks, where, None if inner is None else stack_trees([inner[i] for i in where]))
        for tasks, where in group_by_shape(task)
    ]


def _start(state: State | None, i: int) -> Start:
    if state is None:
        return Start()
    return Start(state.inner[i], state.adjoint[i], state.pairs[i] if state.pairs else None)


def check_warm_start(flat: FlatProblem, name: str, value: Tensor | None) -> None:
    """Raise where a part of a state is of other tasks.

    Raises:
        ValueError: It has another shape.
    """
    if value is not None and value.shape != flat.start.shape:
        raise ValueError(
            f"`state.{name}` is {tuple(value.shape)} but the tasks need "
            f"{tuple(flat.start.shape)}; pass the state of a call on the same tasks"
        )


def warm_inner(flat: FlatProblem, inner: Tensor | None) -> Tensor | None:
    """Where to start from: a task that failed left no point, and begins anew."""
    check_warm_start(flat, "inner", inner)
    if inner is None:
        return None
    return torch.where(all_finite(inner).unsqueeze(-1), inner, flat.start)


def _group_hypergradient(
    problem: BilevelProblem,
    outer: Outer,
    one: Group,
    inner_solver: InnerSolver | None,
    method: HypergradientMethod,
    start: Start,
    kernels: Kernels | None,
    *,
    per_task: bool,
) -> Part:
    data = one.tasks.tensors
    before = [tensor._version for tensor in data]
    flat = FlatProblem.of(problem, outer, one.tasks, one.inner, kernels)
    probe(flat)
    start = replace(start, inner=warm_inner(flat, start.inner))
    check_warm_start(flat, "adjoint", start.adjoint)
    if per_task:
        flat = flat.expanded()
    assert one.tasks.weights is not None
    weights = one.tasks.weights.to(flat.device)
    if per_task:
        weights = torch.ones_like(weights)
    estimate = method(flat, inner_solver, weights, start)
    if [tensor._version for tensor in data] != before:
        raise InPlaceError(
            "a function of the problem changed `inner_batch` or `outer_batch` in place, which it "
            "did not do when it was first looked at; write to a copy: `.clone()` it first"
        )
    verdict = Verdict.of(estimate, per_task=per_task)
    if per_task or verdict.usable:
        # The weights as they came: where they lie on the host, no device is asked.
        weight = 1.0 if per_task else float(one.tasks.weights.sum())
        return Part(one.positions, flat, estimate, verdict, estimate.gradient, weight)
    return _without_failed(
        one.positions, flat, inner_solver, method, weights, start, estimate, verdict
    )


def _without_failed(
    positions: list[int],
    flat: FlatProblem,
    inner_solver: InnerSolver | None,
    method: HypergradientMethod,
    weights: Tensor,
    start: Start,
    estimate: Estimate,
    verdict: Verdict,
) -> Part:
    """Compute again without the failed tasks: no weight hides them, since 0 · NaN is NaN."""
    if not any(verdict.failed):
        # All solves are fine but the sum is not finite: ask each task for its own gradient.
        single = method(flat.expanded(), inner_solver, torch.ones_like(weights), start)
        verdict = replace(verdict, tasks=Verdict.of(single, per_task=True).tasks)
    good = torch.tensor([i for i, bad in enumerate(verdict.failed) if not bad], dtype=torch.int64)
    good = good.to(flat.device)
    gradient: tuple[Tensor | None, ...] = (None,) * len(flat.outer.leaves)
    if len(good):
        pick = start.select(good)
        gradient = method(flat.select(good), inner_solver, weights[good], pick).gradient
    return Part(positions, flat, estimate, verdict, gradient, float(weights[good].sum()))


# Small parts


def _warn_if_far(result: Hypergradient) -> None:
    """A tolerance in ‖∂_z G‖ has the objective's units: a small enough objective meets any."""
    converged = [s is Status.CONVERGED for s in result.diagnostics.inner.status]
    distance = result.diagnostics.inner_distance if any(converged) else None
    if distance is None:
        return
    far = (distance.cpu() > _FAR) & torch.tensor(converged)
    if bool(far.any()):
        warnings.warn(
            f"tasks {far.nonzero().flatten().tolist()[:8]} are within the inner solver's `tol`, "
            "but by the curvature that was met their inner solution is still about "
            f"{distance.cpu()[far].max().item():.0%} of its size away: lower `tol`, which is "
            "absolute, or scale the inner objective up",
            BilevelWarning,
            stacklevel=3,
        )


def lift(tree: PyTree) -> PyTree:
    """Give every tensor a leading dimension of one task."""
    return None if tree is None else tree_map(lambda x: x.unsqueeze(0), tree)


def stack_trees(trees: Sequence[PyTree]) -> PyTree:
    """Stack pytrees of one structure along a new dimension 0."""
    return tree_map(lambda *leaves: torch.stack(leaves), trees[0], *trees[1:])
