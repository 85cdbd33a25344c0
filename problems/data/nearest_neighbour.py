"""The classifier that learns nothing: what a few-shot learner has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.task import TaskBatch

__all__ = ["pixel_nearest_neighbour"]


def pixel_nearest_neighbour(batch: TaskBatch) -> Tensor:
    """Accuracy of giving each query image the label of the nearest support image, in pixels.

    Args:
        batch: Tasks whose inner and outer batches are (images ``[tasks, n, ...]``, labels
            ``[tasks, n]``), and maybe more, as `EpisodeSampler` draws them.

    Returns:
        Share of query images classified correctly, ``[tasks]``.
    """
    support, support_labels, *_ = batch.inner_batch
    query, query_labels, *_ = batch.outer_batch
    nearest = torch.cdist(query.flatten(2), support.flatten(2)).argmin(-1)
    predicted = support_labels.gather(1, nearest)
    accuracy: Tensor = (predicted == query_labels).to(query.dtype).mean(-1)
    return accuracy
