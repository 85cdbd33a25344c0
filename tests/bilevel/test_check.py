"""`check_hypergradient`: it passes what is right, and tells what is wrong and why."""

from __future__ import annotations

import pytest
import torch

import bilevel
from bilevel import (
    ObjectiveError,
    Proximal,
    Task,
    assert_hypergradient,
    check_hypergradient,
    problem_from,
)
from bilevel import reference as dense
from bilevel.problems import FewShot, Quadratic, Sinusoid
from bilevel.solvers import (
    DenseExact,
    FirstOrder,
    GradientDescent,
    ImplicitCG,
    NeumannSeries,
    Unrolled,
)

F64 = torch.float64


@pytest.fixture
def example():
    return Quadratic.example(tasks=2)


def check(example, method, inner_solver=None, **settings):
    return check_hypergradient(
        example.problem,
        example.outer,
        example.task,
        inner_solver=inner_solver or example.inner_solver,
        method=method,
        **settings,
    )


def test_a_right_one_passes_and_says_so(example):
    report = check(example, ImplicitCG(rtol=1e-10))
    assert report.ok
    assert report.reference_ok
    assert report.error < 1e-8
    assert report.advice == ()
    text = str(report)
    assert text.startswith("PASS: ImplicitCG")
    for word in ("outer", "cosine", "CONVERGED (2 tasks)", "condition", "products"):
        assert word in text


def test_one_task_and_lists_are_checked_too(example):
    one = Quadratic.example()
    assert check(one, DenseExact()).ok
    listed = check_hypergradient(
        example.problem,
        example.outer,
        example.task.unstack(),
        inner_solver=example.inner_solver,
        method=DenseExact(),
    )
    assert listed.ok


def test_the_bias_of_first_order_is_found():
    problem = problem_from(
        lambda z, x, b: z.exp().sum(), lambda z, x, b: ((z - 2) ** 2).sum(), Proximal(1.0)
    )
    report = check_hypergradient(
        problem,
        torch.tensor([0.5, 1.0], dtype=F64),
        inner_solver=GradientDescent(lr=0.2, max_steps=500, tol=1e-11),
        method=FirstOrder(),
    )
    assert not report.ok
    assert any("biased" in sentence for sentence in report.advice)


@pytest.mark.parametrize(
    ("method", "inner_solver", "advice"),
    [
        (ImplicitCG(), GradientDescent(lr=0.01, max_steps=3), "inner solution is off by"),
        (ImplicitCG(max_steps=1), None, "adjoint system is solved to"),
        (NeumannSeries(terms=2), None, "adjoint system is solved to"),
        (Unrolled(), GradientDescent(lr=0.01, max_steps=3), "inner solution is off by"),
    ],
)
def test_an_inaccurate_one_fails_with_advice(example, method, inner_solver, advice):
    report = check(example, method, inner_solver)
    assert not report.ok
    assert any(advice in sentence for sentence in report.advice), report


def test_negative_curvature_is_found():
    problem = problem_from(
        lambda z, x, b: -(z**2).sum() + 0.25 * (z**4).sum() - z @ x,
        lambda z, x, b: (z**2).sum(),
        initial_inner=lambda x, b: torch.zeros_like(x),
    )
    report = check_hypergradient(
        problem,
        torch.tensor([1e-3, -1e-3], dtype=F64),
        inner_solver=GradientDescent(lr=0.1, max_steps=1),
        method=ImplicitCG(),
    )
    assert report.eigenvalues[0] < 0
    assert not report.ok
    assert any("eigenvalue" in sentence for sentence in report.advice)


def test_too_much_condition_for_float32_is_said():
    example = Quadratic.generated(20, 4, 1e7, dtype=torch.float32)
    report = check(example, ImplicitCG(max_steps=5), rtol=1e-4)
    assert any("use float64" in sentence for sentence in report.advice)


def test_a_nonsmooth_objective_is_found_by_finite_differences():
    problem = problem_from(
        lambda z, x, b: 0.5 * ((z - x) ** 2).sum(),
        lambda z, x, b: (z - 1.0).abs().sum(),
        initial_inner=lambda x, b: torch.zeros_like(x),
    )
    report = check_hypergradient(
        problem,
        torch.full((2,), 1 + 2e-6, dtype=F64),
        inner_solver=GradientDescent(lr=1.0, max_steps=1),
        method=DenseExact(),
    )
    assert not report.reference_ok
    assert any("nonsmooth" in sentence for sentence in report.advice)


def test_an_equilibrium_is_checked():
    matrix = torch.tensor([[0.2, -0.3], [0.4, 0.1]], dtype=F64)
    problem = problem_from(
        None,
        lambda z, x, b: (z**2).sum(),
        stationarity=lambda z, x, b: z - (matrix @ z).tanh() - x,
        initial_inner=lambda x, b: torch.zeros_like(x),
    )
    report = check_hypergradient(
        problem,
        torch.tensor([1.0, -0.5], dtype=F64),
        inner_solver=GradientDescent(lr=1.0, max_steps=200, tol=1e-13),
        method=DenseExact(),
    )
    assert report.ok, report


def test_large_problems_are_refused(example):
    with pytest.raises(ValueError, match="more than `max_n` = 3"):
        check(example, DenseExact(), max_n=3)


def test_a_problem_with_data_of_its_own_is_told_to_pass_it():
    data = torch.ones(3, 2)
    problem = problem_from(
        lambda z, x, b: ((data @ z - 1) ** 2).sum(), lambda z, x, b: (z**2).sum(), Proximal(1.0)
    )
    with pytest.raises(ObjectiveError, match="pass data in the batch"):
        check_hypergradient(
            problem,
            torch.zeros(2),
            inner_solver=GradientDescent(lr=0.1, max_steps=20),
            method=DenseExact(),
        )


def test_assert_hypergradient_raises_with_the_report(example):
    settings = {"inner_solver": example.inner_solver}
    arguments = (example.problem, example.outer, example.task)
    assert assert_hypergradient(*arguments, method=DenseExact(), **settings).ok
    with pytest.raises(AssertionError, match=r"FAIL: ImplicitCG(?s:.*)advice"):
        assert_hypergradient(*arguments, method=ImplicitCG(max_steps=1), **settings)


def test_weights_and_failed_tasks_are_treated_as_in_the_mean(example):
    tasks = example.task.unstack()
    weighted = [
        Task(t.inner_batch, t.outer_batch, weight=w) for t, w in zip(tasks, (1.0, 3.0), strict=True)
    ]
    broken = {key: value * float("nan") for key, value in tasks[0].inner_batch.items()}
    report = check_hypergradient(
        example.problem,
        example.outer,
        [*weighted, Task(broken, tasks[0].outer_batch)],
        inner_solver=example.inner_solver,
        method=DenseExact(),
    )
    assert report.error < 1e-8
    assert report.result.diagnostics.failed == (2,)


def test_networks_are_checked_in_float32():
    example = Sinusoid.example(dtype=torch.float32)
    report = check(example, ImplicitCG(max_steps=200, rtol=1e-6))
    assert report.ok, report
    assert report.dtype is torch.float32


def test_the_names_are_public():
    assert {"HypergradientCheck", "LeafCheck"} <= set(bilevel.__all__)


@pytest.mark.parametrize("away", [0.0, 1e-3])
def test_the_reference_stops_at_the_solution(away, monkeypatch):
    """At rounding ‖F‖ goes on falling by its last digits, one Jacobian at a time."""
    example = FewShot.example()
    solved = bilevel.solve_inner(
        example.problem, example.outer, example.task, inner_solver=example.inner_solver
    ).inner
    taken = []
    jacobian = dense._jacobian
    monkeypatch.setattr(dense, "_jacobian", lambda *a: taken.append(1) or jacobian(*a))
    start = {name: value + away for name, value in solved.items()}
    found = dense.dense_hypergradient(example.problem, example.outer, example.task, start)
    assert len(taken) <= 6
    assert found.residual < 1e-13
    whole = torch.cat([solved[name].reshape(-1) for name in solved])
    torch.testing.assert_close(found.inner, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e12])
def test_the_reference_waits_for_the_smallest_entry(scale):
    """z₀ is of size `scale`, z₁ solves exp(z₁) = 3x: dF/dx = 2 log(3x) / x."""

    def inner(z, x, batch):
        return 0.5 * (z[0] / scale - x[0]) ** 2 + z[1].exp() - 3 * x[0] * z[1]

    problem = problem_from(inner, lambda z, x, b: z[1] ** 2, initial_inner=lambda x, b: z0)
    x, z0 = torch.tensor([0.7], dtype=F64), torch.zeros(2, dtype=F64)
    found = dense.dense_hypergradient(problem, x, Task(), z0)
    torch.testing.assert_close(found.gradient[0], 2 * (3 * x).log() / x, rtol=1e-12, atol=0)
