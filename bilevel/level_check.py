"""Whether every edge is used, and every solution is read: looked at once, before any solve.

At the points where the solvers begin, each objective is evaluated with all that it reads as leaves
of the autograd graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import DependenceError
from .level import Level, Variables
from .level_graph import order
from .level_run import LevelRun, check_read
from .method import ImplicitMethod
from .pytree import PyTree, tree_leaves, tree_map
from .stream import Stream
from .task import TaskBatch

__all__ = ["check_dependence"]


def check_dependence(run: LevelRun, top: str, outer: PyTree) -> list[bool]:
    """Raise unless the levels depend on each other as the graph says.

    Args:
        run: The levels.
        top: The name of the top.
        outer: Its variable.

    Returns:
        Whether any objective depends on them, for the leaves of the top's variable.

    Raises:
        DependenceError: An edge is not used, or a solution is not read; it is named.
    """
    points = {top: tree_map(_leaf, outer)}
    reached: dict[str, set[str]] = {}
    used = [False] * len(tree_leaves(outer))
    with torch.enable_grad():
        starts = {top: [points[top]]}
        for name in order(run.plan.graph):
            if name != top:
                points[name], starts[name] = _start(run, name, points)
        for name in order(run.plan.graph):
            total, names = _evaluated(run, name, points, starts[name])
            hits = {one: _hits(total, points[one]) for one in names}
            reached[name] = {one for one, found in hits.items() if any(found)}
            mine = hits.get(top, used) if name != top else _hits(total, points[top])
            used = [a or b for a, b in zip(used, mine, strict=True)]
    _check(run, top, reached)
    return used


def _check(run: LevelRun, top: str, reached: Mapping[str, set[str]]) -> None:
    for name in order(run.plan.graph):
        direct = reached[name]
        inside = [one for one in run.plan.below[name] if one in direct]
        for parent in run.plan.graph.predecessors(name):
            # Or through a level below that is read here.
            if parent in direct or any(parent in run.plan.needs[one] for one in inside):
                continue
            raise DependenceError(
                f"level {name!r} does not depend on {parent!r}, though there is an edge "
                f"{parent} → {name}: use variables[{parent!r}] in the objective, the regularizer "
                f"or a level below {name!r}, undetached, or remove the edge"
            )
    read = set().union(*(names - {name} for name, names in reached.items()))
    for name in run.plan.graph:
        if name != top and name not in read:
            raise DependenceError(
                f"no objective depends on the solution of level {name!r}, so that it is solved for "
                f"nothing: use variables[{name!r}] in a level above, undetached, or leave it out"
            )


def _start(run: LevelRun, name: str, points: Mapping[str, PyTree]) -> tuple[PyTree, list[PyTree]]:
    """Where a level begins, as those above see it, as leaves; and one point for each task."""
    level = run.plan.level(name)
    given = {one: points[one] for one in run.plan.needs[name]}
    above = run.above(name, given)
    found = []
    for batch in _batches(level):
        if level.start is not None:
            found.append(level.start(above, batch))
        else:
            assert level.regularizer is not None
            found.append(level.regularizer.center_tree(above))
    leaves = [tree_map(_leaf, one) for one in found]
    if not level.has_tasks:
        return leaves[0], found
    if isinstance(level.batch, TaskBatch):
        return tree_map(lambda *parts: _leaf(torch.stack(parts)), *leaves), found
    return leaves, found


def _batches(level: Level) -> list[PyTree]:
    """The data of each task."""
    batch = level.batch
    if isinstance(batch, TaskBatch):
        if isinstance(batch.inner_batch, Stream):
            drawn = batch.inner_batch.draw(0)
            return [tree_map(lambda x, i=i: x[i], drawn) for i in range(batch.count)]
        return [one.inner_batch for one in batch.unstack()]
    if level.has_tasks:
        return [one.inner_batch for one in batch]
    return [batch.draw(0) if isinstance(batch, Stream) else batch]


def _evaluated(
    run: LevelRun, name: str, points: Mapping[str, PyTree], starts: list[PyTree]
) -> tuple[Tensor, list[str]]:
    """The objective of a level at the point of its first task, and the names that it knows."""
    level = run.plan.level(name)
    known = {one: points[one] for one in run.plan.needs[name]}
    inside = run.plan.below[name]

    def find(variables: Variables, other: str) -> None:
        check_read(run.plan, name, variables, other)
        for one in run.plan.graph.predecessors(other):
            if one in inside:
                variables[one]  # what it is solved for must be known here, too
        variables.put(other, points[other])

    own = points[name] if not run.plan.graph.in_degree(name) else tree_map(_leaf, starts[0])
    variables = Variables({**known, name: own}, find)
    value = level.objective(own, variables, _batches(level)[0])
    outputs = [value] if isinstance(value, Tensor) else []
    if level.regularizer is not None:
        outputs.append(level.regularizer.value(own, run.above(name, known)))
    if level.method is not None and not isinstance(level.method, ImplicitMethod):
        # Unrolled steps are differentiated from where they begin.
        outputs += tree_leaves(starts[0])
    total = sum((one.sum() for one in outputs if one.requires_grad), start=torch.zeros(()))
    return total, [one for one in variables if one != name]


def _hits(total: Tensor, tree: PyTree) -> list[bool]:
    """Which leaves it depends on."""
    leaves: list[Any] = tree_leaves(tree)
    if not total.requires_grad:
        return [False] * len(leaves)
    found = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
    return [one is not None for one in found]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()
