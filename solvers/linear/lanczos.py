"""The Lanczos tridiagonal matrix that a Krylov solver builds on its way (Lanczos, 1950).

Its eigenvalues, the Ritz values, approximate those of A, the extreme ones first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Lanczos", "smallest_ritz_value"]

_MOST_STEPS = 128
Scalars: TypeAlias = Tensor | float


class Lanczos:
    """Records the tridiagonal matrix of each task, for the first steps of the first cycle."""

    def __init__(self, like: Tensor) -> None:
        self._tasks, self._device = len(like), like.device
        self._steps: list[tuple[Scalars, Scalars, Scalars]] = []
        self._of_cg = False
        self._open = True

    def add(self, tasks: Scalars, diagonal: Scalars, off_diagonal: Scalars) -> None:
        """Note one step of those tasks, scalars ``[tasks]``, or numbers of a task alone."""
        if self._open and len(self._steps) < _MOST_STEPS:
            self._steps.append((tasks, diagonal, off_diagonal))

    def add_coefficients(self, tasks: Scalars, alpha: Scalars, beta: Scalars) -> None:
        """Note α and β of one step of conjugate gradients, which tell the entries."""
        self._of_cg = True
        self.add(tasks, alpha, beta)

    def close(self) -> None:
        """The first cycle is over: what follows belongs to another matrix."""
        self._open = False

    def table(self) -> Tensor:
        """``[tasks, steps, 2]``: diagonal, and off-diagonal to the next step; NaN past the end."""
        if not self._steps:
            return torch.zeros(self._tasks, 0, 2, dtype=torch.float64, device=self._device)
        tasks, first, second = (_stacked(one) for one in zip(*self._steps, strict=True))
        if self._of_cg:
            carried = torch.nn.functional.pad((second / first)[:, :-1], (1, 0))
            first, second = 1.0 / first + carried, second.sqrt() / first
        return torch.where(tasks.unsqueeze(-1), torch.stack([first, second], -1), float("nan"))


def _stacked(steps: Sequence[Scalars]) -> Tensor:
    kind = torch.bool if isinstance(steps[0], bool) else torch.float64
    return torch.stack(
        [x if isinstance(x, Tensor) else torch.tensor([x], dtype=kind) for x in steps], 1
    )


def smallest_ritz_value(table: Tensor) -> Tensor:
    """The smallest eigenvalue of each task's tridiagonal matrix; infinite where it has no step."""
    diagonal, off = table[..., 0], table[:, :-1, 1]
    inside = diagonal.isfinite()
    # Past a task's own steps: entries larger than any eigenvalue, coupled to nothing.
    bound = torch.where(table.isfinite(), table, 0.0).abs().sum((1, 2)).unsqueeze(-1)
    matrix = torch.diag_embed(torch.where(inside, diagonal, 2.0 * bound + 1.0))
    off = torch.where(inside[:, 1:] & off.isfinite(), off, 0.0)
    matrix = matrix + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    none = torch.full_like(bound.squeeze(-1), float("inf"))
    if not table.shape[1]:
        return none
    return torch.where(inside.any(-1), torch.linalg.eigvalsh(matrix)[:, 0], none)
