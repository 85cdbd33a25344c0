"""The one verb: `hypergradient`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .engine import Engine, check_engine, chunk_size
from .errors import BilevelWarning, DependenceError, InPlaceError, ObjectiveError, SolveError
from .flat import FlatProblem, Outer
from .inner_solver import InnerReport, InnerSolver
from .linear_solver import LinearSolution
from .method import Estimate, HypergradientMethod, ImplicitMethod, Start
from .operator import SecantPairs
from .probe import probe
from .problem import BilevelProblem
from .pytree import PyTree, tree_map, tree_unflatten
from .result import Diagnostics, Hypergradient, SolveReport, State
from .rows import all_finite
from .status import Status, describe_status, marked, members
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
            problem, device and shape; on a CPU it stacks 8 tasks at a time. The two differ by
            rounding, so that ``"auto"`` may give other bits in another process.
        task_chunk: Stack at most so many tasks at a time, which bounds memory; None: all.

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
) -> Hypergradient:
    """`hypergradient` for callers that choose the tolerance of the inner solver themselves."""
    if reduction not in ("mean", "none"):
        raise ValueError(f"`reduction` is {reduction!r}; pass 'mean' or 'none'")
    check_engine(engine, task_chunk)
    check_problem(problem, inner_solver, method, inner)
    variable = Outer.of(outer)
    groups = group(task, inner)
    if state is not None and len(state.inner) != len(groups):
        raise ValueError(
            f"`state` holds {len(state.inner)} groups of tasks but `task` has {len(groups)}; pass "
            "the state of a call on the same tasks"
        )
    parts: list[list[_Part]] = []
    engines: list[Engine] = []
    for i, one in enumerate(groups):
        size = chunk_size(problem, variable, one.tasks, one.inner, engine, task_chunk)
        engines.append("loop" if size == 1 < one.tasks.count else "batched")
        start = _start(state, i)
        parts.append(
            [
                _group_hypergradient(
                    problem,
                    variable,
                    one.part(first, first + size),
                    inner_solver,
                    method,
                    start.part(first, first + size),
                    per_task=reduction == "none",
                )
                for first in range(0, one.tasks.count, size)
            ]
        )
    result = _assemble(variable, task, parts, method, reduction)
    return replace(result, diagnostics=replace(result.diagnostics, engine=tuple(engines)))


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


@dataclass(frozen=True)
class _Part:
    """The hypergradient of one stack; ``estimate`` is that of all tasks, failed ones included."""

    positions: list[int]
    flat: FlatProblem
    estimate: Estimate
    status: Tensor
    gradient: tuple[Tensor | None, ...]
    weight: float


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
        return [Group(Task.stack([task]), [0], lift(inner))]
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


def _group_hypergradient(
    problem: BilevelProblem,
    outer: Outer,
    one: Group,
    inner_solver: InnerSolver | None,
    method: HypergradientMethod,
    start: Start,
    *,
    per_task: bool,
) -> _Part:
    before = _versions(one.tasks)
    flat = FlatProblem.of(problem, outer, one.tasks, one.inner)
    probe(flat)
    for name, value in (("inner", start.inner), ("adjoint", start.adjoint)):
        if value is not None and value.shape != flat.start.shape:
            raise ValueError(
                f"`state.{name}` is {tuple(value.shape)} but the tasks need "
                f"{tuple(flat.start.shape)}; pass the state of a call on the same tasks"
            )
    if start.inner is not None:
        # A task that failed leaves no point to start from; begin it anew.
        finite = all_finite(start.inner).unsqueeze(-1)
        start = replace(start, inner=torch.where(finite, start.inner, flat.start))
    if per_task:
        flat = flat.expanded()
    assert one.tasks.weights is not None
    weights = one.tasks.weights.to(flat.device)
    if per_task:
        weights = torch.ones_like(weights)
    estimate = method(flat, inner_solver, weights, start)
    if _versions(one.tasks) != before:
        raise InPlaceError(
            "a function of the problem changed `inner_batch` or `outer_batch` in place, which it "
            "did not do when it was first looked at; write to a copy: `.clone()` it first"
        )
    status = _with_gradient_status(estimate, per_task)
    if _all_usable(status, estimate.gradient):
        # The weights as they came: where they lie on the host, no device is asked.
        return _Part(
            one.positions,
            flat,
            estimate,
            status,
            estimate.gradient,
            float(one.tasks.weights.sum()),
        )
    if per_task:
        return _Part(one.positions, flat, estimate, status, estimate.gradient, 1.0)
    return _without_failed(
        one.positions, flat, inner_solver, method, weights, start, estimate, status
    )


def _versions(tasks: TaskBatch) -> list[int]:
    """How often each tensor of the data was written to: one task alone shares the user's memory."""
    return [tensor._version for tensor in tasks.tensors]


def _without_failed(
    positions: list[int],
    flat: FlatProblem,
    inner_solver: InnerSolver | None,
    method: HypergradientMethod,
    weights: Tensor,
    start: Start,
    estimate: Estimate,
    status: Tensor,
) -> _Part:
    """Compute again without the failed tasks: no weight hides them, since 0 · NaN is NaN."""
    if bool((status < Status.DIVERGED).all()):
        # All solves are fine but the sum is not finite: ask each task for its own gradient.
        single = method(flat.expanded(), inner_solver, torch.ones_like(weights), start)
        status = _with_gradient_status(single, per_task=True)
    good = (status < Status.DIVERGED).nonzero().squeeze(-1)
    gradient: tuple[Tensor | None, ...] = (None,) * len(flat.outer.leaves)
    if len(good):
        pick = start.select(good)
        gradient = method(flat.select(good), inner_solver, weights[good], pick).gradient
    return _Part(positions, flat, estimate, status, gradient, float(weights[good].sum()))


def _with_gradient_status(estimate: Estimate, per_task: bool) -> Tensor:
    status = estimate.status
    if not per_task:
        return status
    for leaf in estimate.gradient:
        if leaf is not None:
            finite = all_finite(leaf.reshape(leaf.shape[0], -1)).to(status.device)
            status = marked(status, ~finite, Status.NON_FINITE)
    return status


def _all_usable(status: Tensor, gradient: Sequence[Tensor | None]) -> bool:
    """Whether every task is usable and the gradient finite; the device is asked once."""
    flags = [(status < Status.DIVERGED).all()]
    places: dict[torch.device, list[Tensor]] = {}
    for leaf in gradient:
        if leaf is not None:
            places.setdefault(leaf.device, []).append(leaf.reshape(-1))
    flags += [all_finite(torch.cat(leaves)).to(status.device) for leaves in places.values()]
    return bool(torch.stack(flags).all())


# All groups together


def _assemble(
    outer: Outer,
    task: Task | TaskBatch | Sequence[Task] | None,
    stacks: list[list[_Part]],
    method: HypergradientMethod,
    reduction: str,
) -> Hypergradient:
    parts = [part for stack in stacks for part in stack]
    order = None if len(parts) == 1 else _order(parts)

    def in_order(tensors: Sequence[Tensor]) -> Tensor:
        if order is None:
            # A copy: a user's metric may be a piece of `outer`, which the optimizer changes.
            return tensors[0].detach().clone(memory_format=torch.contiguous_format)
        return torch.cat([tensor.detach() for tensor in tensors])[order.to(tensors[0].device)]

    status, inner_status, linear_status = _statuses(parts, order)
    failed = tuple(i for i, s in enumerate(status) if not s.usable)
    if len(failed) == len(status):
        raise SolveError(
            f"no task has a usable hypergradient; {describe_status(status)} `outer` is unchanged."
        )
    unused = _check_dependence(outer, parts, method)
    mean = reduction == "mean"
    gradient = _mean(outer, parts) if mean else _per_task(outer, parts, in_order)
    inner_report = _report([part.estimate.inner for part in parts], inner_status, in_order)
    linear = [part.estimate.linear for part in parts]
    counts: dict[str, int] = {}
    for part in parts:
        for key, value in part.flat.counts.items():
            counts[key] = counts.get(key, 0) + value
    metrics = [
        part.flat.metrics(part.estimate.z)
        if part.estimate.metrics is None
        else part.estimate.metrics
        for part in parts
    ]
    if any(one.keys() != metrics[0].keys() for one in metrics):
        names = [sorted(one) for one in metrics]
        raise ObjectiveError(
            f"`metrics` returned the names {names} for tasks of different shapes; return the same "
            "names for every task"
        )
    return Hypergradient(
        gradient=tree_unflatten(gradient, outer.spec),
        inner=_inner(task, parts),
        outer_value=in_order([part.estimate.outer_value for part in parts]),
        inner_value=in_order([part.estimate.inner_value for part in parts]),
        metrics={key: in_order([one[key] for one in metrics]) for key in metrics[0]},
        status=status,
        state=_state(stacks),
        diagnostics=Diagnostics(
            inner=inner_report,
            linear=_report([one for one in linear if one is not None], linear_status, in_order)
            if all(one is not None for one in linear)
            else None,
            counts=counts,
            unused=unused,
            failed=failed,
            inner_distance=_all_of([part.estimate.distance for part in parts], in_order),
            derivative_residual=_all_of([part.estimate.derivative for part in parts], in_order),
            **_accuracy(parts, in_order),
        ),
        _spec=outer.spec,
    )


def _order(parts: list[_Part]) -> Tensor:
    """Where each task of the user's lies among the parts' tasks."""
    return torch.tensor([p for one in parts for p in one.positions]).argsort()


def _mean(outer: Outer, parts: list[_Part]) -> list[Tensor]:
    total = math.fsum(part.weight for part in parts)
    if total == 0.0:
        raise SolveError("the weights of all usable tasks are zero; give one a weight > 0")
    out = []
    for j, leaf in enumerate(outer.leaves):
        terms = [part.gradient[j] for part in parts]
        found = [term for term in terms if term is not None]
        out.append(sum(found[1:], found[0]) / total if found else torch.zeros_like(leaf))
    return [leaf.detach() for leaf in out]


def _per_task(
    outer: Outer, parts: list[_Part], in_order: Callable[[Sequence[Tensor]], Tensor]
) -> list[Tensor]:
    out = []
    for j, leaf in enumerate(outer.leaves):
        terms = []
        for part in parts:
            term = part.gradient[j]
            terms.append(leaf.new_zeros(part.flat.count, *leaf.shape) if term is None else term)
        out.append(in_order(terms))
    return out


def _check_dependence(
    outer: Outer, parts: list[_Part], method: HypergradientMethod
) -> tuple[str, ...]:
    used = [any(part.gradient[j] is not None for part in parts) for j in range(len(outer.names))]
    unused = tuple(name for name, flag in zip(outer.names, used, strict=True) if not flag)
    implicit = isinstance(method, ImplicitMethod)
    constant = implicit and not any(part.estimate.inner_depends for part in parts)
    cure = (
        "add a regularizer, Proximal(strength), whose center is `outer`, or use Unrolled or "
        "FirstOrder, which differentiate through `initial_inner`"
        if implicit
        else "use `outer` in an objective; implicit methods and Unrolled see a use in "
        "`inner_objective` too, so take ImplicitCG where that is the only one"
    )
    if len(unused) == len(outer.names):
        raise DependenceError(
            f"{type(method).__name__} finds that neither the inner solution nor the outer "
            f"objective depends on `outer`, so that its hypergradient is zero everywhere: {cure}"
        )
    if constant:
        warnings.warn(
            "the inner problem does not depend on `outer`: its solution is constant, and the "
            f"hypergradient is ∂f/∂outer alone: {cure}",
            BilevelWarning,
            stacklevel=5,
        )
    if unused:
        warnings.warn(
            f"{type(method).__name__} finds no dependence on "
            f"{', '.join(f'`{name}`' for name in unused)}, and the gradient there is zero: use it "
            "in an objective, or leave it out of `outer`"
            + ("" if implicit else "; an implicit method sees every use in the inner problem"),
            BilevelWarning,
            stacklevel=5,
        )
    return unused


def _all_of(
    tensors: Sequence[Tensor | None], in_order: Callable[[Sequence[Tensor]], Tensor]
) -> Tensor | None:
    given = [one for one in tensors if one is not None]
    return in_order(given) if len(given) == len(tensors) else None


def _accuracy(parts: list[_Part], in_order: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    """The error estimates and bounds, where they were asked for."""
    errors = [part.estimate.error for part in parts]
    bounds = [part.estimate.bound for part in parts]
    given = [one for one in errors if one is not None]
    out: dict[str, Any] = {}
    if given:
        out["error_estimate"] = in_order([one.relative for one in given])
        out["inner_error"] = in_order([one.inner for one in given])
        out["linear_error"] = in_order([one.linear for one in given])
        out["gradient_norm"] = in_order([one.norm for one in given])
        out["error_status"] = members(in_order([one.status for one in given]))
    certified = [one for one in bounds if one is not None]
    if certified:
        out["error_bound"] = in_order(certified)
    return out


def _warn_if_far(result: Hypergradient) -> None:
    """A tolerance in ‖∂_z G‖ has the objective's units: a small enough objective meets any."""
    distance = result.diagnostics.inner_distance
    if distance is None:
        return
    converged = [s is Status.CONVERGED for s in result.diagnostics.inner.status]
    if not any(converged):
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


def _statuses(parts: list[_Part], order: Tensor | None) -> list[tuple[Status, ...]]:
    """Of the tasks, of their inner and of their adjoint solves; the device is asked once."""
    codes = []
    for part in parts:
        linear = part.estimate.linear
        solves = [part.estimate.inner.status, part.status if linear is None else linear.status]
        codes.append(torch.stack([part.status, *(one.to(part.status.device) for one in solves)]))
    if order is None:
        rows = codes[0].tolist()
    else:
        rows = torch.cat(codes, 1)[:, order.to(codes[0].device)].tolist()
    return [tuple(Status(code) for code in row) for row in rows]


def _report(
    reports: Sequence[InnerReport | LinearSolution],
    status: tuple[Status, ...],
    in_order: Callable[[Sequence[Tensor]], Tensor],
) -> SolveReport:
    linear = [one for one in reports if isinstance(one, LinearSolution)]
    curvature = damping = lanczos = None
    if len(linear) == len(reports):
        curvature = in_order(
            [torch.stack([one.curvature_min, one.curvature_max], -1) for one in linear]
        )
        dampings = [one.damping for one in linear if one.damping is not None]
        if len(dampings) == len(linear):
            damping = in_order(dampings)
        tables = [one.lanczos for one in linear if one.lanczos is not None]
        if len(tables) == len(linear):
            steps = max(table.shape[1] for table in tables)
            lanczos = in_order([_padded(table, steps) for table in tables])
    return SolveReport(
        status,
        in_order([one.residual for one in reports]),
        in_order([one.steps for one in reports]),
        curvature,
        damping,
        lanczos,
    )


def _padded(table: Tensor, steps: int) -> Tensor:
    missing = steps - table.shape[1]
    return torch.nn.functional.pad(table, (0, 0, 0, missing), value=float("nan"))


def _inner(task: Task | TaskBatch | Sequence[Task] | None, parts: list[_Part]) -> PyTree:
    trees = [part.flat.vector.unflatten(part.estimate.z) for part in parts]
    if isinstance(task, TaskBatch):
        return trees[0] if len(trees) == 1 else tree_map(lambda *x: torch.cat(x), *trees)
    if task is None or isinstance(task, Task):
        return tree_map(lambda x: x[0], trees[0])
    out: list[PyTree] = [None] * sum(len(part.positions) for part in parts)
    for part, tree in zip(parts, trees, strict=True):
        for i, position in enumerate(part.positions):
            out[position] = tree_map(lambda x, i=i: x[i], tree)
    return out


def _state(stacks: list[list[_Part]]) -> State:
    """Warm starts, one for each group of equal shapes, however its tasks were run."""
    inner, adjoint, pairs = [], [], []
    for stack in stacks:
        solved = [part.estimate.linear for part in stack if part.estimate.linear is not None]
        kept = [linear.pairs for linear in solved if linear.pairs is not None]
        inner.append(_joined([part.estimate.z for part in stack]))
        adjoint.append(_joined([x.value.detach() for x in solved]) if solved else None)
        pairs.append(SecantPairs.together(kept) if len(kept) > 1 else next(iter(kept), None))
    return State(tuple(inner), tuple(adjoint), tuple(pairs))


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


# Small parts


def lift(tree: PyTree) -> PyTree:
    """Give every tensor a leading dimension of one task."""
    return None if tree is None else tree_map(lambda x: x.unsqueeze(0), tree)


def stack_trees(trees: Sequence[PyTree]) -> PyTree:
    """Stack pytrees of one structure along a new dimension 0."""
    return tree_map(lambda *leaves: torch.stack(leaves), trees[0], *trees[1:])
