r"""One level of a problem of many: an objective, how it is solved, and what it sees of the others.

At level v, with the variables $x_{\text{above}}$ that enter it by edges of the graph,

$$z_v(x_{\text{above}}) = \arg\min_z\; g_v\big(z, x_{\text{above}},
  z_{\text{below}}(x_{\text{above}}, z)\big) + r_v(x_{\text{above}}, z).$$

The levels below are solved inside the objective, wherever it reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from .brief import brief
from .errors import StructureError
from .inner_solver import InnerSolver
from .method import HypergradientMethod
from .pytree import PyTree
from .regularizer import Proximal
from .task import Task, TaskBatch

__all__ = ["Level", "Variables"]

Objective: TypeAlias = Callable[[PyTree, "Variables", PyTree], Tensor]


class Variables(Mapping[str, PyTree]):
    """The variables of the other levels, by name, as one evaluation of an objective sees them.

    Those above are given; those below are solved when they are first read, and the solution is in
    the autograd graph of all that it depends on. Iteration shows what is known so far.
    """

    def __init__(self, known: Mapping[str, PyTree], find: Callable[[Variables, str], None]) -> None:
        self._known = dict(known)
        self._find = find

    def __getitem__(self, name: str) -> PyTree:
        if name not in self._known:
            self._find(self, name)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def put(self, name: str, value: PyTree) -> None:
        """Note a solution."""
        self._known[name] = value


@dataclass(frozen=True, eq=False)
class Level:
    """A level of a `MultiLevelProblem`.

    Args:
        name: Its name in the graph, and that of its variable.
        objective: ``objective(inner, variables, batch)``, a 0-d tensor: ``inner`` is its own
            variable, ``variables["name"]`` that of another level: one above, from which an edge
            leads here, or the solution of one below.
        batch: The data of the objective; a `TaskBatch` or a list of `Task` for many tasks, whose
            solutions the levels above see stacked, or as a list.
        start: Where the solver starts, ``start(variables, batch)``; default: the regularizer's
            center. The top has none, its variable is given.
        solver: Its inner solver. The top has none.
        method: The method by which the levels above differentiate its solution: an implicit one, or
            one that unrolls. The top has none.
        regularizer: Its proximal regularizer, whose functions take ``variables``.
        schedule: ``schedule(step)``, the solver at an outer step, in the place of ``solver``.

    Raises:
        ValueError: An argument is missing or of the wrong kind; it is named, and so is the level.
    """

    name: str
    objective: Objective
    batch: PyTree = None
    start: Callable[[Variables, PyTree], PyTree] | None = None
    solver: InnerSolver | None = None
    method: HypergradientMethod | None = None
    regularizer: Proximal | None = None
    schedule: Callable[[int], InnerSolver] | None = None

    def __post_init__(self) -> None:
        where = f"level {self.name!r}"
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"`name` of a level is {self.name!r}; pass a string")
        if not callable(self.objective):
            raise ValueError(
                f"`objective` of {where} is a {type(self.objective).__name__}; pass a function of "
                "(inner, variables, batch)"
            )
        for name in ("start", "schedule"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                what = "(variables, batch)" if name == "start" else "the outer step"
                raise ValueError(
                    f"`{name}` of {where} is a {type(value).__name__}; pass a function of {what}"
                )
        for name, kind in (
            ("solver", InnerSolver),
            ("method", HypergradientMethod),
            ("regularizer", Proximal),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ValueError(
                    f"`{name}` of {where} is {brief(value)}; pass an instance of {kind.__name__}"
                )

    @property
    def is_solved(self) -> bool:
        """It has a solver: it is not the top."""
        return self.solver is not None or self.schedule is not None

    @property
    def has_tasks(self) -> bool:
        """Its data are those of many tasks."""
        return self.holds_tasks(self.batch)

    @staticmethod
    def holds_tasks(batch: PyTree) -> bool:
        """Whether they are tasks, rather than the data of one."""
        several = isinstance(batch, list) and bool(batch)
        return isinstance(batch, TaskBatch) or (
            several and all(isinstance(one, Task) for one in batch)
        )

    def alike(self, other: Level) -> bool:
        """Nothing but the data and the name tells the two apart."""
        parts = ("objective", "start", "solver", "method", "regularizer", "schedule")
        return all(_same(getattr(self, part), getattr(other, part)) for part in parts)

    @property
    def tasks(self) -> Task | TaskBatch | list[Task]:
        """Its tasks, or one with its data."""
        tasks: Task | TaskBatch | list[Task] = self.batch if self.has_tasks else Task(self.batch)
        return tasks

    def require_given(self) -> None:
        """Raise unless the level can be the top, whose variable is given.

        Raises:
            StructureError: It has what only a level below another has.
        """
        parts = ("solver", "schedule", "method", "start", "regularizer")
        mine = [f"`{part}`" for part in parts if getattr(self, part) is not None]
        if self.has_tasks:
            mine.append("many tasks")
        if mine:
            raise StructureError(
                f"level {self.name!r} has {' and '.join(mine)}, but no edge leads to it, so that "
                "nothing above enters it: add the missing edge, or leave that out of the top"
            )

    def require_solver(self) -> None:
        """Raise unless the level can be solved, differentiated, and started.

        Raises:
            ValueError: Something is missing.
        """
        missing = []
        if not self.is_solved:
            missing.append("`solver`, such as LBFGS()")
        if self.method is None:
            missing.append("`method`, such as ImplicitCG()")
        if self.start is None and self.regularizer is None:
            missing.append("`start`, a function of (variables, batch), or a `regularizer`")
        if missing:
            raise ValueError(
                f"level {self.name!r} lies below another, so that it is solved, but it has no "
                f"{'; no '.join(missing)}: pass it"
            )

    def solver_at(self, step: int) -> InnerSolver:
        """The solver at an outer step.

        Raises:
            ValueError: The schedule returns something else.
        """
        solver = self.solver if self.schedule is None else self.schedule(step)
        if not isinstance(solver, InnerSolver):
            raise ValueError(
                f"`schedule` of level {self.name!r} returned {brief(solver)} for step {step}; "
                "return an inner solver"
            )
        return solver


def _same(one: object, other: object) -> bool:
    try:
        return one is other or bool(one == other)
    except RuntimeError:
        return False  # tensors compare entry by entry
