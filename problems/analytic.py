"""What problems with a formula share: dense float64 matrices and the mean over tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from bilevel.task import Task, TaskBatch

__all__ = ["eigenvalue_bounds", "mean_over_tasks", "tasks_of"]


def tasks_of(task: Task | TaskBatch) -> list[Task]:
    """The tasks one by one."""
    return [task] if isinstance(task, Task) else task.unstack()


def mean_over_tasks(function: Callable[[Task], Tensor], task: Task | TaskBatch) -> Tensor:
    """The weighted mean of a quantity of one task, as `bilevel.hypergradient` takes it."""
    tasks = tasks_of(task)
    total = sum(one.weight for one in tasks)
    return torch.stack([one.weight / total * function(one) for one in tasks]).sum(0)


def eigenvalue_bounds(matrices: Iterable[Tensor]) -> tuple[float, float]:
    """The smallest and the largest eigenvalue of all of the symmetric ``matrices`` ``[n, n]``."""
    values = [torch.linalg.eigvalsh(matrix.double()) for matrix in matrices]
    return min(v[0].item() for v in values), max(v[-1].item() for v in values)
