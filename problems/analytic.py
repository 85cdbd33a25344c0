"""What problems with a formula share: dense float64 matrices and the mean over tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from bilevel.pytree import tree_map
from bilevel.task import Task, TaskBatch

__all__ = ["disc_bounds", "eigenvalue_bounds", "mean_over_tasks", "tasks_of"]

T = TypeVar("T", Tensor, dict[str, Tensor])


def tasks_of(task: Task | TaskBatch) -> list[Task]:
    """The tasks one by one."""
    return [task] if isinstance(task, Task) else task.unstack()


def mean_over_tasks(function: Callable[[Task], T], task: Task | TaskBatch) -> T:
    """The weighted mean of a tensor or a dict of one task, as `bilevel.hypergradient` takes it."""
    tasks = tasks_of(task)
    total = sum(one.weight for one in tasks)
    shares = [one.weight / total for one in tasks]

    def mean(*leaves: Tensor) -> Tensor:
        return torch.stack([w * leaf for w, leaf in zip(shares, leaves, strict=True)]).sum(0)

    result: T = tree_map(mean, *(function(one) for one in tasks))
    return result


def eigenvalue_bounds(matrices: Iterable[Tensor]) -> tuple[float, float]:
    """The smallest and the largest eigenvalue of all of the symmetric ``matrices`` ``[n, n]``."""
    values = [torch.linalg.eigvalsh(matrix.double()) for matrix in matrices]
    return min(v[0].item() for v in values), max(v[-1].item() for v in values)


def disc_bounds(matrices: Sequence[Tensor]) -> tuple[float, float]:
    """(c − r, c + r) with ‖J − cI‖₂ ≤ r for all of the ``matrices`` J ``[n, n]``."""
    low, high = eigenvalue_bounds((matrix + matrix.mT) / 2 for matrix in matrices)
    center = (low + high) / 2
    identity = torch.eye(len(matrices[0]), dtype=torch.float64)
    radius = max(torch.linalg.matrix_norm(m.double() - center * identity, 2) for m in matrices)
    return center - radius.item(), center + radius.item()
