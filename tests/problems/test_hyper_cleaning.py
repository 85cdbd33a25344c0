import pytest
import torch
import torch.nn.functional as F

from bilevel import hypergradient
from bilevel.problems import HyperCleaning
from bilevel.solvers import DenseExact, ImplicitCG


def newton(outer, task, features, classes, strength, steps=30):
    """W* and the hypergradient with the Hessian of the softmax written out."""
    (a, y), (b, t) = task.inner_batch, task.outer_batch
    weights = outer.sigmoid() / len(y)
    identity = torch.eye(features * classes, dtype=a.dtype)
    w = torch.zeros(features, classes, dtype=a.dtype)
    for _ in range(steps):
        p = (a @ w).softmax(-1)
        gradient = a.mT @ (weights[:, None] * (p - F.one_hot(y, classes))) + strength * w
        block = p.diag_embed() - p[:, :, None] * p[:, None, :]
        hessian = torch.einsum("i,if,ig,icd->fcgd", weights, a, a, block)
        hessian = hessian.reshape(features * classes, -1) + strength * identity
        w = w - torch.linalg.solve(hessian, gradient.flatten()).reshape_as(w)
    rhs = b.mT @ ((b @ w).softmax(-1) - F.one_hot(t, classes)) / len(t)
    v = torch.linalg.solve(hessian, rhs.flatten()).reshape_as(w)
    slope = outer.sigmoid() * (1 - outer.sigmoid()) / len(y)
    residual = (a @ w).softmax(-1) - F.one_hot(y, classes)
    return w, -slope * ((a @ v) * residual).sum(-1)


def compute(example, method):
    return hypergradient(
        example.problem,
        example.outer,
        example.task,
        inner_solver=example.inner_solver,
        method=method,
    )


@pytest.mark.parametrize("method", [DenseExact(), ImplicitCG(max_steps=300, rtol=1e-12)], ids=repr)
@pytest.mark.parametrize("tasks", [None, 2])
def test_meets_newton(method, tasks, relative_error):
    example = HyperCleaning.generated(6, 3, rows=24, strength=0.05, tasks=tasks)
    each = [example.task] if tasks is None else example.task.unstack()
    expected = torch.stack([newton(example.outer, one, 6, 3, 0.05)[1] for one in each]).mean(0)
    assert relative_error(compute(example, method).gradient, expected) <= 1e-8


def test_descent_finds_the_wrong_labels():
    example = HyperCleaning.generated(8, 3, rows=60, validation_rows=60, corrupted=0.4)
    outer = example.outer
    first = compute(example, ImplicitCG())
    for _ in range(30):
        found = hypergradient(
            example.problem,
            outer,
            example.task,
            inner_solver=example.inner_solver,
            method=ImplicitCG(),
        )
        outer = outer - 200.0 * found.gradient
    wrong, right = outer[:24], outer[24:]
    assert (wrong < right.median()).double().mean() > 0.8
    assert found.outer_value < 0.9 * first.outer_value
    assert found.metrics["accuracy"] >= first.metrics["accuracy"]


def test_labels_are_corrupted_as_told():
    clean = HyperCleaning.generated(rows=50, corrupted=0.0).task.inner_batch[1]
    noisy = HyperCleaning.generated(rows=50, corrupted=0.3).task.inner_batch[1]
    assert (noisy[:15] != clean[:15]).all()
    assert torch.equal(noisy[15:], clean[15:])


@pytest.mark.parametrize(
    "setting", [{"corrupted": 1.5}, {"strength": 0.0}, {"features": 1}, {"classes": 1}]
)
def test_settings_are_checked(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        HyperCleaning.generated(**setting)
