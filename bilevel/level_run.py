"""One evaluation of a problem of many levels: each level solved where an objective reads it.

What a backward pass solves again later, it solves as this evaluation did: with the solvers of the
same outer step, and from points of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .argmin import argmin
from .argmin_transforms import depth
from .errors import BilevelError, DependenceError, StructureError
from .flat import stacking_of
from .level import Variables
from .level_graph import LevelPlan, listed
from .method import ImplicitMethod
from .problem import BilevelProblem
from .pytree import PyTree, tree_flatten, tree_leaves, tree_map
from .regularizer import Proximal
from .task import Task

__all__ = ["LevelPoint", "LevelRun", "check_read"]

_ON_FAILURE = " Pass on_failure='ignore' to go on."


@dataclass(frozen=True)
class LevelPoint:
    """A solution to begin the next solve at.

    Attributes:
        given: Structure, shapes, dtypes and devices of what it was solved for.
        solution: The solution, detached.
    """

    given: Any
    solution: PyTree


@dataclass(frozen=True)
class LevelRun:
    """One evaluation.

    Attributes:
        plan: The levels, and what the graph says of them.
        records: What was found out of each level's problem, such as whether it can be stacked.
        step: The outer step.
        warm_start: Whether solves begin at the last solution.
        last: The last solutions by level.
        evaluations: How often each objective was evaluated.
    """

    plan: LevelPlan
    records: dict[str, Any]
    step: int
    warm_start: bool
    last: dict[str, LevelPoint]
    evaluations: Counter[str] = field(default_factory=Counter)

    def variables(self, reader: str, known: Mapping[str, PyTree]) -> Variables:
        """What the objective of a level sees."""

        def find(variables: Variables, name: str) -> None:
            self._solve(reader, variables, name)

        return Variables(known, find)

    def evaluate(self, name: str, inner: PyTree, variables: Variables, batch: PyTree) -> Tensor:
        """The objective of a level."""
        self.evaluations[name] += 1
        return self.plan.level(name).objective(inner, variables, batch)

    def above(self, reader: str, known: Mapping[str, PyTree]) -> Variables:
        """What `start` and the regularizer of a level see: the variables above it alone."""

        def find(variables: Variables, name: str) -> None:
            raise DependenceError(
                f"`start` or the regularizer of level {reader!r} reads {name!r}; they see the "
                f"levels above from which an edge leads here: {listed(known)}"
            )

        return Variables(known, find)

    def _solve(self, reader: str, variables: Variables, name: str) -> None:
        """Note the solution of a level, and of those that are solved together with it."""
        plan = self.plan
        check_read(plan, reader, variables, name)
        outer = {one: variables[one] for one in plan.needs[name]}
        together = plan.together[name]
        level, alone = plan.level(name), len(together) == 1
        assert level.method is not None
        task = level.tasks if alone else [Task(plan.level(one).batch) for one in together]
        # Under a transform there is no plain solution to keep; and what is unrolled is a function
        # of where it began.
        warm = self.warm_start and depth() == 0 and isinstance(level.method, ImplicitMethod)
        given = _signature(outer)
        known = [self.last.get(one) for one in together] if warm else []
        points = [one.solution for one in known if one is not None and one.given == given]
        inner: Any = None
        if len(points) == len(together):
            inner = points[0] if alone else points
        try:
            found = argmin(
                self._problem(together[0]),
                outer,
                task,
                inner_solver=level.solver_at(self.step),
                method=level.method,
                inner=inner,
            )
        except BilevelError as error:
            raise _named(error, together) from error
        for one, solution in zip(together, [found] if alone else found, strict=True):
            variables.put(one, solution)
            if warm:
                self.last[one] = LevelPoint(given, tree_map(_kept, solution))

    def _problem(self, name: str) -> LevelProblem:
        problem = LevelProblem(self, name)
        if name in self.records:
            problem.__dict__["_stacking"] = self.records[name]
        else:
            self.records[name] = stacking_of(problem)
        return problem


class LevelProblem(BilevelProblem):
    """One level as the library's verbs see it; its outer variable holds those above by name."""

    def __init__(self, run: LevelRun, name: str) -> None:
        self._run, self._name = run, name
        regularizer = run.plan.level(name).regularizer
        self.regularizer = None if regularizer is None else self._seeing(regularizer)

    def _seeing(self, regularizer: Proximal) -> Proximal:
        """The regularizer, whose functions see what they read."""
        changes = {}
        for part in ("strength", "center"):
            function = getattr(regularizer, part)
            if callable(function):
                changes[part] = lambda outer, function=function: function(self._above(outer))
        return replace(regularizer, **changes)

    def _above(self, outer: PyTree) -> Variables:
        return self._run.above(self._name, outer)

    def inner_objective(self, inner: PyTree, outer: PyTree, batch: PyTree) -> Tensor:
        variables = self._run.variables(self._name, {**outer, self._name: inner})
        return self._run.evaluate(self._name, inner, variables, batch)

    def outer_objective(self, inner: PyTree, outer: PyTree, batch: PyTree) -> Tensor:
        # `argmin` looks at it once, and does not use it.
        return torch.stack([leaf.sum() for leaf in tree_leaves(inner)]).sum()

    def initial_inner(self, outer: PyTree, batch: PyTree) -> PyTree:
        start = self._run.plan.level(self._name).start
        if start is None:
            return super().initial_inner(outer, batch)
        return start(self._above(outer), batch)

    def __repr__(self) -> str:
        return f"level {self._name!r}"


def check_read(plan: LevelPlan, reader: str, variables: Variables, name: str) -> None:
    """Raise unless a level can be solved where it is read.

    Raises:
        DependenceError: There is no such level, or no edge leads from it.
        StructureError: It needs a variable that is not known there.
    """
    if name not in plan.graph:
        raise DependenceError(
            f"the objective of level {reader!r} reads {name!r}, but there is no such level; the "
            f"levels are {listed(plan.graph)}"
        )
    inside = plan.below[reader]
    if name not in inside:
        raise DependenceError(
            f"the objective of level {reader!r} reads {name!r}, but there is no edge "
            f"{name} → {reader}; add it, so that {reader!r} is solved for a given {name!r}"
        )
    for one in plan.graph.predecessors(name):
        if one not in variables and one not in inside:
            raise StructureError(
                f"the objective of level {reader!r} reads {name!r}, which needs {one!r}, and that "
                f"is neither given to {reader!r} nor solved below it: add the edge "
                f"{one} → {reader}, or {reader} → {one}"
            )


def _named(error: BilevelError, names: list[str]) -> BilevelError:
    """The error with the levels that it was met in."""
    message = str(error).replace(_ON_FAILURE, "")
    if len(names) == 1:
        return type(error)(f"level {names[0]!r}: {message}")
    return type(error)(f"levels {listed(names)}, as tasks 0 to {len(names) - 1}: {message}")


def _signature(outer: PyTree) -> Any:
    leaves, spec = tree_flatten(outer)
    return spec, tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)


def _kept(leaf: Tensor) -> Tensor:
    return leaf.detach().clone()
