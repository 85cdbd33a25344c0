"""Sparse data in the batches: the same answers as dense ones."""

import pytest
import torch

from bilevel import Task, hypergradient
from bilevel.problems import Logistic
from bilevel.solvers import LBFGS, ImplicitCG


def rows(seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(30, 40, dtype=torch.float64, generator=generator)
    features = features * (torch.rand(30, 40, generator=generator) < 0.1)
    return features, torch.randn(30, dtype=torch.float64, generator=generator).sign()


def gradient(tasks):
    outer = torch.zeros(40, dtype=torch.float64)
    solver, method = LBFGS(tol=1e-10), ImplicitCG(rtol=1e-10)
    return hypergradient(Logistic(), outer, tasks, inner_solver=solver, method=method).gradient


@pytest.mark.filterwarnings("ignore:`.*` cannot be stacked by torch.vmap")
@pytest.mark.parametrize("count", [1, 3])
def test_sparse_data_give_the_answer_of_dense_data(count):
    data = [rows(seed) for seed in range(count)]
    dense = gradient([Task((x, y), (x, y)) for x, y in data])
    sparse = gradient([Task((x.to_sparse_coo(), y), (x.to_sparse_coo(), y)) for x, y in data])
    assert torch.allclose(sparse, dense, rtol=1e-9, atol=1e-14)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_other_layouts_are_refused_with_a_cure():
    x, y = rows(0)
    message = r"`inner_batch\[0\]` is torch.sparse_csr, .* `.to_sparse_coo\(\)`"
    with pytest.raises(ValueError, match=message):
        gradient(Task((x.to_sparse_csr(), y), (x, y)))
