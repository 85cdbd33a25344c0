"""Many products at once: the same as one after the other, or one after the other."""

import pytest
import torch

from bilevel import Kernels, Operator, Task
from bilevel.flat import FlatProblem, Outer
from bilevel.linearised import linearise
from bilevel.probe import probe
from bilevel.registry import PROBLEMS
from bilevel.stationarity import StationarityGraph
from tests.helpers import randn

F64 = torch.float64


def system(problem, outer, tasks, kernels=None):
    flat = FlatProblem.of(problem, Outer.of(outer), tasks, kernels=kernels)
    probe(flat)
    z = flat.start + 0.1 * randn(*flat.start.shape, seed=1).to(flat.start)
    return linearise(flat, z)


def one_by_one(found, block):
    return torch.stack([found.graph.pull(v) for v in block])


@pytest.mark.parametrize("kernels", [None, Kernels(products="recomputed")], ids=["kept", "again"])
@pytest.mark.parametrize("tasks", [None, 3], ids=["single", "batch"])
@pytest.mark.parametrize("name", list(PROBLEMS))
def test_a_block_is_what_its_vectors_are(name, tasks, kernels):
    example = PROBLEMS[name].example(tasks=tasks)
    batch = Task.stack([example.task]) if tasks is None else example.task
    found = system(example.problem, example.outer, batch, kernels)
    block = randn(5, *found.z.shape, seed=2).to(found.z)
    product = found.operator.block(block)
    wanted = one_by_one(found, block)
    assert torch.linalg.vector_norm(product - wanted) <= 1e-9 * wanted.norm()
    assert found.flat.counts["products"] == 5 * found.flat.count
    shifted = found.operator.damped(0.3).block(block)
    torch.testing.assert_close(shifted, wanted + 0.3 * block)


def logistic():
    example = PROBLEMS["logistic"].example()
    return system(example.problem, example.outer, Task.stack([example.task]))


def test_small_blocks_are_pulled_in_one_pass(monkeypatch):
    found = logistic()
    block = randn(4, *found.z.shape)
    pull, pulls = StationarityGraph.pull, []
    monkeypatch.setattr(StationarityGraph, "pull", lambda self, v: pulls.append(v) or pull(self, v))
    found.operator.block(block)
    assert len(pulls) == 1  # the one that it is compared with
    found.operator.block(block[:1])
    assert len(pulls) == 2


def test_what_has_no_rule_for_blocks_goes_one_by_one(monkeypatch):
    found = logistic()
    block = randn(4, *found.z.shape)

    def refuse(self, block):
        raise RuntimeError("Batching rule not implemented")

    monkeypatch.setattr(StationarityGraph, "_batched", refuse)
    torch.testing.assert_close(found.operator.block(block), one_by_one(found, block))
    assert found.flat.stacking.pulls_blocks is False


def test_a_rule_that_is_wrong_is_not_believed(monkeypatch):
    found = logistic()
    block = randn(4, *found.z.shape)
    right = StationarityGraph._batched
    monkeypatch.setattr(StationarityGraph, "_batched", lambda self, b: 1.001 * right(self, b))
    torch.testing.assert_close(found.operator.block(block), one_by_one(found, block))
    assert found.flat.stacking.pulls_blocks is False


def test_an_operator_of_products_alone_and_its_transpose():
    matrix = randn(1, 3, 3)
    operator = Operator(
        lambda v: (matrix @ v.unsqueeze(-1)).squeeze(-1),
        lambda v: (matrix.mT @ v.unsqueeze(-1)).squeeze(-1),
    )
    block = randn(4, 1, 3, seed=5)
    torch.testing.assert_close(operator.block(block), block @ matrix.mT)
    torch.testing.assert_close(operator.T.block(block), block @ matrix)
    assert operator.block(block[:0]).shape == (0, 1, 3)
