import itertools

import pytest
import torch

from bilevel import (
    NotDifferentiableError,
    Status,
    StructureError,
    Task,
    hypergradient,
    problem_from,
    solve_inner,
)
from bilevel.problems import FewShot
from bilevel.solvers import BacktrackingDescent, GradientDescent, ImplicitCG, Unrolled
from tests.helpers import quadratic, quadratic_answer, quadratic_task, randn

F64 = torch.float64


def test_where_descent_is_stable_it_is_gradient_descent():
    example = FewShot.example(tasks=3)
    settings = {"lr": 0.3 / example.lipschitz, "max_steps": 12}
    found, plain = (
        solve_inner(example.problem, example.outer, example.task, inner_solver=solver)
        for solver in (BacktrackingDescent(**settings), GradientDescent(**settings))
    )
    for name in found.inner:
        assert found.inner[name].equal(plain.inner[name])


@pytest.mark.parametrize("lr", [1.9, 10.0, 1e6])
def test_no_rate_is_too_large(lr):
    task, x = quadratic_task(5, condition=10.0, seed=3), randn(5, seed=7)
    found = solve_inner(
        quadratic(), x, task, inner_solver=BacktrackingDescent(lr, max_steps=3000, tol=1e-9)
    )
    assert found.status == (Status.CONVERGED,)
    want = torch.linalg.solve(task.inner_batch["A"], task.inner_batch["B"] @ x)
    torch.testing.assert_close(found.inner, want, rtol=1e-7, atol=1e-8)


def test_the_objective_never_rises_and_every_step_is_one_gradient():
    task, x = quadratic_task(6, condition=100.0), randn(6)
    found = [
        solve_inner(quadratic(), x, task, inner_solver=BacktrackingDescent(30.0, max_steps=k))
        for k in range(12)
    ]
    values = [one.value.item() for one in found]
    for before, after in itertools.pairwise(values):
        assert after <= before + 1e-14 * abs(before)
    assert values[-1] < values[0]
    few, many = (
        hypergradient(
            quadratic(),
            x,
            task,
            inner_solver=BacktrackingDescent(30.0, max_steps=k),
            method=ImplicitCG(),
        ).diagnostics.counts["gradients"]
        for k in (2, 9)
    )
    assert many - few == 7


def test_each_task_has_its_own_rate():
    calm, steep = quadratic_task(4, seed=1), quadratic_task(4, seed=2)
    steep = Task({**steep.inner_batch, "A": 1000 * steep.inner_batch["A"]}, steep.outer_batch)
    solver, x = BacktrackingDescent(lr=1.0, max_steps=15), randn(4)
    together = solve_inner(quadratic(), x, [calm, steep], inner_solver=solver)
    for i, task in enumerate((calm, steep)):
        alone = solve_inner(quadratic(), x, task, inner_solver=solver)
        torch.testing.assert_close(together.inner[i], alone.inner, rtol=1e-12, atol=1e-13)
    plain = solve_inner(quadratic(), x, calm, inner_solver=GradientDescent(1.0, 15))
    torch.testing.assert_close(together.inner[0], plain.inner, rtol=1e-12, atol=1e-13)


def test_the_hypergradient_is_exact_once_solved():
    task, x = quadratic_task(6, condition=20.0), randn(6)
    found = hypergradient(
        quadratic(),
        x,
        task,
        inner_solver=BacktrackingDescent(5.0, max_steps=3000, tol=1e-11),
        method=ImplicitCG(rtol=1e-12),
    )
    torch.testing.assert_close(found.gradient, quadratic_answer(task, x), rtol=1e-8, atol=1e-9)


def test_float32_reaches_float32_accuracy():
    task, x = quadratic_task(5, condition=10.0, seed=3), randn(5, seed=7)
    task = Task({k: v.float() for k, v in task.inner_batch.items()}, {"target": torch.zeros(5)})
    found = solve_inner(
        quadratic(), x.float(), task, inner_solver=BacktrackingDescent(1.0, 2000, tol=1e-5)
    )
    assert found.status == (Status.CONVERGED,)


def test_a_nan_task_does_not_disturb_its_neighbour():
    good, bad = quadratic_task(3, seed=1), quadratic_task(3, seed=2)
    data = {**bad.inner_batch, "B": bad.inner_batch["B"] * float("nan")}
    solver = BacktrackingDescent(1.0, 500, tol=1e-9)
    both = solve_inner(
        quadratic(), randn(3), [good, Task(data, bad.outer_batch)], inner_solver=solver
    )
    alone = solve_inner(quadratic(), randn(3), good, inner_solver=solver)
    assert both.status == (Status.CONVERGED, Status.NON_FINITE)
    torch.testing.assert_close(both.inner[0], alone.inner, rtol=1e-10, atol=1e-12)


def test_what_it_cannot_do_is_refused():
    equilibrium = problem_from(
        None,
        lambda z, x, batch: z.sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x),
        stationarity=lambda z, x, batch: z - x,
    )
    with pytest.raises(StructureError, match="GradientDescent"):
        solve_inner(equilibrium, randn(2), inner_solver=BacktrackingDescent(0.1))
    with pytest.raises(NotDifferentiableError, match="BacktrackingDescent"):
        hypergradient(
            quadratic(),
            randn(3),
            quadratic_task(3),
            inner_solver=BacktrackingDescent(0.1),
            method=Unrolled(),
        )


@pytest.mark.parametrize("arguments", [{"lr": 0.0}, {"lr": float("nan")}, {"tol": 0.0}], ids=str)
def test_settings_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
        BacktrackingDescent(**{"lr": 0.1, **arguments})
