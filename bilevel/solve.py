"""`solve_inner`: the inner problem alone; `evaluate`: what its solution is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import InPlaceError, ObjectiveError
from .flat import FlatProblem, Outer
from .hypergradient import group, warm_inner
from .inner_solver import InnerSolver
from .probe import probe
from .problem import BilevelProblem
from .pytree import PyTree, tree_map
from .result import State
from .rows import norm
from .status import Status, members
from .task import Task, TaskBatch

__all__ = ["Evaluation", "InnerSolution", "evaluate", "solve_inner"]


@dataclass(frozen=True)
class InnerSolution:
    """An inner solution and how far it was solved.

    Attributes:
        inner: A pytree for a `Task`, stacked for a `TaskBatch`, a list of pytrees for a list.
        status: One `Status` per task.
        residual: ‖∂_z G‖ ``[tasks]``, float64.
        value: G ``[tasks]``, the regularizer included; NaN for equilibria.
        steps: Steps taken ``[tasks]``.
        state: Warm starts for the next call.
    """

    inner: PyTree
    status: tuple[Status, ...]
    residual: Tensor
    value: Tensor
    steps: Tensor
    state: State

    @property
    def ok(self) -> bool:
        """Every task is CONVERGED, or BUDGET where no tolerance was set."""
        return all(status.ok for status in self.status)


@dataclass(frozen=True)
class Evaluation(InnerSolution):
    """An inner solution, and the outer objective and metrics at it.

    Attributes:
        outer_value: f ``[tasks]``.
        metrics: The problem's own metrics, ``[tasks]`` each.
    """

    outer_value: Tensor
    metrics: dict[str, Tensor]


def solve_inner(
    problem: BilevelProblem,
    outer: PyTree,
    task: Task | TaskBatch | Sequence[Task] | None = None,
    *,
    inner_solver: InnerSolver,
    inner: PyTree = None,
    state: State | None = None,
) -> InnerSolution:
    """Solve the inner problem of every task, without any graph.

    The outer objective is not called, so that a task may come without its ``outer_batch``;
    `evaluate` calls it.

    Args:
        problem: The bilevel problem.
        outer: The outer variable, a pytree of floating tensors.
        task: A `Task`, stacked tasks, or a list of tasks of any shapes; None: one without data.
        inner_solver: The solver.
        inner: A constant point to start from, as in `hypergradient`.
        state: ``state`` of an earlier result on the same tasks.

    Raises:
        ObjectiveError: A user's function returns something of the wrong kind.
        ValueError: An argument has the wrong kind, shape or value; it is named.

    Example:
        >>> import torch
        >>> from bilevel import Proximal, problem_from, solve_inner
        >>> from bilevel.solvers import GradientDescent
        >>> problem = problem_from(
        ...     lambda z, x, batch: 0.5 * (z**2).sum(), lambda z, x, batch: z.sum(), Proximal(1.0)
        ... )
        >>> solve_inner(
        ...     problem, torch.ones(2), inner_solver=GradientDescent(lr=0.5, max_steps=1)
        ... ).inner
        tensor([0.5000, 0.5000])
    """
    return _solve(problem, outer, task, inner_solver, inner, state, whole=False)[0]


def evaluate(
    problem: BilevelProblem,
    outer: PyTree,
    task: Task | TaskBatch | Sequence[Task] | None = None,
    *,
    inner_solver: InnerSolver,
    inner: PyTree = None,
    state: State | None = None,
) -> Evaluation:
    """Solve the inner problem of every task, and evaluate outer objective and metrics there.

    It is what to call on validation and test tasks. No hypergradient is computed, but the outer
    objective is held to what `hypergradient` asks of it: a number that cannot be differentiated,
    such as an accuracy, is one of the ``metrics``. A task whose outer objective is not finite is
    NON_FINITE.

    Args:
        problem: The bilevel problem.
        outer: The outer variable, a pytree of floating tensors.
        task: A `Task`, stacked tasks, or a list of tasks of any shapes; None: one without data.
        inner_solver: The solver.
        inner: A constant point to start from, as in `hypergradient`.
        state: ``state`` of an earlier result on the same tasks.

    Raises:
        ObjectiveError: A user's function returns something of the wrong kind, or metrics of other
            names for other shapes.
        ValueError: An argument has the wrong kind, shape or value; it is named.

    Example:
        >>> import torch
        >>> from bilevel import Proximal, evaluate, problem_from
        >>> from bilevel.solvers import GradientDescent
        >>> problem = problem_from(
        ...     lambda z, x, batch: 0.5 * (z**2).sum(), lambda z, x, batch: z.sum(), Proximal(1.0)
        ... )
        >>> found = evaluate(
        ...     problem, torch.ones(2), inner_solver=GradientDescent(lr=0.5, max_steps=1)
        ... )
        >>> found.outer_value
        tensor([1.])
    """
    solution, parts = _solve(problem, outer, task, inner_solver, inner, state, whole=True)
    rows: list[tuple[int, Tensor, dict[str, Tensor]]] = []
    for positions, flat, z in parts:
        data = flat.tasks.tensors
        before = [tensor._version for tensor in data]
        with torch.enable_grad():  # an objective may differentiate inside itself
            value, named = flat.evaluate(z.detach().clone().requires_grad_())
        named = flat.metrics(z) if named is None else named
        if [tensor._version for tensor in data] != before:
            raise InPlaceError(
                "`outer_objective` or `metrics` changed a batch of its task in place; write to a "
                "copy: `.clone()` it first"
            )
        for j, position in enumerate(positions):
            of_task = {name: one[j] for name, one in named.items()}
            rows.append((position, value[j].detach(), of_task))
    rows.sort(key=lambda row: row[0])
    each = [row[2] for row in rows]
    kinds = [{name: tuple(x.shape) for name, x in one.items()} for one in each]
    if any(kind != kinds[0] for kind in kinds):
        other = next(kind for kind in kinds if kind != kinds[0])
        raise ObjectiveError(
            f"`metrics` returned {kinds[0]} and {other} (names, and shapes) for tasks of different "
            "shapes; return the same names for every task, and 0-d tensors"
        )
    outer_value = torch.stack([row[1] for row in rows])
    finite = outer_value.isfinite().tolist()
    status = tuple(
        one if good or not one.usable else Status.NON_FINITE
        for one, good in zip(solution.status, finite, strict=True)
    )
    return Evaluation(
        **vars(replace(solution, status=status)),
        outer_value=outer_value,
        metrics={name: torch.stack([one[name] for one in each]) for name in each[0]},
    )


def _solve(
    problem: BilevelProblem,
    outer: PyTree,
    task: Task | TaskBatch | Sequence[Task] | None,
    inner_solver: InnerSolver,
    inner: PyTree,
    state: State | None,
    *,
    whole: bool,
) -> tuple[InnerSolution, list[tuple[list[int], FlatProblem, Tensor]]]:
    """The solution; and for each stack the positions of its tasks, the problem, and the point."""
    if not isinstance(problem, BilevelProblem):
        raise ValueError(f"`problem` is a {type(problem).__name__}; pass a BilevelProblem")
    if not isinstance(inner_solver, InnerSolver):
        raise ValueError(f"`inner_solver` is a {type(inner_solver).__name__}; pass an InnerSolver")
    variable = Outer.of(outer)
    groups = group(task, inner)
    if state is not None and len(state.inner) != len(groups):
        raise ObjectiveError(
            f"`state` holds {len(state.inner)} groups of tasks but `task` has {len(groups)}"
        )
    rows: list[tuple[int, PyTree, Status, Tensor, Tensor, Tensor]] = []
    parts: list[tuple[list[int], FlatProblem, Tensor]] = []
    stacked = []
    for i, one in enumerate(groups):
        flat = FlatProblem.of(problem, variable, one.tasks, one.inner)
        probe(flat, whole=whole)
        start = warm_inner(flat, None if state is None else state.inner[i])
        carry = inner_solver.solve(flat, start)
        value, gradient = flat.value_and_gradient(carry.z)
        report = inner_solver.report(carry, norm(gradient), flat.notes.get("first_residual"))
        tree = flat.vector.unflatten(carry.z)
        parts.append((one.positions, flat, carry.z))
        stacked.append(tree)
        for j, (position, status) in enumerate(
            zip(one.positions, members(report.status), strict=True)
        ):
            point = tree_map(lambda x, j=j: x[j], tree)
            rows.append((position, point, status, report.residual[j], value[j], report.steps[j]))
    rows.sort(key=lambda row: row[0])
    columns = list(zip(*rows, strict=True))
    if isinstance(task, TaskBatch):
        found = stacked[0]
    else:
        found = rows[0][1] if task is None or isinstance(task, Task) else list(columns[1])
    points = tuple(z for _, _, z in parts)
    solution = InnerSolution(
        inner=found,
        status=tuple(columns[2]),
        residual=_stack(columns[3]),
        value=_stack(columns[4]),
        steps=_stack(columns[5]),
        state=State(points, (None,) * len(points)),
    )
    return solution, parts


def _stack(scalars: Sequence[Tensor]) -> Tensor:
    return scalars[0].new_tensor([s.item() for s in scalars])
