import os

import pytest
import torch

from bilevel import hypergradient
from bilevel.problems import Logistic
from bilevel.solvers import DenseExact, ImplicitCG

needs_data = pytest.mark.skipif(
    not os.environ.get("BILEVEL_DATA"), reason="BILEVEL_DATA names no folder of data"
)


def newton(outer, task, steps=30):
    """w* and the hypergradient by Newton's method and dense algebra written out."""
    (a, y), (b, t) = task.inner_batch, task.outer_batch
    weights = outer.exp()
    w = torch.zeros_like(outer)
    for _ in range(steps):
        p = torch.sigmoid(-y * (a @ w))
        gradient = -(a.mT @ (y * p)) / len(y) + weights * w
        hessian = (a.mT * (p * (1 - p))) @ a / len(y) + weights.diag()
        w = w - torch.linalg.solve(hessian, gradient)
    rhs = -(b.mT @ (t * torch.sigmoid(-t * (b @ w)))) / len(t)
    return w, -weights * w * torch.linalg.solve(hessian, rhs)


def compute(example, method):
    return hypergradient(
        example.problem,
        example.outer,
        example.task,
        inner_solver=example.inner_solver,
        method=method,
    )


@pytest.mark.parametrize("method", [DenseExact(), ImplicitCG(max_steps=300, rtol=1e-12)], ids=repr)
def test_meets_newton(method, relative_error):
    example = Logistic.generated(features=20, rows=60, spread=3.0)
    w, gradient = newton(example.outer, example.task)
    found = compute(example, method)
    assert relative_error(found.inner, w) <= 1e-8
    assert relative_error(found.gradient, gradient) <= 1e-8


def test_stacked_tasks_meet_newton(relative_error):
    example = Logistic.generated(features=8, rows=40, spread=3.0, tasks=3)
    expected = [newton(example.outer, task)[1] for task in example.task.unstack()]
    found = compute(example, ImplicitCG(max_steps=300, rtol=1e-12))
    assert relative_error(found.gradient, torch.stack(expected).mean(0)) <= 1e-8
    accuracy = found.metrics["accuracy"]
    assert accuracy.shape == (3,)
    assert ((accuracy > 0.6) & (accuracy <= 1.0)).all()


def write(folder, labels):
    lines = [f"{label} 1:{i % 5} 3:{0.5 * i}" for i, label in enumerate(labels)]
    (folder / "toy").write_text("\n".join(lines), "utf-8")


def test_libsvm_rows_are_split_and_labels_mapped(tmp_path):
    write(tmp_path, [2, 1, 1, 2, 2, 1, 2, 2, 1, 1])
    example = Logistic.from_libsvm("toy", tmp_path, validation=0.3)
    (a, y), (b, t) = example.task.inner_batch, example.task.outer_batch
    assert a.shape == (7, 3)
    assert b.shape == (3, 3)
    rows = torch.cat([torch.cat([a, b]), torch.cat([y, t]).unsqueeze(-1)], 1)
    found = rows[rows[:, 2].argsort()]
    assert found[:, 3].tolist() == [1, -1, -1, 1, 1, -1, 1, 1, -1, -1]
    assert found[:, 2].tolist() == [0.5 * i for i in range(10)]
    again = Logistic.from_libsvm("toy", tmp_path, validation=0.3)
    other = Logistic.from_libsvm("toy", tmp_path, validation=0.3, seed=1)
    assert torch.equal(again.task.inner_batch[0], a)
    assert not torch.equal(other.task.inner_batch[0], a)
    few = Logistic.from_libsvm("toy", tmp_path, rows=4)
    assert few.task.inner_batch[0].shape == (2, 3)


def test_libsvm_sets_that_do_not_fit_are_refused(tmp_path):
    write(tmp_path, [1, 2, 3])
    with pytest.raises(ValueError, match="3 different labels"):
        Logistic.from_libsvm("toy", tmp_path)
    write(tmp_path, [1, 2])
    with pytest.raises(ValueError, match="validation"):
        Logistic.from_libsvm("toy", tmp_path, validation=1.0)


@needs_data
@pytest.mark.parametrize(
    ("name", "features", "accuracy"), [("a9a", 123, 0.8), ("mushrooms", 112, 0.95)]
)
def test_real_data(name, features, accuracy, relative_error):
    example = Logistic.from_libsvm(name, rows=4000, log_weight=-5.0)
    assert example.outer.shape == (features,)
    found = compute(example, ImplicitCG(max_steps=500, rtol=1e-10))
    assert found.ok
    assert found.metrics["accuracy"] > accuracy
    assert relative_error(found.gradient, newton(example.outer, example.task)[1]) <= 1e-6
