"""Warm starts across outer steps: what was found for a task, kept under its key."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .operator import SecantPairs
from .result import State
from .task import Task, TaskBatch, positions_by_shape

__all__ = ["WarmStart", "WarmStarts"]

WarmStart: TypeAlias = Literal["none", "inner", "adjoint", "both"]


@dataclass(frozen=True)
class _Kept:
    """What is kept of one task."""

    inner: Tensor
    adjoint: Tensor | None
    pairs: SecantPairs | None


class WarmStarts:
    """Inner solutions and adjoints of the last time each task was seen.

    Args:
        kind: What to start warm: the inner solution, the adjoint system, both, or nothing.
        constant: The tasks are the same at every step, so that their position identifies them.
    """

    def __init__(self, kind: WarmStart, *, constant: bool) -> None:
        if kind not in ("none", "inner", "adjoint", "both"):
            raise ValueError(f"`warm_start` is {kind!r}; pass 'none', 'inner', 'adjoint' or 'both'")
        self.kind = kind
        self.constant = constant
        self._kept: dict[Hashable, _Kept] = {}

    def state(self, task: Task | TaskBatch | Sequence[Task] | None) -> State | None:
        """The state to start from, or None where nothing is known.

        Raises:
            ValueError: Tasks change from step to step and one has no key.
        """
        if self.kind == "none":
            return None
        groups = [[self._kept.get(key) for key in keys] for keys in self._keys(task)]
        if not all(any(one is not None for one in group) for group in groups):
            return None
        return State(
            tuple(self._inner(group) for group in groups),
            tuple(self._adjoint(group) for group in groups),
            tuple(self._pairs(group) for group in groups),
        )

    def keep(self, task: Task | TaskBatch | Sequence[Task] | None, state: State) -> None:
        """Keep what a step found."""
        if self.kind == "none":
            return
        pairs = state.pairs or (None,) * len(state.inner)
        for keys, inner, adjoint, learned in zip(
            self._keys(task), state.inner, state.adjoint, pairs, strict=True
        ):
            for i, key in enumerate(keys):
                # Copies: a row of a stack would keep the whole stack.
                self._kept[key] = _Kept(
                    inner[i].clone(),
                    None if adjoint is None else adjoint[i].clone(),
                    None if learned is None else learned.row(i),
                )

    def state_dict(self) -> list[dict[str, Any]]:
        """What is kept, of tensors and plain values."""
        return [
            {
                "key": key,
                "inner": one.inner,
                "adjoint": one.adjoint,
                "pairs": None if one.pairs is None else vars(one.pairs),
            }
            for key, one in self._kept.items()
        ]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Keep what `state_dict` returned, and forget the rest."""
        self._kept = {
            row["key"]: _Kept(
                row["inner"],
                row["adjoint"],
                None if row["pairs"] is None else SecantPairs(**row["pairs"]),
            )
            for row in state
        }

    def _keys(self, task: Task | TaskBatch | Sequence[Task] | None) -> list[list[Hashable]]:
        if self.constant:
            # Position in the list of groups and within the group.
            sizes = [1]
            if isinstance(task, TaskBatch):
                sizes = [task.count]
            elif isinstance(task, list | tuple):
                sizes = [len(where) for where in positions_by_shape(task)]
            return [[(g, i) for i in range(size)] for g, size in enumerate(sizes)]
        if task is None:
            return [[None]]
        if isinstance(task, Task):
            groups: list[list[Hashable]] = [[task.key]]
        elif isinstance(task, TaskBatch):
            assert task.keys is not None
            groups = [list(task.keys)]
        else:
            groups = [[task[i].key for i in where] for where in positions_by_shape(task)]
        for group in groups:
            if any(key is None for key in group):
                raise ValueError(
                    "a task has no `key`, and tasks change from step to step, so that a warm start "
                    "cannot find its own; pass Task(..., key=...), or warm_start='none'"
                )
            if len(set(group)) < len(group):
                raise ValueError(
                    "two tasks of one step have the same `key`; give each its own, or pass "
                    "warm_start='none'"
                )
        return groups

    def _inner(self, group: list[_Kept | None]) -> Tensor:
        # NaN says "begin anew", which is also what a failed task left.
        like = _first(group).inner
        unknown = torch.full_like(like, float("nan"))
        if self.kind == "adjoint":
            return unknown.expand(len(group), -1)
        return torch.stack([unknown if one is None else one.inner for one in group])

    def _adjoint(self, group: list[_Kept | None]) -> Tensor | None:
        like = _first(group).adjoint
        if self.kind == "inner" or like is None:
            return None
        zero = torch.zeros_like(like)
        return torch.stack(
            [zero if one is None or one.adjoint is None else one.adjoint for one in group]
        )

    def _pairs(self, group: list[_Kept | None]) -> SecantPairs | None:
        like = _first(group).pairs
        if self.kind == "inner" or like is None:
            return None
        nothing = SecantPairs(
            torch.zeros_like(like.s), torch.zeros_like(like.y), torch.zeros_like(like.valid)
        )
        rows = [nothing if one is None or one.pairs is None else one.pairs for one in group]
        return SecantPairs(
            torch.cat([row.s for row in rows], 1),
            torch.cat([row.y for row in rows], 1),
            torch.cat([row.valid for row in rows], 1),
        )


def _first(group: list[_Kept | None]) -> _Kept:
    return next(one for one in group if one is not None)
