r"""Problems of three levels and more, stated as a graph of levels.

The top's hypergradient goes through every level below by the chain rule: each solution is an
`argmin`, which is differentiable again, so that a level in the middle has the products with its
Hessian that its own method needs,

$$\frac{dF}{dx} = \partial_x f + \sum_v \Big(\frac{\partial z_v}{\partial x}\Big)^{\!\top}
  \partial_{z_v} f, \qquad
  z_v(x) = \arg\min_z g_v\big(z, x, z_{\text{below}}(x, z)\big).$$
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .argmin import argmin
from .argmin_transforms import depth
from .errors import DependenceError, ObjectiveError, SolveError, StructureError
from .level import Level, Variables
from .level_graph import (
    below,
    check_graph,
    generations,
    graph_of,
    needs,
    order,
    routes,
    top_of,
)
from .method import ImplicitMethod
from .problem import BilevelProblem
from .pytree import PyTree, check_floating, tree_flatten, tree_leaves, tree_map, tree_unflatten
from .task import Task, TaskBatch

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["MultiLevelGradient", "MultiLevelProblem"]


@dataclass(frozen=True)
class MultiLevelGradient:
    """The hypergradient of the top.

    Attributes:
        gradient: A pytree like the top's variable.
        value: The top's objective, 0-d.
        solutions: The solutions of all levels below, by name, detached.
        evaluations: How often the objective of each level was evaluated, by name; a graph that is
            kept for many products counts once.
        seconds: Wall-clock time.
    """

    gradient: PyTree
    value: Tensor
    solutions: dict[str, PyTree]
    evaluations: dict[str, int]
    seconds: float

    def set_grad(self, outer: PyTree) -> None:
        """Write the gradient into ``.grad`` of the leaves of ``outer``.

        Raises:
            ValueError: ``outer`` has another structure or shapes than the gradient.
        """
        leaves, spec = tree_flatten(outer)
        gradients, mine = tree_flatten(self.gradient)
        if spec != mine or any(a.shape != b.shape for a, b in zip(leaves, gradients, strict=True)):
            raise ValueError(
                "`outer` differs in structure or shapes from the variable this hypergradient was "
                "taken for; pass the same one"
            )
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient.detach().clone()


class MultiLevelProblem:
    """A graph of levels, each solved for what is above it.

    Each level has its own solver, method and schedule. A level below must be solved more accurately
    than the one that it is solved in: its error is noise in the objective there. Levels of one
    generation that share objective, solver, method and what enters them, and have nothing below,
    are solved together, as tasks.

    Args:
        graph: A `networkx.DiGraph` whose nodes have a `Level` as attribute ``level``; see `of`.
        warm_start: Begin each solve at the last solution of its level; levels that unroll their
            steps always begin at their start.

    Raises:
        StructureError: The graph has a cycle (which is named), or not exactly one top.
        ValueError: A node is no level, or lacks what it is solved by.

    Example:
        >>> import torch
        >>> from bilevel import Level, MultiLevelProblem
        >>> from bilevel.solvers import ImplicitCG, LBFGS
        >>> below = dict(solver=LBFGS(tol=1e-10), method=ImplicitCG(rtol=1e-10))
        >>> x = torch.tensor(2.0, dtype=torch.float64)
        >>> problem = MultiLevelProblem.of(
        ...     [
        ...         Level("x", lambda x, v, _: v["w"] ** 2),
        ...         Level("z", lambda z, v, _: (z - v["w"]) ** 2 + (z - v["x"]) ** 2,
        ...               start=lambda v, _: 0 * v["x"], **below),
        ...         Level("w", lambda w, v, _: (2 * w - v["z"]) ** 2,
        ...               start=lambda v, _: 0 * v["z"], **below),
        ...     ],
        ...     edges=[("x", "z"), ("z", "w")],
        ... )
        >>> problem.hypergradient(x).gradient  # w = z/2, z = 4x/5, F = (2x/5)²
        tensor(0.6400, dtype=torch.float64)
    """

    def __init__(self, graph: nx.DiGraph, *, warm_start: bool = True) -> None:
        check_graph(graph)
        self.graph: nx.DiGraph = graph.copy()
        self.top = top_of(graph)
        self.warm_start = warm_start
        self._problems = {name: _LevelProblem(self, name) for name in graph if name != self.top}
        self._needs = {name: needs(graph, name) for name in graph}
        self._last: dict[str, PyTree] = {}
        self._evaluations: Counter[str] = Counter()
        self._step = 0
        self._checked = False

    @classmethod
    def of(
        cls, levels: Sequence[Level], edges: Iterable[tuple[str, str]], *, warm_start: bool = True
    ) -> MultiLevelProblem:
        """State the problem by its levels, and edges ``(above, below)`` between their names.

        Raises:
            ValueError: Two levels have one name, or an edge names none.
        """
        return cls(graph_of(levels, edges), warm_start=warm_start)

    # The graph

    @property
    def generations(self) -> list[list[str]]:
        """The levels from the top down; those of one generation do not enter each other."""
        return generations(self.graph)

    def routes(self, name: str) -> list[list[str]]:
        """The paths by which the top's variable reaches a level.

        Raises:
            ValueError: There is no such level.
        """
        self.level(name)
        return routes(self.graph, name)

    def level(self, name: str) -> Level:
        """The level of that name.

        Raises:
            ValueError: There is none.
        """
        if name not in self.graph:
            known = ", ".join(repr(one) for one in self.graph)
            raise ValueError(f"there is no level {name!r}; the levels are {known}")
        level: Level = self.graph.nodes[name]["level"]
        return level

    def draw(self, path: str | Path | None = None) -> str:
        """The levels, their variables and methods as text; with ``path`` as a picture, too.

        Raises:
            ImportError: There is a path, and matplotlib is not installed.
        """
        from .level_picture import draw_levels, levels_as_text

        if path is not None:
            draw_levels(self, Path(path))
        return levels_as_text(self)

    def __repr__(self) -> str:
        shown = " | ".join(", ".join(one) for one in self.generations)
        return f"MultiLevelProblem({shown})"

    # Values

    def value(self, outer: PyTree, *, step: int = 0) -> Tensor:
        """The top's objective, in the autograd graph of ``outer``.

        Args:
            outer: The top's variable, a pytree of floating tensors.
            step: The outer step, which schedules see.

        Raises:
            SolveError: A solve of a level failed; it is named.
            DependenceError: A level does not depend on one above it, or no objective reads its
                solution.
        """
        return self._value(outer, step)[0]

    def hypergradient(self, outer: PyTree, *, step: int = 0) -> MultiLevelGradient:
        """The derivative of the top's objective through every level below.

        Args:
            outer: The top's variable, a pytree of floating tensors. It is not changed.
            step: The outer step, which schedules see.

        Raises:
            SolveError: A solve of a level, forward or backward, failed; it is named.
            DependenceError: A level does not depend on one above it, or no objective reads its
                solution.
        """
        started = time.perf_counter()
        leaves, spec = tree_flatten(outer)
        if not leaves:
            raise ValueError("`outer` holds no tensor; pass at least one floating leaf")
        check_floating(leaves, outer, "outer")
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        before = Counter(self._evaluations)
        value, variables = self._value(tree_unflatten(leaves, spec), step)
        found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        if not all(bool(one.isfinite().all()) for one in [value, *found]):
            raise SolveError(
                "the hypergradient of the top is not finite; `outer` is unchanged. Look at the "
                "objectives there"
            )
        with torch.no_grad():
            # Those that the top does not read were solved inside other objectives.
            solutions = {name: variables[name] for name in self.graph if name != self.top}
        spent = {
            name: n - before[name] for name, n in self._evaluations.items() if n > before[name]
        }
        return MultiLevelGradient(
            tree_unflatten(list(found), spec),
            value.detach(),
            {name: tree_map(torch.Tensor.detach, one) for name, one in solutions.items()},
            spent,
            time.perf_counter() - started,
        )

    def _value(self, outer: PyTree, step: int) -> tuple[Tensor, Variables]:
        self._step = step
        if not self._checked:
            self._check_dependence(outer)
        top = self.level(self.top)
        variables = self._variables(self.top, {self.top: outer})
        return self._evaluate(self.top, outer, variables, top.batch), variables

    def _evaluate(self, name: str, inner: PyTree, variables: Variables, batch: PyTree) -> Tensor:
        """The objective of a level."""
        self._evaluations[name] += 1
        value = self.level(name).objective(inner, variables, batch)
        if name == self.top and not (isinstance(value, Tensor) and value.ndim == 0):
            kind = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ObjectiveError(
                f"the objective of level {name!r} returned {kind}; return a 0-d tensor"
            )
        return value

    # Levels below, solved where they are read

    def _variables(self, reader: str, known: Mapping[str, PyTree]) -> Variables:
        """What the objective of a level sees."""

        def find(variables: Variables, name: str) -> None:
            self._solve(reader, variables, name)

        return Variables(known, find)

    def _solve(self, reader: str, variables: Variables, name: str) -> None:
        """Note the solution of a level, and of those that are solved together with it."""
        self._check_read(reader, variables, name)
        outer = {one: variables[one] for one in self._needs[name]}
        together = self._together(name)
        level = self.level(name)
        batches = [self.level(one).batch for one in together]
        alone = len(together) == 1
        task = _task(batches[0]) if alone else [Task(one) for one in batches]
        solver = level.solver_at(self._step)
        assert level.method is not None
        # Under a transform there is no plain solution to keep; and what is unrolled is a function
        # of where it began.
        warm = self.warm_start and depth() == 0 and isinstance(level.method, ImplicitMethod)
        inner = None
        if warm and all(one in self._last for one in together):
            last = [self._last[one] for one in together]
            inner = last[0] if alone else last
        try:
            found = argmin(
                self._problems[together[0]],
                outer,
                task,
                inner_solver=solver,
                method=level.method,
                inner=inner,
            )
        except SolveError as error:
            raise _named(error, together) from error
        for one, solution in zip(together, [found] if alone else found, strict=True):
            variables.put(one, solution)
            if warm:
                self._last[one] = tree_map(lambda x: x.detach().clone(), solution)

    def _check_read(self, reader: str, variables: Variables, name: str) -> None:
        """Raise unless a level can be solved where it is read."""
        if name not in self.graph:
            known = ", ".join(repr(one) for one in self.graph)
            raise DependenceError(
                f"the objective of level {reader!r} reads {name!r}, but there is no such level; "
                f"the levels are {known}"
            )
        solved_below = below(self.graph, reader)
        if name not in solved_below:
            raise DependenceError(
                f"the objective of level {reader!r} reads {name!r}, but there is no edge "
                f"{name} → {reader}; add it, so that {reader!r} is solved for a given {name!r}"
            )
        for one in self.graph.predecessors(name):
            if one not in variables and one not in solved_below:
                raise StructureError(
                    f"the objective of level {reader!r} reads {name!r}, which needs {one!r}, and "
                    f"that is neither given to {reader!r} nor solved below it: add the edge "
                    f"{one} → {reader}, or {reader} → {one}"
                )

    def _together(self, name: str) -> list[str]:
        """The levels that are solved in one call with this one, itself included."""
        mine = self.level(name)

        def fits(other: str) -> bool:
            level = self.level(other)
            leaf = not (self.graph.out_degree(other) or level.has_tasks)
            return leaf and level.alike(mine) and self._needs[other] == self._needs[name]

        return [other for other in self.graph if fits(other)] if fits(name) else [name]

    # What enters what

    def _check_dependence(self, outer: PyTree) -> None:
        """Raise unless every edge is used, and every solution is read."""
        solved = self._variables(self.top, {self.top: tree_map(torch.Tensor.detach, outer)})
        read: set[str] = set()
        for name in order(self.graph):
            level, own = self.level(name), solved[name]
            batch = level.batch
            if level.has_tasks:
                tasks = batch.unstack() if isinstance(batch, TaskBatch) else batch
                batch = tasks[0].inner_batch
                own = own[0] if isinstance(own, list) else tree_map(lambda x: x[0], own)
            given = {
                one: tree_map(lambda x: x.detach().clone().requires_grad_(), solved[one])
                for one in self._needs[name]
            }
            variables = self._variables(name, {**given, name: own})
            with torch.enable_grad():
                value = level.objective(own, variables, batch)
                if level.regularizer is not None:
                    value = value + level.regularizer.value(own, given)
            read |= variables.read
            self._check_edges(name, value, given)
        unread = [one for one in self.graph if one not in read | {self.top}]
        if unread:
            raise DependenceError(
                f"no objective reads the solution of level {unread[0]!r}, so that it is solved for "
                f"nothing: use variables[{unread[0]!r}] in a level above, or leave it out"
            )
        self._checked = True

    def _check_edges(self, name: str, value: Tensor, leaves: Mapping[str, PyTree]) -> None:
        for parent in self.graph.predecessors(name):
            found: Sequence[Tensor | None] = [None]
            if value.requires_grad:
                found = torch.autograd.grad(
                    value, tree_leaves(leaves[parent]), retain_graph=True, allow_unused=True
                )
            if all(one is None for one in found):
                raise DependenceError(
                    f"level {name!r} does not depend on {parent!r}, though there is an edge "
                    f"{parent} → {name}: use variables[{parent!r}] in the objective, the "
                    f"regularizer or a level below {name!r}, or remove the edge"
                )


def _task(batch: PyTree) -> Task | TaskBatch | list[Task]:
    """The tasks of a level: those that it was given, or one with its data."""
    return batch if Level.holds_tasks(batch) else Task(batch)


def _named(error: SolveError, names: Sequence[str]) -> SolveError:
    """The error with the levels that it was met in."""
    where = " and ".join(repr(one) for one in names)
    return SolveError(f"level {where}: {error}")


class _LevelProblem(BilevelProblem):
    """One level as the library's verbs see it; its outer variable holds those above by name."""

    def __init__(self, owner: MultiLevelProblem, name: str) -> None:
        self._owner, self._name = owner, name
        level = owner.level(name)
        self.regularizer = level.regularizer

    def inner_objective(self, inner: PyTree, outer: PyTree, batch: PyTree) -> Tensor:
        variables = self._owner._variables(self._name, {**outer, self._name: inner})
        return self._owner._evaluate(self._name, inner, variables, batch)

    def outer_objective(self, inner: PyTree, outer: PyTree, batch: PyTree) -> Tensor:
        # `argmin` looks at it once, and does not use it.
        return torch.stack([leaf.sum() for leaf in tree_leaves(inner)]).sum()

    def initial_inner(self, outer: PyTree, batch: PyTree) -> PyTree:
        start = self._owner.level(self._name).start
        if start is None:
            return super().initial_inner(outer, batch)
        return start(self._owner._variables(self._name, outer), batch)

    def __repr__(self) -> str:
        return f"level {self._name!r}"
