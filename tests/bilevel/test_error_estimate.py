import pytest
import torch

from bilevel import (
    Proximal,
    SolveError,
    Task,
    hypergradient,
    problem_from,
)
from bilevel.problems import Logistic, Quadratic, Ridge
from bilevel.pytree import tree_leaves
from bilevel.solvers import (
    CG,
    MINRES,
    DenseExact,
    GradientDescent,
    Implicit,
    ImplicitCG,
    NeumannSeries,
)
from tests.helpers import randn

F64 = torch.float64


def rows(gradient):
    return torch.cat([leaf.reshape(leaf.shape[0], -1) for leaf in tree_leaves(gradient)], 1)


def true_errors(example, result):
    exact = hypergradient(
        example.problem,
        example.outer,
        example.task,
        inner_solver=example.inner_solver,
        method=DenseExact(),
        reduction="none",
    )
    found = rows(result.gradient)
    return (found - rows(exact.gradient)).norm(dim=1) / found.norm(dim=1)


def estimated(example, method, steps=30, **kwargs):
    return hypergradient(
        example.problem,
        example.outer,
        example.task,
        inner_solver=GradientDescent(1 / example.lipschitz, steps),
        method=method,
        reduction="none",
        **kwargs,
    )


METHODS = [
    ImplicitCG(rtol=1e-10, error_estimate=True),
    ImplicitCG(max_steps=3, rtol=0.0, error_estimate=True),
    ImplicitCG(rtol=1e-1, error_estimate=True, correct=True),
    NeumannSeries(terms=5, error_estimate=True),
    DenseExact(error_estimate=True),
    DenseExact(error_estimate=True, damping=0.3),
    Implicit(MINRES(rtol=1e-2), error_estimate=True),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("problem", [Logistic, Ridge, Quadratic], ids=lambda p: p.__name__)
def test_the_estimate_is_the_error(problem, method):
    example = problem.example(tasks=3)
    result = estimated(example, method)
    ratio = result.diagnostics.error_estimate / true_errors(example, result)
    assert (ratio > 0.7).all()
    assert (ratio < 1.4).all()


def test_the_gradient_is_the_same_with_and_without():
    example = Logistic.example(tasks=3)
    task = example.task
    weighted = type(task)(
        task.inner_batch, task.outer_batch, weights=torch.tensor([1.0, 2.0, 0.5], dtype=F64)
    )
    settings = {"inner_solver": GradientDescent(1.0, 30)}
    for reduction in ("mean", "none"):
        plain, more = (
            hypergradient(
                example.problem,
                example.outer,
                weighted,
                method=ImplicitCG(rtol=1e-9, error_estimate=asked),
                reduction=reduction,
                **settings,
            )
            for asked in (False, True)
        )
        torch.testing.assert_close(more.gradient, plain.gradient, rtol=1e-12, atol=1e-14)
        assert more.status == plain.status
    assert plain.diagnostics.error_estimate is None


def test_the_two_parts_say_what_to_do():
    """An unfinished inner solve shows in one part, an unfinished adjoint solve in the other."""
    example = Logistic.example()
    inner = estimated(example, ImplicitCG(rtol=1e-12, error_estimate=True), steps=20).diagnostics
    linear = estimated(example, ImplicitCG(rtol=0.2, error_estimate=True), steps=2000).diagnostics
    assert inner.inner_error > 1e3 * inner.linear_error
    assert linear.linear_error > 1e3 * linear.inner_error
    assert inner.gradient_norm.shape == (1,)


def test_a_list_of_shapes_keeps_its_order():
    tasks = [
        Task(*(Logistic.generated(6, 2, n, n, seed=n).task.inner_batch,) * 2) for n in (20, 30, 20)
    ]
    settings = {
        "inner_solver": GradientDescent(0.5, 15),
        "method": ImplicitCG(rtol=1e-2, error_estimate=True),
    }
    outer = torch.full((6,), -2.0, dtype=F64)
    together = hypergradient(Logistic(), outer, tasks, **settings)
    alone = [hypergradient(Logistic(), outer, task, **settings) for task in tasks]
    for i, one in enumerate(alone):
        torch.testing.assert_close(
            together.diagnostics.error_estimate[i], one.diagnostics.error_estimate[0]
        )


def test_where_newton_does_not_contract_the_estimate_is_infinite():
    """g = log cosh: from far away a Newton step overshoots ever further."""
    problem = problem_from(
        lambda z, x, b: torch.log(torch.cosh(z - x)).sum(),
        lambda z, x, b: (z**2).sum(),
        initial_inner=lambda x, b: x + 3.0,
    )
    result = hypergradient(
        problem,
        randn(2),
        inner_solver=GradientDescent(0.1, 1),
        method=ImplicitCG(error_estimate=True),
    )
    assert result.diagnostics.error_estimate.isinf().all()


def test_a_correction_that_makes_it_worse_is_not_taken():
    problem = problem_from(
        lambda z, x, b: torch.log(torch.cosh(z - x)).sum(),
        lambda z, x, b: (z**2).sum(),
        initial_inner=lambda x, b: torch.stack([x[0] + 3.0, x[1] + 0.1]),
    )
    x = randn(2)
    tasks = Task.stack([Task(torch.tensor(3.0)), Task(torch.tensor(0.1))])
    shifted = problem_from(
        lambda z, x, b: torch.log(torch.cosh(z - x)).sum(),
        lambda z, x, b: (z**2).sum(),
        initial_inner=lambda x, b: x + b,
    )
    settings = {"inner_solver": GradientDescent(0.1, 1)}
    plain = hypergradient(shifted, x, tasks, method=ImplicitCG(), **settings)
    result = hypergradient(shifted, x, tasks, method=ImplicitCG(correct=True), **settings)
    assert result.inner[0].equal(plain.inner[0])
    assert (result.inner[1] - x).norm() < 0.05 * (plain.inner[1] - x).norm()
    single = hypergradient(problem, x, method=ImplicitCG(correct=True), **settings)
    assert single.diagnostics.inner.residual.isfinite().all()


def test_an_indefinite_problem_has_no_estimate():
    problem = problem_from(
        lambda z, x, b: 0.5 * (z**2 * torch.tensor([1.0, -0.5], dtype=F64)).sum(),
        lambda z, x, b: ((z - 1) ** 2).sum(),
        Proximal(0.1),
    )
    result = hypergradient(
        problem,
        torch.ones(2, dtype=F64),
        inner_solver=GradientDescent(0.1, 3),
        method=ImplicitCG(error_estimate=True),
    )
    assert not result.ok
    assert result.diagnostics.error_estimate.isinf().all()
    assert "estimated error" in repr(result)


def test_float32_knows_its_own_rounding():
    example = Logistic.example(tasks=2, dtype=torch.float32)
    result = estimated(example, ImplicitCG(rtol=1e-1, error_estimate=True), steps=200)
    double = Logistic.example(tasks=2)
    exact = hypergradient(
        double.problem,
        double.outer,
        double.task,
        inner_solver=double.inner_solver,
        method=DenseExact(),
        reduction="none",
    )
    found = rows(result.gradient).double()
    true = (found - rows(exact.gradient)).norm(dim=1) / found.norm(dim=1)
    ratio = result.diagnostics.error_estimate / true
    assert (ratio > 0.7).all()
    assert (ratio < 1.4).all()


def test_an_equilibrium_has_an_estimate_too():
    """A nonsymmetric Jacobian: the Newton step needs the other transposition than the adjoint."""
    A = torch.tensor([[0.2, 0.9], [-0.5, 0.1]], dtype=F64)
    problem = problem_from(
        None,
        lambda z, x, b: ((z - 1) ** 2).sum(),
        initial_inner=lambda x, b: torch.zeros_like(x),
        stationarity=lambda z, x, b: z - torch.tanh(A @ z + x),
    )
    x = torch.tensor([0.3, -0.2], dtype=F64)
    exact = hypergradient(
        problem, x, inner_solver=GradientDescent(1.0, 500), method=DenseExact()
    ).gradient
    for method in (DenseExact(error_estimate=True), NeumannSeries(3, 0.8, error_estimate=True)):
        result = hypergradient(problem, x, inner_solver=GradientDescent(1.0, 6), method=method)
        true = (result.gradient - exact).norm() / result.gradient.norm()
        ratio = result.diagnostics.error_estimate / true
        assert 0.7 < ratio < 1.4
    corrected = hypergradient(
        problem, x, inner_solver=GradientDescent(1.0, 6), method=DenseExact(correct=True)
    ).gradient
    assert (corrected - exact).norm() < 0.05 * (result.gradient - exact).norm()


def test_a_failed_task_leaves_the_others_their_estimate():
    problem = problem_from(
        lambda z, x, b: 0.5 * (z**2).sum() + (b.log() * z).sum(),
        lambda z, x, b: ((z - 1) ** 2).sum(),
        Proximal(1.0),
    )
    tasks = Task.stack([Task(torch.tensor(v, dtype=F64)) for v in (1.0, -1.0, 2.0)])
    result = hypergradient(
        problem,
        randn(2),
        tasks,
        inner_solver=GradientDescent(0.3, 2),
        method=ImplicitCG(error_estimate=True),
    )
    assert result.diagnostics.failed == (1,)
    assert result.diagnostics.error_estimate.isfinite().tolist() == [True, False, True]


# The certified bound


@pytest.mark.parametrize("problem", [Quadratic, Ridge, Logistic], ids=lambda p: p.__name__)
@pytest.mark.parametrize("steps", [10, 100, 400])
@pytest.mark.parametrize("rtol", [1e-1, 1e-6])
def test_the_bound_holds(problem, steps, rtol):
    example = problem.example(tasks=3)
    result = estimated(
        example, ImplicitCG(rtol=rtol, error_bound=True, error_estimate=True), steps=steps
    )
    true = true_errors(example, result)
    assert (result.diagnostics.error_bound >= 0.99 * true).all()


def test_the_bound_of_a_quadratic_is_not_far_off():
    example = Quadratic.generated(12, 12, condition=2.0)
    result = estimated(example, ImplicitCG(rtol=1e-10, error_bound=True), steps=5)
    assert result.diagnostics.error_bound < 30 * true_errors(example, result)


def test_without_constants_there_is_no_bound():
    problem = problem_from(
        lambda z, x, b: 0.5 * (z**2).sum(), lambda z, x, b: (z**2).sum(), Proximal(1.0)
    )
    with pytest.raises(SolveError.__mro__[1], match="declares no constants"):
        hypergradient(
            problem,
            randn(2),
            inner_solver=GradientDescent(0.3, 2),
            method=ImplicitCG(error_bound=True),
        )


# Methods keep what they were told


def test_toward_raises_the_budget_and_sets_the_tolerance():
    assert CG(max_steps=5, rtol=0.0).toward(0.05, 200) == CG(max_steps=200, rtol=0.05)
    assert CG(max_steps=500, indefinite="error").toward(0.05, 200).indefinite == "truncate"
    assert DenseExact().toward(0.1, 10) == DenseExact()
    assert Implicit(CG()).toward(0.1, 200) == Implicit(CG(200, 0.1))


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_an_error_along_a_flat_direction_is_seen(condition):
    """Little of the residual lies there, and most of the error."""
    A = torch.tensor([1.0, 1 / condition], dtype=F64)
    problem = problem_from(
        lambda z, x, b: 0.5 * (A * z * z).sum() - (x * z).sum(),
        lambda z, x, b: 0.5 * ((z - 1) ** 2).sum(),
        initial_inner=lambda x, b: torch.zeros_like(x),
    )
    x = torch.ones(2, dtype=F64)
    off = 1e-2 * torch.tensor([1.0, 0.03 * condition], dtype=F64)
    result = hypergradient(
        problem,
        x,
        inner_solver=None,
        inner=x / A + off,
        method=ImplicitCG(rtol=1e-10, error_estimate=True),
    )
    exact = (x / A - 1) / A
    true = (result.gradient - exact).norm() / result.gradient.norm()
    assert 0.7 < result.diagnostics.error_estimate.item() / true < 1.4


def test_a_rougher_estimate_costs_less():
    example = Logistic.example()
    fine, rough = (
        estimated(example, ImplicitCG(error_estimate=asked)).diagnostics.counts["products"]
        for asked in (True, 0.1)
    )
    assert rough < fine
    with pytest.raises(ValueError, match="`error_estimate` is 2"):
        ImplicitCG(error_estimate=2.0)
