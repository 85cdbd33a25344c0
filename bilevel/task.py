"""A task: one inner problem with its data; and tasks stacked along a leading dimension."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .pytree import PyTree, leaf_names, tree_flatten, tree_leaves, tree_map, tree_unflatten
from .stream import Stream

__all__ = ["Task", "TaskBatch"]


@dataclass(frozen=True)
class Task:
    """One inner problem with its data.

    Args:
        inner_batch: Pytree given to the inner objective (support or training data), or a `Stream`.
        outer_batch: Pytree given to the outer objective (query or validation data).
        key: Identity of the task across outer steps.
        weight: Share in the mean over tasks, ≥ 0.
    """

    inner_batch: PyTree = None
    outer_batch: PyTree = None
    key: Hashable = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight < float("inf"):
            raise ValueError(f"`weight` is {self.weight}; a task's weight is finite and ≥ 0")
        if isinstance(self.key, Tensor) or not isinstance(self.key, Hashable):
            raise ValueError(
                f"`key` is a {type(self.key).__name__}, which tells no task apart; pass a "
                "number, a string or a tuple of them"
            )

    @property
    def alone(self) -> TaskBatch:
        """The task as a stack of one, which shares its memory; made once for the same tensors."""
        leaves, known = _leaves(self), self.__dict__.get("_alone")
        if known is None or not known.holds(leaves):
            known = _Made.of(leaves, Task.stack([self]))
            object.__setattr__(self, "_alone", known)
        batch: TaskBatch = known.value
        return batch

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in self.__dict__.items() if name != "_alone"}

    @staticmethod
    def stack(tasks: Sequence[Task]) -> TaskBatch:
        """Stack tasks whose data have one structure and shape; one task alone is not copied.

        Raises:
            ValueError: No task, or the data of two tasks do not stack; the leaf is named.
        """
        if not tasks:
            raise ValueError("`tasks` is empty; stack at least one task")
        device = next((x.device for x in _leaves(tasks[0]) if isinstance(x, Tensor)), None)
        return TaskBatch(
            _stack([task.inner_batch for task in tasks], "inner_batch"),
            _stack([task.outer_batch for task in tasks], "outer_batch"),
            keys=tuple(task.key for task in tasks),
            weights=torch.tensor(
                [task.weight for task in tasks], dtype=torch.float64, device=device
            ),
        )


@dataclass(frozen=True)
class TaskBatch:
    """Tasks stacked along dimension 0 of every tensor.

    Args:
        inner_batch: Pytree of tensors ``[tasks, ...]``, or a `Stream` that draws such pytrees.
            Leaves that are no tensors are shared by all tasks.
        outer_batch: Likewise.
        keys: One identity per task; default: none.
        weights: ``[tasks]``, ≥ 0; default: ones.
        count: Number of tasks; read from the data where it holds a tensor.
    """

    inner_batch: PyTree = None
    outer_batch: PyTree = None
    keys: tuple[Hashable, ...] | None = None
    weights: Tensor | None = None
    count: int = field(default=0)

    def __post_init__(self) -> None:
        sizes: dict[str | tuple[str, int], int] = {}
        for root in ("inner_batch", "outer_batch"):
            tree = getattr(self, root)
            if isinstance(tree, Stream):
                continue
            for i, leaf in enumerate(tree_leaves(tree)):
                if isinstance(leaf, Tensor):
                    if leaf.ndim == 0:
                        raise ValueError(
                            f"`{leaf_names(tree, root)[i]}` has no dimension of tasks; stack tasks "
                            "with Task.stack"
                        )
                    sizes[root, i] = leaf.shape[0]
        for name, values in (("keys", self.keys), ("weights", self.weights)):
            if values is not None:
                sizes[name] = len(values)
        if self.count:
            sizes["count"] = self.count
        if not sizes:
            raise ValueError("the number of tasks is unknown; pass `count`, `keys` or `weights`")
        if len(set(sizes.values())) > 1:
            named = {self._name(place): size for place, size in sizes.items()}
            raise ValueError(f"the number of tasks differs: {named}; dimension 0 of all is tasks")
        count = next(iter(sizes.values()))
        if count == 0:
            raise ValueError("the batch holds no task; pass at least one")
        object.__setattr__(self, "count", count)
        if self.keys is None:
            object.__setattr__(self, "keys", (None,) * count)
        if self.weights is None:
            object.__setattr__(self, "weights", torch.ones(count, dtype=torch.float64))
        elif not all(0.0 <= weight < math.inf for weight in self.weights.tolist()):
            raise ValueError("`weights` has a negative or non-finite entry; weights are ≥ 0")

    def _name(self, place: str | tuple[str, int]) -> str:
        if isinstance(place, str):
            return place
        root, i = place
        return leaf_names(getattr(self, root), root)[i]

    def __len__(self) -> int:
        return self.count

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of its data; what a `Stream` draws is not among them."""
        return [leaf for leaf in _leaves(self) if isinstance(leaf, Tensor)]

    def only(self, batch: PyTree) -> PyTree:
        """The batch of a single task, without the dimension of tasks; made once for one batch."""
        name = "inner" if batch is self.inner_batch else "outer"
        if name == "outer" and batch is not self.outer_batch:
            return without_tasks(batch)  # drawn by a stream, and not again
        leaves, known = tree_leaves(batch), self.__dict__.get("_only", {})
        found = known.get(name)
        if found is None or not found.holds(leaves):
            found = _Made.of(leaves, without_tasks(batch))
            object.__setattr__(self, "_only", {**known, name: found})
        return found.value

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in self.__dict__.items() if name != "_only"}

    def select(self, index: Tensor) -> TaskBatch:
        """The tasks at ``index`` (``[k]``, int64), in that order."""
        positions = index.tolist()
        assert self.keys is not None
        assert self.weights is not None
        return TaskBatch(
            _select(self.inner_batch, index),
            _select(self.outer_batch, index),
            keys=tuple(self.keys[i] for i in positions),
            weights=self.weights[index.to(self.weights.device)],
            count=len(positions),
        )

    def part(self, first: int, last: int) -> TaskBatch:
        """Tasks ``first`` to ``last - 1``, as far as there are, sharing memory with these."""
        assert self.keys is not None
        assert self.weights is not None
        return TaskBatch(
            _slice(self.inner_batch, first, last),
            _slice(self.outer_batch, first, last),
            keys=self.keys[first:last],
            weights=self.weights[first:last],
            count=len(self.keys[first:last]),
        )

    def unstack(self) -> list[Task]:
        """The tasks one by one."""
        assert self.keys is not None
        assert self.weights is not None
        weights = self.weights.tolist()
        return [
            Task(_pick(self.inner_batch, i), _pick(self.outer_batch, i), self.keys[i], weights[i])
            for i in range(self.count)
        ]

    def to(self, *args: Any, **kwargs: Any) -> TaskBatch:
        """Move and convert the data like ``Tensor.to``; integer tensors keep their dtype."""
        return replace(
            self,
            inner_batch=_to(self.inner_batch, *args, **kwargs),
            outer_batch=_to(self.outer_batch, *args, **kwargs),
        )


def group_by_shape(tasks: Sequence[Task]) -> list[tuple[TaskBatch, list[int]]]:
    """Stack tasks of one shape together; return each stack with its tasks' positions."""
    return [(Task.stack([tasks[i] for i in where]), where) for where in positions_by_shape(tasks)]


def positions_by_shape(tasks: Sequence[Task]) -> list[list[int]]:
    """The positions of tasks of equal shapes, one list for each shape.

    Raises:
        ValueError: The list is empty or holds something else.
    """
    if not tasks:
        raise ValueError("`task` is an empty list; pass at least one task")
    groups: dict[Any, list[int]] = {}
    for i, task in enumerate(tasks):
        if not isinstance(task, Task):
            raise ValueError(f"`task[{i}]` is a {type(task).__name__}; a list holds Task objects")
        groups.setdefault(_signature(task), []).append(i)
    return list(groups.values())


@dataclass(frozen=True)
class _Made:
    """Something made from leaves, while these are the very same ones.

    A batch's dict may hold others later, and a tensor may be given other numbers by its ``data``.
    """

    leaves: list[Any]
    places: list[Any]
    value: Any

    @classmethod
    def of(cls, leaves: list[Any], value: Any) -> _Made:
        return cls(leaves, [_place(leaf) for leaf in leaves], value)

    def holds(self, leaves: list[Any]) -> bool:
        return (
            len(leaves) == len(self.leaves)
            and all(map(operator.is_, leaves, self.leaves))
            and [_place(leaf) for leaf in leaves] == self.places
        )


def _place(leaf: Any) -> Any:
    """Where a tensor's numbers lie; never the same where that cannot be told."""
    if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
        return None
    try:
        return leaf.data_ptr(), leaf.shape
    except RuntimeError:
        return object()  # under a transform a tensor lies nowhere


def _leaves(task: Task | TaskBatch) -> list[Any]:
    inner = None if isinstance(task.inner_batch, Stream) else task.inner_batch
    return [*tree_leaves(inner), *tree_leaves(task.outer_batch)]


def _data(task: Task | TaskBatch) -> PyTree:
    inner = None if isinstance(task.inner_batch, Stream) else task.inner_batch
    return [inner, task.outer_batch]


def _signature(task: Task) -> Any:
    leaves, spec = tree_flatten(_data(task))
    shapes = tuple(
        (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else repr(x) for x in leaves
    )
    streams = task.inner_batch.signature() if isinstance(task.inner_batch, Stream) else None
    return str(spec), shapes, streams


def _stack(trees: list[PyTree], root: str) -> PyTree:
    streams = [isinstance(tree, Stream) for tree in trees]
    if all(streams):
        return Stream(lambda step: _stack([tree.draw(step) for tree in trees], root))
    if any(streams):
        raise ValueError(f"`{root}` is a Stream in some tasks and data in others; use one kind")
    first, spec = tree_flatten(trees[0])
    columns = []
    for i, tree in enumerate(trees):
        leaves, other = tree_flatten(tree)
        if other != spec:
            raise ValueError(f"`{root}` of task {i} has another structure than that of task 0")
        columns.append(leaves)

    # Names are made for messages only.
    def name(j: int) -> str:
        return leaf_names(trees[0], root)[j]

    return tree_unflatten(
        [_stack_leaf([c[j] for c in columns], partial(name, j)) for j in range(len(first))], spec
    )


def _stack_leaf(leaves: list[Any], name: Callable[[], str]) -> Any:
    if isinstance(leaves[0], Tensor):
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                raise ValueError(f"`{name()}` is a tensor in task 0 but not in task {i}")
            for attribute in ("shape", "dtype", "device"):
                if getattr(leaf, attribute) != getattr(leaves[0], attribute):
                    raise ValueError(
                        f"`{name()}` has {attribute} {getattr(leaf, attribute)} in task {i} but "
                        f"{getattr(leaves[0], attribute)} in task 0; pass a list of tasks instead "
                        "of a stack, and equal shapes are stacked for you"
                    )
        if leaves[0].layout not in (torch.strided, torch.sparse_coo):
            raise ValueError(
                f"`{name()}` is {leaves[0].layout}, which PyTorch cannot stack; convert it with "
                "`.to_sparse_coo()`"
            )
        # One task alone needs no copy: its data may be large.
        return leaves[0].unsqueeze(0) if len(leaves) == 1 else torch.stack(leaves)
    if any(hasattr(leaf, "__array__") for leaf in leaves):
        raise ValueError(f"`{name()}` is an array; pass a tensor: torch.as_tensor of it")
    if any(leaf != leaves[0] for leaf in leaves):
        raise ValueError(f"`{name()}` differs between tasks but is no tensor; make it a tensor")
    return leaves[0]


def _pick(tree: PyTree, i: int) -> PyTree:
    if isinstance(tree, Stream):
        return Stream(lambda step: _pick(tree.draw(step), i))
    return tree_map(lambda x: x[i] if isinstance(x, Tensor) else x, tree)


def _select(tree: PyTree, index: Tensor) -> PyTree:
    if isinstance(tree, Stream):
        return Stream(lambda step: _select(tree.draw(step), index))

    def chosen(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        here = index.to(x.device)
        # Sparse tensors know no other indexing.
        return x[here] if x.layout == torch.strided else x.index_select(0, here)

    return tree_map(chosen, tree)


def _slice(tree: PyTree, first: int, last: int) -> PyTree:
    if isinstance(tree, Stream):
        return Stream(lambda step: _slice(tree.draw(step), first, last))

    def cut(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.layout == torch.strided:
            return x[first:last]
        return x.index_select(0, torch.arange(first, min(last, len(x)), device=x.device))

    return tree_map(cut, tree)


def without_tasks(tree: PyTree) -> PyTree:
    """The data of a single task, without the dimension of tasks."""

    def first(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        # A view: `select` on dimension 0 of size 1 costs a full copy backward. Sparse have none.
        return x.squeeze(0) if x.layout == torch.strided else x[0]

    return tree_map(first, tree)


def _to(tree: PyTree, *args: Any, **kwargs: Any) -> PyTree:
    if isinstance(tree, Stream):
        return Stream(lambda step: _to(tree.draw(step), *args, **kwargs))

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        moved = x.to(*args, **kwargs)
        return moved if x.is_floating_point() else moved.to(x.dtype)

    return tree_map(move, tree)
