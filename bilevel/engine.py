"""How stacked tasks are run: all at once, in chunks, or one after the other.

Stacking saves launches, which is what a small problem or an accelerator needs; one task after the
other fits the caches, needs no rules of `torch.vmap`, and is often faster for networks on a CPU.
Both compute the same. ``"auto"`` takes the first 8 tasks either way, once for each problem, device,
shape, and kind of solver and method, and remembers on the problem; on a CPU it stacks 8 at a time.
Less than the whole would not tell: gradients may gain by stacking what the outer objective loses.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .clock import seconds_of
from .flat import Outer, stacking_of
from .problem import BilevelProblem
from .pytree import PyTree, tree_leaves
from .task import TaskBatch

__all__ = ["Engine", "check_engine", "chunk_size"]

Engine: TypeAlias = Literal["auto", "batched", "loop"]
"""All tasks at once, one after the other, or what is measured to be faster."""

_TRIED = 8
_SHORT = 5.0


def check_engine(engine: str, task_chunk: int | None) -> None:
    """Refuse what is no engine.

    Raises:
        ValueError: The engine is unknown, or the two arguments exclude each other.
    """
    if engine not in get_args(Engine):
        known = ", ".join(repr(one) for one in get_args(Engine))
        raise ValueError(f"`engine` is {engine!r}; pass one of {known}")
    if task_chunk is not None and task_chunk < 1:
        raise ValueError(f"`task_chunk` is {task_chunk}; stack at least one task")
    if engine == "loop" and task_chunk not in (None, 1):
        raise ValueError(
            f"`task_chunk` is {task_chunk}, but engine='loop' takes tasks one by one; pass "
            "engine='batched' with it"
        )


def chunk_size(
    problem: BilevelProblem,
    outer: Outer,
    tasks: TaskBatch,
    inner: PyTree,
    engine: Engine,
    task_chunk: int | None,
    settings: Hashable,
    run: Callable[[int, int], object],
) -> int:
    """How many tasks are stacked at a time.

    Args:
        problem: The problem.
        outer: The outer variable.
        tasks: Tasks of one shape.
        inner: Where they start, or None.
        engine: As the user chose.
        task_chunk: The most tasks, or None.
        settings: What else decides which is faster.
        run: ``run(count, size)`` computes the first tasks in stacks of that size.
    """
    most = min(tasks.count, task_chunk or tasks.count)
    if engine == "loop" or most == 1:
        return 1
    if engine == "batched":
        return most
    few = min(_TRIED, most)
    remembered = stacking_of(problem).one_by_one
    shapes = (_shapes(outer.leaves), _shapes([*tasks.tensors, *tree_leaves(inner)]))
    key = (few, settings, *shapes)
    if key not in remembered:
        device = outer.leaves[0].device
        single, stacked = _least_seconds([partial(run, few, 1), partial(run, few, few)], device)
        remembered[key] = single < stacked
    if remembered[key]:
        return 1
    # On a CPU 32 at once took longer than four times 8, and more memory (benchmarks/scaling.py).
    return few if outer.leaves[0].device.type == "cpu" else most


def _shapes(leaves: Iterable[Any]) -> Any:
    return tuple((x.device, x.dtype, x.shape) for x in leaves if isinstance(x, Tensor))


def _least_seconds(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Of two rounds, in which all take turns, so that what disturbs the machine disturbs all.

    The first call of anything is slower; where it is long, that does not matter, and one round is
    all.
    """
    least = [seconds_of(run, device) for run in runs]
    if max(least) > _SHORT:
        return least
    for _ in range(2):
        least = [min(a, seconds_of(run, device)) for a, run in zip(least, runs, strict=True)]
    return least
