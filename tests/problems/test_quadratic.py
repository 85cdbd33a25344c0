import math

import pytest
import torch

from bilevel import Proximal, Task, hypergradient
from bilevel.problems import Quadratic
from bilevel.solvers import DenseExact, GradientDescent, ImplicitCG, NeumannSeries, Unrolled

REGULARIZERS = {
    "none": None,
    "iMAML": Proximal(2.0),
    "per entry": Proximal(torch.linspace(0.0, 3.0, 5, dtype=torch.float64)),
    "learned": Proximal(torch.exp, center=torch.zeros_like),
    "center": Proximal(0.5, center=lambda outer: outer.sin()),
}


def compute(example, method, inner_solver=None):
    return hypergradient(
        example.problem,
        example.outer,
        example.task,
        inner_solver=inner_solver or example.inner_solver,
        method=method,
    )


def test_formula_agrees_with_the_data():
    example = Quadratic.generated(n=6, outer_size=3, condition=50.0)
    inner, outer = example.task.inner_batch, example.task.outer_batch
    inverse = torch.linalg.inv(inner["A"])
    z = inverse @ (inner["B"] @ example.outer + inner["c"])
    expected = outer["d"] + inner["B"].mT @ inverse @ (z - outer["t"])
    torch.testing.assert_close(example.gradient, expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(
        example.problem.solution(example.outer, inner), z, rtol=1e-12, atol=0.0
    )


def test_spectrum_is_the_one_asked_for():
    example = Quadratic.generated(n=6, condition=64.0, tasks=3)
    for matrix, condition in zip(example.task.inner_batch["A"], (4.0, 16.0, 64.0), strict=True):
        expected = torch.logspace(0, math.log10(condition), 6, dtype=torch.float64)
        torch.testing.assert_close(torch.linalg.eigvalsh(matrix), expected)
    assert example.lipschitz == pytest.approx(64.0)
    assert example.mu == pytest.approx(1.0)


@pytest.mark.parametrize("regularizer", REGULARIZERS.values(), ids=REGULARIZERS)
@pytest.mark.parametrize("tasks", [None, 3])
def test_every_regularizer(regularizer, tasks, relative_error, dense_hypergradient):
    example = Quadratic.generated(5, 5, 20.0, tasks, regularizer=regularizer)
    cg = compute(example, ImplicitCG(max_steps=100, rtol=1e-12))
    assert cg.ok
    assert relative_error(cg.gradient, example.gradient) <= 1e-10
    assert relative_error(compute(example, Unrolled()).gradient, example.gradient) <= 1e-10
    reference = dense_hypergradient(example.problem, example.outer, example.task, cg.inner)
    assert relative_error(reference, example.gradient) <= 1e-10


@pytest.mark.parametrize(
    ("condition", "dtype", "method", "tolerance"),
    [
        (1e4, torch.float64, ImplicitCG(max_steps=1000, rtol=1e-12), 1e-8),
        (1e4, torch.float64, DenseExact(), 1e-8),
        (1e2, torch.float64, NeumannSeries(terms=2200, scale=1e-2), 1e-8),
        (1e3, torch.float32, ImplicitCG(max_steps=1000, rtol=1e-6), 1e-4),
        (1e3, torch.float32, DenseExact(), 1e-4),
    ],
    ids=str,
)
def test_ill_conditioned(condition, dtype, method, tolerance, relative_error):
    example = Quadratic.generated(50, 10, condition, tasks=3, dtype=dtype)
    found = compute(example, method)
    assert found.gradient.dtype == dtype
    assert relative_error(found.gradient, example.gradient) <= tolerance


def test_unrolled_descent_converges_to_the_formula(relative_error):
    example = Quadratic.generated(10, 4, 10.0, tasks=3)
    descent = GradientDescent(lr=1 / example.lipschitz, max_steps=300)
    found = compute(example, Unrolled(), descent)
    assert relative_error(found.gradient, example.gradient) <= 1e-8


def test_weights_weigh_the_formula(relative_error):
    example = Quadratic.generated(5, 3, 10.0, tasks=2)
    first, second = example.task.unstack()
    batch = Task.stack([Task(first.inner_batch, first.outer_batch, weight=3.0), second])
    one, two = (
        example.problem.exact_hypergradient(example.outer, task) for task in (first, second)
    )
    expected = 0.75 * one + 0.25 * two
    found = hypergradient(
        example.problem,
        example.outer,
        batch,
        inner_solver=example.inner_solver,
        method=DenseExact(),
    )
    assert relative_error(found.gradient, expected) <= 1e-12
    exact = example.problem.exact_hypergradient(example.outer, batch)
    assert relative_error(exact, expected) <= 1e-12


@pytest.mark.parametrize("setting", [{"n": 0}, {"outer_size": 0}, {"tasks": 0}, {"condition": 0.5}])
def test_settings_are_checked(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Quadratic.generated(**setting)
