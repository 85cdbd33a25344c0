"""Keeping the first search directions of a solve, and what the matrix made of them.

The first ones, not the last: they hold the eigenvectors of outlying eigenvalues, so that the next
solve saves more steps, and keeping them costs nothing once the slots are full.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.operator import SecantPairs
from bilevel.rows import column, norm

__all__ = ["PairKeeper"]


class PairKeeper:
    """The first ``count`` pairs of each task.

    It begins with the pairs of the last outer step, so that a short solve displaces only the oldest
    of them.
    """

    def __init__(self, count: int, like: Tensor, older: SecantPairs | None) -> None:
        self._s = like.new_zeros(count, *like.shape)
        self._y = torch.zeros_like(self._s)
        self._valid = torch.zeros(count, len(like), dtype=torch.bool, device=like.device)
        # The slot of each task that is written next, which is that of its oldest pair.
        self._next = torch.zeros(len(like), dtype=torch.int64, device=like.device)
        self._calls = 0
        self._task = torch.arange(len(like), device=like.device)
        if older is not None:
            kept = min(count, len(older.s))
            self._s[count - kept :] = older.s[len(older.s) - kept :]
            self._y[count - kept :] = older.y[len(older.s) - kept :]
            self._valid[count - kept :] = older.valid[len(older.s) - kept :]

    def add(self, tasks: Tensor, p: Tensor, ap: Tensor) -> None:
        """Keep p / ‖p‖ and A p / ‖p‖ for those tasks; the others keep what they have."""
        if self._calls == len(self._s):
            return
        self._calls += 1
        length = norm(p)
        slot = (self._next, self._task)
        rows = tasks.unsqueeze(-1)
        self._s[slot] = torch.where(rows, p / column(length, p), self._s[slot])
        self._y[slot] = torch.where(rows, ap / column(length, p), self._y[slot])
        self._valid[slot] = tasks | self._valid[slot]
        self._next = torch.where(tasks, (self._next + 1) % len(self._s), self._next)

    def pairs(self) -> SecantPairs:
        """The pairs, newest last."""
        count = len(self._s)
        slots = torch.arange(count, device=self._s.device).unsqueeze(-1)
        order = ((slots + self._next) % count, self._task)
        return SecantPairs(self._s[order], self._y[order], self._valid[order])
