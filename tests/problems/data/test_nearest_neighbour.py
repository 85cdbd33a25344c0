"""The pixel nearest neighbour."""

import torch

from bilevel.problems.data import pixel_nearest_neighbour
from bilevel.task import TaskBatch


def test_accuracy_per_task():
    support = torch.tensor([[0.0, 1.0], [0.0, 1.0]])[..., None, None, None]
    query = torch.tensor([[0.1, 0.2, 0.9, 0.8], [0.1, 0.9, 0.2, 0.8]])[..., None, None, None]
    labels = torch.tensor([[3, 7], [3, 7]])
    query_labels = torch.tensor([[3, 3, 7, 7], [3, 3, 7, 7]])
    batch = TaskBatch((support, labels), (query, query_labels))
    assert pixel_nearest_neighbour(batch).tolist() == [1.0, 0.5]
    # What batch norm refers to, where it may not see all queries, is no image to classify.
    more = TaskBatch((support, labels), (query, query_labels, support))
    assert pixel_nearest_neighbour(more).tolist() == [1.0, 0.5]
