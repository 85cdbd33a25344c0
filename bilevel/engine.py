"""How stacked tasks are run: all at once, in chunks, or one after the other.

Stacking saves launches, which is what a small problem or an accelerator needs; one task after the
other fits the caches, needs no rules of `torch.vmap`, and is often faster for networks on a CPU.
Both compute the same. ``"auto"`` tries both on a gradient and a Hessian product, once for each
problem, device and shape, and remembers on the problem; on a CPU it stacks 8 tasks at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .clock import seconds_of
from .flat import FlatProblem, Outer, stacking_of
from .kernels import Kernels
from .linearised import linearise
from .probe import probe
from .problem import BilevelProblem
from .pytree import PyTree, tree_leaves, tree_map
from .task import TaskBatch

__all__ = ["Engine", "check_engine", "chunk_size"]

Engine: TypeAlias = Literal["auto", "batched", "loop"]
"""All tasks at once, one after the other, or what is measured to be faster."""

_TRIED = 8
_REPEATS = 3


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
    kernels: Kernels | None = None,
) -> int:
    """How many tasks are stacked at a time."""
    most = min(tasks.count, task_chunk or tasks.count)
    if engine == "loop" or most == 1:
        return 1
    if engine == "batched":
        return most
    few = min(_TRIED, most)
    remembered = stacking_of(problem).one_by_one
    key = (few, kernels, _shapes(outer.leaves), _shapes([*tasks.tensors, *tree_leaves(inner)]))
    if key not in remembered:
        flats = [_flat(problem, outer, tasks, inner, count, kernels) for count in (few, 1)]
        stacked, single = _least_seconds(flats)
        remembered[key] = few * single < stacked
    if remembered[key]:
        return 1
    # On a CPU 32 at once took longer than four times 8, and more memory (benchmarks/scaling.py).
    return few if outer.leaves[0].device.type == "cpu" else most


def _shapes(leaves: Iterable[Any]) -> Any:
    return tuple((x.device, x.dtype, x.shape) for x in leaves if isinstance(x, Tensor))


def _flat(
    problem: BilevelProblem,
    outer: Outer,
    tasks: TaskBatch,
    inner: PyTree,
    count: int,
    kernels: Kernels | None,
) -> FlatProblem:
    start = None if inner is None else tree_map(lambda x: x[:count], inner)
    flat = FlatProblem.of(problem, outer, tasks.part(0, count), start, kernels)
    probe(flat)
    return flat


def _least_seconds(flats: Sequence[FlatProblem]) -> list[float]:
    """Of a gradient and a Hessian product each, of which all methods are made.

    They take turns, so that what disturbs the machine disturbs both.
    """
    runs = [_gradient_and_product(flat) for flat in flats]
    for run in runs:
        run()
    least = [float("inf")] * len(runs)
    for _ in range(_REPEATS):
        for i, run in enumerate(runs):
            least[i] = min(least[i], seconds_of(run, flats[i].device))
    return least


def _gradient_and_product(flat: FlatProblem) -> Callable[[], None]:
    system, ones = linearise(flat, flat.start), torch.ones_like(flat.start)

    def run() -> None:
        flat.gradient(flat.start)
        system.pull(ones)

    return run
