import pytest
import torch
import torch.nn.functional as F

from bilevel import Status, StructureError, Task, problem_from, solve_inner
from bilevel.solvers import LBFGS
from tests.helpers import quadratic, quadratic_task, randn

F64 = torch.float64


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3, 1e4])
@pytest.mark.parametrize("tol", [1e-6, 1e-9])
def test_quadratics_are_solved_in_few_steps(condition, tol):
    task, x = quadratic_task(5, condition=condition, seed=3), randn(5, seed=7)
    found = solve_inner(quadratic(), x, task, inner_solver=LBFGS(tol=tol, max_steps=100))
    assert found.status == (Status.CONVERGED,)
    want = torch.linalg.solve(task.inner_batch["A"], task.inner_batch["B"] @ x)
    assert (found.inner - want).norm() <= 1.01 * tol * condition


def rosenbrock():
    return problem_from(
        lambda z, x, batch: (batch * (z[1:] - z[:-1] ** 2) ** 2 + (x - z[:-1]) ** 2).sum(),
        lambda z, x, batch: z.sum(),
        initial_inner=lambda x, batch: torch.tensor([-1.2, 1.0, 0.5], dtype=F64) + 0 * x,
    )


def test_a_curved_valley_is_followed_by_every_task():
    tasks = [Task(torch.tensor(b, dtype=F64)) for b in (1.0, 10.0, 100.0)]
    found = solve_inner(
        rosenbrock(),
        torch.ones((), dtype=F64),
        tasks,
        inner_solver=LBFGS(tol=1e-8, max_steps=500),
    )
    assert found.status == (Status.CONVERGED,) * 3
    for z in found.inner:
        torch.testing.assert_close(z, torch.ones(3, dtype=F64), rtol=0, atol=1e-6)


def test_logistic_regression_is_solved_to_high_accuracy():
    data, labels = randn(40, 4), (torch.arange(40) % 2).double()
    problem = problem_from(
        lambda z, x, batch: (
            F.binary_cross_entropy_with_logits(data @ z, labels) + 0.5 * x * (z**2).sum()
        ),
        lambda z, x, batch: z.sum(),
        initial_inner=lambda x, batch: torch.zeros(4, dtype=F64),
    )
    x = torch.tensor(1e-2, dtype=F64)
    found = solve_inner(problem, x, inner_solver=LBFGS(tol=1e-11))
    assert found.status == (Status.CONVERGED,)
    assert found.steps.item() < 40


def test_the_objective_never_rises():
    task, x = quadratic_task(6, condition=100.0), randn(6)
    values = [
        solve_inner(quadratic(), x, task, inner_solver=LBFGS(max_steps=k, tol=None)).value.item()
        for k in range(8)
    ]
    assert values == sorted(values, reverse=True)


def test_float32_reaches_float32_accuracy():
    data = randn(30, 4).float()
    problem = problem_from(
        lambda z, x, batch: F.softplus(data @ z).mean() + 0.05 * ((z - x) ** 2).sum(),
        lambda z, x, batch: z.sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x),
    )
    found = solve_inner(problem, torch.ones(4), inner_solver=LBFGS(tol=1e-5))
    assert found.status == (Status.CONVERGED,)
    assert found.inner.dtype == torch.float32


def test_a_nan_task_does_not_disturb_its_neighbour():
    good, bad = quadratic_task(3, seed=1), quadratic_task(3, seed=2)
    data = {**bad.inner_batch, "B": bad.inner_batch["B"] * float("nan")}
    tasks = [good, Task(data, bad.outer_batch)]
    both = solve_inner(quadratic(), randn(3), tasks, inner_solver=LBFGS(tol=1e-9))
    alone = solve_inner(quadratic(), randn(3), good, inner_solver=LBFGS(tol=1e-9))
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
        solve_inner(problem, randn(2), inner_solver=LBFGS())


@pytest.mark.parametrize("arguments", [{"memory": 0}, {"max_steps": -1}, {"tol": 0.0}], ids=str)
def test_settings_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
        LBFGS(**arguments)
