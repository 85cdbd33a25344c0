"""The outer loop: hypergradient, optimizer step, projection, record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .errors import SolveError
from .flat import Outer
from .hypergradient import hypergradient
from .inner_solver import InnerSolver
from .method import HypergradientMethod
from .problem import BilevelProblem
from .pytree import PyTree
from .result import Hypergradient
from .status import describe_status
from .task import Task, TaskBatch
from .warm_start import WarmStart, WarmStarts

__all__ = ["Record", "Trainer"]

Tasks: TypeAlias = Task | TaskBatch | Sequence[Task] | None


@dataclass(frozen=True)
class Record:
    """One outer step in numbers; means over usable tasks.

    Attributes:
        step: Number of the step, from 0.
        outer_value: Mean of f.
        inner_residual: Mean of ‖∂_z G‖.
        linear_residual: Mean relative residual of the adjoint system; None without one.
        gradient_norm: Norm of the hypergradient over all leaves.
        tasks: Number of tasks.
        failed: Number of tasks left out of the mean.
        status: Number of tasks by status name.
        seconds: Wall-clock time of the step.
        metrics: Mean of each of the problem's metrics.
    """

    step: int
    outer_value: float
    inner_residual: float
    linear_residual: float | None
    gradient_norm: float
    tasks: int
    failed: int
    status: dict[str, int]
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Trainer:
    """Minimises the outer objective by gradient steps on `hypergradient`.

    Args:
        problem: The bilevel problem.
        inner_solver: The inner solver.
        method: The hypergradient method.
        optimizer: Makes a `torch.optim.Optimizer` from the list of outer leaves, such as
            ``lambda params: torch.optim.Adam(params, lr=1e-3)``.
        project: Called with ``outer`` after each step, to change it in place (bounds); optional.
        clip: Scale the hypergradient down to this norm over all leaves; None: leave it. A task near
            negative curvature can give a huge one, and Adam remembers it for hundreds of steps.
        warm_start: Start ``"inner"`` solves, ``"adjoint"`` solves or ``"both"`` where they ended
            when the task was last seen; ``"none"``: anew at each step. Tasks that change from step
            to step are told apart by ``Task.key``. A truncated inner solve makes another
            hypergradient when it starts warm; a converged one makes the same at less cost. Unrolled
            starts anew always.
        on_failure: What to do where a task is not CONVERGED or BUDGET. ``"raise"``: stop, with
            ``outer`` as it was before the step. ``"skip"``: leave this step out. ``"mean"``: step
            with the mean over the usable tasks.

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
    project: Callable[[PyTree], None] | None = None
    clip: float | None = None
    warm_start: WarmStart = "none"
    on_failure: Literal["raise", "skip", "mean"] = "raise"

    def __post_init__(self) -> None:
        if self.on_failure not in ("raise", "skip", "mean"):
            raise ValueError(f"`on_failure` is {self.on_failure!r}; pass 'raise', 'skip' or 'mean'")
        WarmStarts(self.warm_start, constant=True)
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"`clip` is {self.clip}; pass a norm > 0, or None")
        if not callable(self.optimizer):
            raise ValueError(
                f"`optimizer` is a {type(self.optimizer).__name__}; pass a function of the "
                "parameters, such as lambda params: torch.optim.Adam(params, lr=1e-3)"
            )

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
        variable = Outer.of(outer)
        leaves = list(variable.leaves)
        for name, leaf in zip(variable.names, leaves, strict=True):
            if not leaf.is_leaf:
                raise ValueError(f"`{name}` is no leaf of the graph; pass `{name}.detach()`")
        optimizer = self.optimizer(leaves)
        source = _source(tasks)
        kept = WarmStarts(self.warm_start, constant=_is_constant(tasks))
        records = []
        for step in range(steps):
            started = time.perf_counter()
            task = source(step)
            result = hypergradient(
                self.problem,
                outer,
                task,
                inner_solver=self.inner_solver,
                method=self.method,
                state=kept.state(task),
            )
            kept.keep(task, result.state)
            self._update(outer, result, optimizer)
            record = _record(step, result, time.perf_counter() - started)
            records.append(record)
            if callback is not None:
                callback(record, result)
        return records

    def _update(
        self, outer: PyTree, result: Hypergradient, optimizer: torch.optim.Optimizer
    ) -> None:
        if not result.ok and self.on_failure != "mean":
            if self.on_failure == "skip":
                return
            raise SolveError(
                f"{describe_status(result.status)} `outer` is unchanged by this step; pass "
                "on_failure='mean' to go on with the usable tasks, or 'skip'."
            )
        result.set_grad(outer)
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(Outer.of(outer).leaves, self.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.project is not None:
            with torch.no_grad():
                self.project(outer)


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


def _record(step: int, result: Hypergradient, seconds: float) -> Record:
    usable = torch.tensor([status.usable for status in result.status])
    linear = result.diagnostics.linear

    def mean(values: Tensor) -> float:
        return values.detach().cpu().double()[usable].mean().item()

    counts: dict[str, int] = {}
    for status in result.status:
        counts[status.name] = counts.get(status.name, 0) + 1
    gradients = Outer.of(result.gradient).leaves
    square = torch.stack([g.double().square().sum().cpu() for g in gradients]).sum()
    return Record(
        step=step,
        outer_value=mean(result.outer_value),
        inner_residual=mean(result.diagnostics.inner.residual),
        linear_residual=None if linear is None else mean(linear.residual),
        gradient_norm=square.sqrt().item(),
        tasks=len(result.status),
        failed=len(result.diagnostics.failed),
        status=counts,
        seconds=seconds,
        metrics={key: mean(value) for key, value in result.metrics.items()},
    )
