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
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .argmin_transforms import depth
from .errors import BilevelWarning, ObjectiveError, SolveError
from .flat import Outer
from .level import Level, Variables
from .level_check import check_dependence
from .level_graph import LevelPlan, check_graph, generations, graph_of, routes, top_of
from .level_run import LevelPoint, LevelRun
from .pytree import PyTree, tree_flatten, tree_map
from .result import write_gradient

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
            kept for many products counts once, and levels that are solved together count under
            the name of the first.
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
        write_gradient(outer, self.gradient, tree_flatten(self.gradient)[1], "; pass the same one")


class MultiLevelProblem:
    """A graph of levels, each solved for what is above it.

    Each level has its own solver, method and schedule. A level below must be solved more accurately
    than the one that it is solved in: its error is noise in the objective there. Levels of one
    generation that share objective, solver, method and what enters them, and have nothing below,
    are solved together, as tasks.

    Args:
        graph: A `networkx.DiGraph` whose nodes have a `Level` as attribute ``level``; see `of`.
        warm_start: Begin each solve at the last solution of its level; levels that unroll their
            steps always begin at their start. Where a level has several minima, which of them is
            found depends on where its solver begins, and so on earlier calls: pass False there.

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
        self._plan = LevelPlan.of(self.graph)
        self._records: dict[str, Any] = {}
        self._last: dict[str, LevelPoint] = {}
        self._checked = False
        self._used: list[bool] = []

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
        variable = Outer.of(outer).cloned().differentiable()
        with torch.enable_grad():
            value, variables, run = self._value(variable.tree, step)
            gradient = torch.autograd.grad(
                value, variable.leaves, allow_unused=True, materialize_grads=True
            )
        self._warn_of_unused(variable)
        if not all(bool(one.isfinite().all()) for one in [value, *gradient]):
            raise SolveError(
                "the hypergradient of the top is not finite; `outer` is unchanged. Look at the "
                "objectives there"
            )
        evaluations = dict(run.evaluations)
        with torch.no_grad():
            # Those that the top does not read were solved inside other objectives.
            solutions = {name: variables[name] for name in self.graph if name != self.top}
        return MultiLevelGradient(
            variable.with_leaves(gradient).tree,
            value.detach(),
            {name: tree_map(torch.Tensor.detach, one) for name, one in solutions.items()},
            evaluations,
            time.perf_counter() - started,
        )

    def _value(self, outer: PyTree, step: int) -> tuple[Tensor, Variables, LevelRun]:
        Outer.of(outer)  # whatever is no variable is refused here, by name
        # A copy of the last solutions: what fails on the way leaves none behind.
        last = dict(self._last)
        run = LevelRun(self._plan, self._records, step, warm_start=self.warm_start, last=last)
        if not (self._checked or depth()):
            self._used = check_dependence(run, self.top, outer)
            self._checked = True
        variables = run.variables(self.top, {self.top: outer})
        value = run.evaluate(self.top, outer, variables, self.level(self.top).batch)
        if not (isinstance(value, Tensor) and value.ndim == 0):
            kind = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ObjectiveError(
                f"the objective of level {self.top!r} returned {kind}; return a 0-d tensor"
            )
        self._last = dict(run.last)
        return value, variables, run

    def _warn_of_unused(self, outer: Outer) -> None:
        pairs = zip(outer.names, self._used, strict=False)
        unused = [f"`{name}`" for name, used in pairs if not used]
        if unused:
            warnings.warn(
                f"nothing depends on {', '.join(unused)}, and the gradient there is zero: use it "
                "in an objective, or leave it out of `outer`",
                BilevelWarning,
                stacklevel=3,
            )
