import itertools

import pytest
import torch
import torch.nn.functional as F

from bilevel import (
    NotDifferentiableError,
    Proximal,
    Status,
    StructureError,
    Task,
    hypergradient,
    problem_from,
    solve_inner,
)
from bilevel.problems import FewShot, Logistic, Ridge
from bilevel.solvers import GradientDescent, HessianFree, ImplicitCG, Unrolled
from tests.helpers import quadratic, quadratic_answer, quadratic_task, randn

F64 = torch.float64


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3, 1e4])
def test_a_quadratic_takes_one_exact_newton_step(condition):
    task, x = quadratic_task(5, condition=condition, seed=3), randn(5, seed=7)
    solver = HessianFree(tol=1e-8, cg_rtol=1e-12)
    found = solve_inner(quadratic(), x, task, inner_solver=solver)
    assert found.status == (Status.CONVERGED,)
    assert found.steps.item() == 1
    want = torch.linalg.solve(task.inner_batch["A"], task.inner_batch["B"] @ x)
    torch.testing.assert_close(found.inner, want)


def rosenbrock():
    return problem_from(
        lambda z, x, batch: (batch * (z[1:] - z[:-1] ** 2) ** 2 + (x - z[:-1]) ** 2).sum(),
        lambda z, x, batch: z.sum(),
        initial_inner=lambda x, batch: torch.tensor([-1.2, 1.0, 0.5], dtype=F64) + 0 * x,
    )


def test_a_curved_valley_is_followed_by_every_task():
    tasks = [Task(torch.tensor(b, dtype=F64)) for b in (1.0, 10.0, 100.0)]
    found = solve_inner(
        rosenbrock(), torch.ones((), dtype=F64), tasks, inner_solver=HessianFree(tol=1e-8)
    )
    assert found.status == (Status.CONVERGED,) * 3
    for z in found.inner:
        torch.testing.assert_close(z, torch.ones(3, dtype=F64), rtol=0, atol=1e-6)


def double_well():
    """g = (z² − 1)² / 4 per entry: a maximum at 0, minima at ±1."""
    return problem_from(
        lambda z, x, batch: ((z**2 - 1) ** 2).sum() / 4,
        lambda z, x, batch: z.sum(),
        initial_inner=lambda x, batch: x,
    )


def test_negative_curvature_leads_to_a_minimum_and_not_to_the_maximum():
    # A Newton step from 0.3 goes to the maximum at 0.
    start = torch.tensor([0.3, -0.2, 0.9], dtype=F64)
    found = solve_inner(double_well(), start, inner_solver=HessianFree(tol=1e-9))
    assert found.status == (Status.CONVERGED,)
    torch.testing.assert_close(found.inner, torch.tensor([1.0, -1.0, 1.0], dtype=F64))


@pytest.mark.parametrize(("start", "end"), [(0.3, 1.3), (-0.1, -1.1)])
def test_where_curvature_is_negative_the_step_is_one_along_the_gradient(start, end):
    # −∂G over ‖∂G‖, because no curvature that was met is positive.
    found = solve_inner(
        double_well(),
        torch.tensor([start], dtype=F64),
        inner_solver=HessianFree(max_steps=1, tol=None),
    )
    assert found.inner.item() == pytest.approx(end, abs=1e-12)


def test_exact_directions_converge_quadratically():
    data, labels = randn(40, 4), (torch.arange(40) % 2).double()
    problem = problem_from(
        lambda z, x, batch: (
            F.binary_cross_entropy_with_logits(data @ z, labels) + 0.005 * (z**2).sum()
        ),
        lambda z, x, batch: z.sum(),
        initial_inner=lambda x, batch: torch.full((4,), 2.0, dtype=F64) + 0 * x,
    )
    residuals = [
        solve_inner(
            problem,
            torch.zeros((), dtype=F64),
            inner_solver=HessianFree(max_steps=k, tol=None, cg_rtol=1e-13),
        ).residual.item()
        for k in range(1, 8)
    ]
    # r₊ ≤ c r² with the c of the first steps near the solution, until rounding.
    close = [r for r in residuals if r < 0.1]
    ratios = [b / a**2 for a, b in itertools.pairwise(close) if b > 1e-13]
    assert len(ratios) >= 2
    assert max(ratios) <= 10 * ratios[0]
    assert residuals[-1] < 1e-13


def test_the_objective_never_rises():
    example = FewShot.example(tasks=2)
    values = [
        solve_inner(
            example.problem,
            example.outer,
            example.task,
            inner_solver=HessianFree(max_steps=k, tol=None, cg_steps=5, cg_rtol=0.0),
        ).value
        for k in range(6)
    ]
    for before, after in itertools.pairwise(values):
        assert (after <= before + 1e-14).all()


@pytest.mark.parametrize("matrix", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("problem", [Ridge, Logistic, FewShot], ids=lambda p: p.__name__)
def test_both_matrices_reach_the_same_solution(problem, matrix):
    example = problem.example(tasks=3)
    solver = HessianFree(tol=1e-10, max_steps=200, matrix=matrix)
    found = solve_inner(example.problem, example.outer, example.task, inner_solver=solver)
    exact = solve_inner(
        example.problem, example.outer, example.task, inner_solver=example.inner_solver
    )
    assert found.status == (Status.CONVERGED,) * 3
    torch.testing.assert_close(found.inner, exact.inner, rtol=1e-7, atol=1e-8)


def test_a_bad_scale_costs_far_fewer_steps_than_descent():
    task, x = quadratic_task(20, condition=300.0, seed=3), randn(20, seed=7)
    newton = solve_inner(quadratic(), x, task, inner_solver=HessianFree(tol=1e-6))
    descent = solve_inner(
        quadratic(), x, task, inner_solver=GradientDescent(lr=1.99, max_steps=10_000, tol=1e-6)
    )
    assert newton.status == descent.status == (Status.CONVERGED,)
    assert newton.steps.item() < 0.01 * descent.steps.item()


def test_products_are_counted_and_the_hypergradient_is_exact():
    task, x = quadratic_task(6, condition=50.0), randn(6)
    settings = {"inner_solver": HessianFree(tol=1e-11, cg_steps=3, cg_rtol=0.0, max_steps=100)}
    found = hypergradient(quadratic(), x, task, method=ImplicitCG(rtol=1e-12), **settings)
    torch.testing.assert_close(found.gradient, quadratic_answer(task, x), rtol=1e-8, atol=1e-9)
    steps = found.diagnostics.inner.steps.item()
    # Three products each, fewer at a direction that rounding ends; the rest is the adjoint's.
    assert 2 * steps < found.diagnostics.counts["products"] <= 3 * steps + 10


def test_batched_tasks_equal_tasks_alone():
    tasks = [quadratic_task(4, condition=c, seed=i) for i, c in enumerate((2.0, 50.0, 1e3))]
    solver, x = HessianFree(tol=1e-9, cg_steps=2, max_steps=500), randn(4)
    together = solve_inner(quadratic(), x, tasks, inner_solver=solver)
    for i, task in enumerate(tasks):
        alone = solve_inner(quadratic(), x, task, inner_solver=solver)
        torch.testing.assert_close(together.inner[i], alone.inner, rtol=1e-9, atol=1e-10)
        assert together.steps[i] == alone.steps


def test_float32_reaches_float32_accuracy():
    data = randn(30, 4).float()
    problem = problem_from(
        lambda z, x, batch: F.softplus(data @ z).mean(),
        lambda z, x, batch: z.sum(),
        Proximal(0.1),
    )
    found = solve_inner(problem, torch.ones(4), inner_solver=HessianFree(tol=1e-5))
    assert found.status == (Status.CONVERGED,)
    assert found.inner.dtype == torch.float32


def test_a_nan_task_does_not_disturb_its_neighbour():
    good, bad = quadratic_task(3, seed=1), quadratic_task(3, seed=2)
    data = {**bad.inner_batch, "B": bad.inner_batch["B"] * float("nan")}
    tasks = [good, Task(data, bad.outer_batch)]
    both = solve_inner(quadratic(), randn(3), tasks, inner_solver=HessianFree(tol=1e-9))
    alone = solve_inner(quadratic(), randn(3), good, inner_solver=HessianFree(tol=1e-9))
    assert both.status == (Status.CONVERGED, Status.NON_FINITE)
    torch.testing.assert_close(both.inner[0], alone.inner, rtol=1e-10, atol=1e-12)


def test_an_equilibrium_is_refused():
    problem = problem_from(
        None,
        lambda z, x, batch: z.sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x),
        stationarity=lambda z, x, batch: z - x,
    )
    with pytest.raises(StructureError, match="GradientDescent"):
        solve_inner(problem, randn(2), inner_solver=HessianFree())


def test_gauss_newton_needs_a_prediction():
    with pytest.raises(StructureError, match="declare `predict` and `loss`"):
        solve_inner(
            quadratic(),
            randn(3),
            quadratic_task(3),
            inner_solver=HessianFree(matrix="gauss-newton"),
        )


def test_it_cannot_be_unrolled():
    with pytest.raises(NotDifferentiableError, match="HessianFree"):
        hypergradient(
            quadratic(), randn(3), quadratic_task(3), inner_solver=HessianFree(), method=Unrolled()
        )


@pytest.mark.parametrize(
    "arguments",
    [
        {"cg_steps": 0},
        {"cg_rtol": 1.0},
        {"cg_rtol": float("nan")},
        {"matrix": "fisher"},
        {"max_steps": -1},
        {"tol": 0.0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
        HessianFree(**arguments)
