"""The outer loop: hypergradient, optimizer step, projection, record; and how it is resumed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from .engine import Engine, check_engine
from .errors import SolveError
from .flat import Outer
from .hypergradient import hypergradient
from .inner_solver import InnerSolver
from .kernels import Kernels, check_kernels
from .method import HypergradientMethod
from .problem import BilevelProblem
from .pytree import PyTree, tree_unflatten
from .record import Record
from .result import Hypergradient
from .status import describe_status
from .task import Task, TaskBatch
from .warm_start import WarmStart, WarmStarts

__all__ = ["Trainer", "Training"]

Tasks: TypeAlias = Task | TaskBatch | Sequence[Task] | None


@dataclass(frozen=True)
class Trainer:
    """Minimises the outer objective by gradient steps on `hypergradient`.

    Args:
        problem: The bilevel problem.
        inner_solver: The inner solver.
        method: The hypergradient method.
        optimizer: Makes a `torch.optim.Optimizer` from the list of outer leaves, such as
            ``lambda params: torch.optim.Adam(params, lr=1e-3)``.
        schedule: Makes a learning-rate scheduler of `torch.optim.lr_scheduler` from the optimizer,
            such as ``lambda optimizer: CosineAnnealingLR(optimizer, 1000)``; it takes a step after
            each step of the optimizer. None: the rate stays.
        average: Decay d in [0, 1) of a moving average of ``outer`` over the steps, kept beside it
            (Polyak and Juditsky, 1992, with the exponential weights of usual practice):
            a ← d a + (1 − d) outer, where d is at most (1 + k) / (10 + k) after k steps, so that
            the first steps do not weigh for ever. None: none is kept.
        project: Called with ``outer`` after each step, to change it in place (bounds); optional.
        clip: Scale the hypergradient down to this norm over the leaves that the optimizer moves;
            None: leave it. A task near negative curvature can give a huge one, and Adam remembers
            it for hundreds of steps.
        warm_start: Start ``"inner"`` solves, ``"adjoint"`` solves or ``"both"`` where they ended
            when the task was last seen; ``"none"``: anew at each step. Tasks that change from step
            to step are told apart by ``Task.key``. A truncated inner solve makes another
            hypergradient when it starts warm; a converged one makes the same at less cost. Unrolled
            starts anew always.
        on_failure: What to do where a task is not CONVERGED or BUDGET. ``"raise"``: stop, with
            ``outer`` as it was before the step. ``"skip"``: leave this step out. ``"mean"``: step
            with the mean over the usable tasks.
        engine: How stacked tasks are run, as in `hypergradient`. What ``"auto"`` finds at the first
            step holds for the others, and for a training that is resumed.
        task_chunk: Stack at most so many tasks at a time; None: all.
        kernels: Compilation, precision of the inner steps, and how products are computed, as in
            `hypergradient`.

    Example:
        >>> import torch
        >>> from bilevel import Proximal, Trainer, problem_from
        >>> from bilevel.solvers import GradientDescent, ImplicitCG
        >>> problem = problem_from(
        ...     lambda z, x, batch: 0.5 * (z**2).sum(),
        ...     lambda z, x, batch: (z**2).sum(),
        ...     Proximal(1.0),
        ... )
        >>> outer = torch.ones(2)
        >>> trainer = Trainer(
        ...     problem,
        ...     inner_solver=GradientDescent(lr=0.5, max_steps=1),
        ...     method=ImplicitCG(),
        ...     optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        ... )
        >>> records = trainer.fit(outer, None, steps=3)
        >>> outer
        tensor([0.1250, 0.1250])
    """

    problem: BilevelProblem
    inner_solver: InnerSolver
    method: HypergradientMethod
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]
    schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None = None
    average: float | None = None
    project: Callable[[PyTree], None] | None = None
    clip: float | None = None
    warm_start: WarmStart = "none"
    on_failure: Literal["raise", "skip", "mean"] = "raise"
    engine: Engine = "batched"
    task_chunk: int | None = None
    kernels: Kernels | None = None

    def __post_init__(self) -> None:
        if self.on_failure not in ("raise", "skip", "mean"):
            raise ValueError(f"`on_failure` is {self.on_failure!r}; pass 'raise', 'skip' or 'mean'")
        check_engine(self.engine, self.task_chunk)
        check_kernels(self.kernels)
        WarmStarts(self.warm_start, constant=True)
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"`clip` is {self.clip}; pass a norm > 0, or None")
        if not callable(self.optimizer):
            raise ValueError(
                f"`optimizer` is a {type(self.optimizer).__name__}; pass a function of the "
                "parameters, such as lambda params: torch.optim.Adam(params, lr=1e-3)"
            )
        if self.schedule is not None and not callable(self.schedule):
            raise ValueError(
                f"`schedule` is a {type(self.schedule).__name__}; pass a function of the optimizer "
                "that makes a scheduler"
            )
        if self.average is not None and not 0.0 <= self.average < 1.0:
            raise ValueError(f"`average` is {self.average}; pass a decay in [0, 1), or None")

    def begin(self, outer: PyTree, *, constant: bool = False) -> Training:
        """Training that is advanced step by step, saved and resumed; `fit` is a loop over it.

        Args:
            outer: Pytree of floating leaf tensors; steps change it in place.
            constant: The tasks are the same at every step (for warm starts).

        Raises:
            ValueError: ``outer`` is not made of leaves.
        """
        return Training(self, outer, constant=constant)

    def fit(
        self,
        outer: PyTree,
        tasks: Tasks | Iterable[Tasks] | Callable[[int], Tasks],
        steps: int,
        *,
        callback: Callable[[Record, Hypergradient], None] | None = None,
    ) -> list[Record]:
        """Take ``steps`` steps; ``outer`` is changed in place, as a torch optimizer does.

        Args:
            outer: Pytree of floating leaf tensors.
            tasks: The tasks of each step: a function of the step number; an iterator; or the same
                `Task`, `TaskBatch`, list or None at every step.
            steps: Number of steps.
            callback: Called after each step with its record and hypergradient; an exception from
                it (or Ctrl-C) ends training with ``outer`` at the last finished step.

        Returns:
            One record per step.

        Raises:
            SolveError: A task failed and ``on_failure`` is ``"raise"``, or no task is usable.
            ValueError: The iterator ends before ``steps``, or ``outer`` is not made of leaves.
        """
        training = self.begin(outer, constant=_is_constant(tasks))
        source = _source(tasks)
        records = []
        for step in range(steps):
            record, result = training.advance(source(step))
            records.append(record)
            if callback is not None:
                callback(record, result)
        return records


class Training:
    """A training under way: the outer variable, and all that a resumption needs.

    `Trainer.begin` makes it. A training that is saved and loaded goes on with the same bits as one
    that was never stopped.

    Attributes:
        outer: The outer variable, changed in place.
        steps: Steps taken so far.
        optimizer: The optimizer.

    Example:
        >>> import torch
        >>> from bilevel import Proximal, Trainer, problem_from
        >>> from bilevel.solvers import GradientDescent, ImplicitCG
        >>> problem = problem_from(
        ...     lambda z, x, batch: 0.5 * (z**2).sum(),
        ...     lambda z, x, batch: (z**2).sum(),
        ...     Proximal(1.0),
        ... )
        >>> trainer = Trainer(
        ...     problem,
        ...     inner_solver=GradientDescent(lr=0.5, max_steps=1),
        ...     method=ImplicitCG(),
        ...     optimizer=lambda params: torch.optim.Adam(params, lr=0.1),
        ... )
        >>> training = trainer.begin(torch.ones(2))
        >>> record, result = training.advance(None)
        >>> saved = training.state_dict()
        >>> resumed = trainer.begin(torch.zeros(2))
        >>> resumed.load_state_dict(saved)
        >>> resumed.outer.equal(training.outer), resumed.steps
        (True, 1)
    """

    def __init__(self, trainer: Trainer, outer: PyTree, *, constant: bool) -> None:
        self._variable = Outer.of(outer)
        for name, leaf in zip(self._variable.names, self._variable.leaves, strict=True):
            if not leaf.is_leaf:
                raise ValueError(f"`{name}` is no leaf of the graph; pass `{name}.detach()`")
        self.trainer = trainer
        self.outer = outer
        self.steps = 0
        self._engine = trainer.engine
        leaves = list(self._variable.leaves)
        self.optimizer = trainer.optimizer(leaves)
        self._schedule = None if trainer.schedule is None else trainer.schedule(self.optimizer)
        self._kept = WarmStarts(trainer.warm_start, constant=constant)
        self._average = None
        if trainer.average is not None:
            self._average = [leaf.detach().clone() for leaf in leaves]

    @property
    def average(self) -> PyTree:
        """The moving average of ``outer``, a pytree like it; None where none is kept."""
        if self._average is None:
            return None
        return tree_unflatten(self._average, self._variable.spec)

    def advance(
        self, task: Task | TaskBatch | Sequence[Task] | None
    ) -> tuple[Record, Hypergradient]:
        """Take one step on the tasks.

        Returns:
            The record of the step, and its hypergradient.

        Raises:
            SolveError: A task failed and ``on_failure`` is ``"raise"``, or no task is usable.
        """
        trainer = self.trainer
        started = time.perf_counter()
        result = hypergradient(
            trainer.problem,
            self.outer,
            task,
            inner_solver=trainer.inner_solver,
            method=trainer.method,
            state=self._kept.state(task),
            engine=self._engine,
            task_chunk=trainer.task_chunk if self._engine != "loop" else None,
            kernels=trainer.kernels,
        )
        found = set(result.diagnostics.engine)
        if self._engine == "auto" and len(found) == 1:
            self._engine = found.pop()
        self._kept.keep(task, result.state)
        self._update(result)
        record = Record.of(self.steps, result, time.perf_counter() - started)
        self.steps += 1
        return record, result

    def state_dict(self) -> dict[str, Any]:
        """All that a resumption needs, of tensors and plain values; `torch.save` it."""
        return {
            "steps": self.steps,
            "engine": self._engine,
            "outer": [leaf.detach().clone() for leaf in self._variable.leaves],
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "schedule": None if self._schedule is None else self._schedule.state_dict(),
            "average": None if self._average is None else [leaf.clone() for leaf in self._average],
            "warm_starts": self._kept.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; ``outer`` is overwritten in place.

        Raises:
            ValueError: The state is of another outer variable or other settings.
        """
        wanted = {"average": self._average, "schedule": self._schedule}
        for name, own in wanted.items():
            if (state[name] is None) != (own is None):
                raise ValueError(
                    f"the saved training was made with{'out' if own is not None else ''} "
                    f"`{name}`; build the Trainer with the same settings"
                )
        pairs = [(list(self._variable.leaves), state["outer"])]
        if self._average is not None:
            pairs.append((self._average, state["average"]))
        for leaves, saved in pairs:
            if [leaf.shape for leaf in leaves] != [leaf.shape for leaf in saved]:
                raise ValueError(
                    f"the saved outer variable has shapes {[tuple(x.shape) for x in saved]} but "
                    f"this one has {[tuple(x.shape) for x in leaves]}; resume the same problem"
                )
        with torch.no_grad():
            for leaves, saved in pairs:
                for leaf, value in zip(leaves, saved, strict=True):
                    leaf.copy_(value)
        # Optimizers keep and change the tensors that they are given.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        if self._schedule is not None:
            self._schedule.load_state_dict(state["schedule"])
        self._kept.load_state_dict(state["warm_starts"])
        self.steps = state["steps"]
        if self.trainer.engine == "auto":
            self._engine = state["engine"]

    def _update(self, result: Hypergradient) -> None:
        trainer = self.trainer
        if not result.ok and trainer.on_failure != "mean":
            if trainer.on_failure == "skip":
                return
            raise SolveError(
                f"{describe_status(result.status)} `outer` is unchanged by this step; pass "
                "on_failure='mean' to go on with the usable tasks, or 'skip'."
            )
        result.set_grad(self.outer)
        if trainer.clip is not None:
            moved = [leaf for group in self.optimizer.param_groups for leaf in group["params"]]
            torch.nn.utils.clip_grad_norm_(moved, trainer.clip)
        self.optimizer.step()
        for leaf in self._variable.leaves:
            leaf.grad = None
        if self._schedule is not None:
            self._schedule.step()
        with torch.no_grad():
            if trainer.project is not None:
                trainer.project(self.outer)
            if self._average is not None:
                assert trainer.average is not None
                decay = min(trainer.average, (1 + self.steps) / (10 + self.steps))
                for mean, leaf in zip(self._average, self._variable.leaves, strict=True):
                    mean.lerp_(leaf, 1.0 - decay)


def _is_constant(tasks: Any) -> bool:
    return tasks is None or isinstance(tasks, Task | TaskBatch | list | tuple)


def _source(tasks: Any) -> Callable[[int], Tasks]:
    if _is_constant(tasks):
        return lambda step: tasks
    if callable(tasks):
        return tasks  # type: ignore[no-any-return]
    iterator: Iterator[Tasks] = iter(tasks)

    def draw(step: int) -> Tasks:
        try:
            return next(iterator)
        except StopIteration:
            raise ValueError(
                f"`tasks` ended before step {step}; pass an endless iterator, a function of the "
                "step, or fewer steps"
            ) from None

    return draw
