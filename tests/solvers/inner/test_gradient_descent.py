import pytest
import torch

from bilevel import Proximal, Status, Task, problem_from, solve_inner
from bilevel.solvers import GradientDescent
from tests.helpers import quadratic, quadratic_task, randn

F64 = torch.float64


def bowl(size=1.0):
    return problem_from(
        lambda z, x, batch: 0.5 * size * ((z - x) ** 2).sum(),
        lambda z, x, batch: z.sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x),
    )


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_the_steps_are_those_of_torch_optim_sgd(momentum, nesterov, steps):
    if nesterov and not momentum:
        return
    task, x = quadratic_task(4, condition=9.0), randn(4, seed=5)
    z = torch.zeros(4, dtype=F64, requires_grad=True)
    sgd = torch.optim.SGD([z], lr=0.3, momentum=momentum, nesterov=nesterov)
    for _ in range(steps):
        sgd.zero_grad()
        quadratic().inner_objective(z, x, task.inner_batch).backward()
        sgd.step()
    solver = GradientDescent(lr=0.3, max_steps=steps, momentum=momentum, nesterov=nesterov)
    found = solve_inner(quadratic(), x, task, inner_solver=solver)
    torch.testing.assert_close(found.inner, z.detach(), rtol=1e-12, atol=1e-14)


def test_a_step_includes_the_regularizer():
    problem = problem_from(
        lambda z, x, batch: 0.5 * (z**2).sum(), lambda z, x, batch: z.sum(), Proximal(3.0)
    )
    found = solve_inner(
        problem, torch.ones(2, dtype=F64), inner_solver=GradientDescent(0.1, max_steps=2)
    )
    # z₁ = 1 − 0.1; z₂ = z₁ − 0.1 (z₁ + 3 (z₁ − 1)).
    torch.testing.assert_close(found.inner, torch.full((2,), 0.84, dtype=F64))


def test_tasks_stop_each_on_its_own():
    tasks = [quadratic_task(3, condition=c, seed=1) for c in (1.001, 3.0, 10.0)]
    solver = GradientDescent(lr=0.9, max_steps=2000, tol=1e-6)
    found = solve_inner(quadratic(), randn(3), tasks, inner_solver=solver)
    assert found.status == (Status.CONVERGED,) * 3
    steps = found.steps.tolist()
    assert steps[0] < steps[1] < steps[2] < 2000
    assert (found.residual <= 1e-6).all()


def test_without_a_tolerance_all_steps_are_taken():
    found = solve_inner(bowl(), randn(2), inner_solver=GradientDescent(1.0, max_steps=30))
    assert found.steps.tolist() == [30]


def test_a_start_within_the_tolerance_takes_no_step():
    found = solve_inner(
        bowl(),
        randn(2),
        inner_solver=GradientDescent(1.0, max_steps=30, tol=1e-9),
        inner=randn(2),
    )
    assert found.steps.tolist() == [0]
    assert found.status == (Status.CONVERGED,)


@pytest.mark.parametrize("tol", [None, 1e-6])
@pytest.mark.parametrize("steps", [20, 1200])
def test_divergence_is_told(tol, steps):
    found = solve_inner(
        bowl(), randn(2), inner_solver=GradientDescent(3.0, max_steps=steps, tol=tol)
    )
    assert found.status[0] in (Status.DIVERGED, Status.NON_FINITE)


def test_zero_steps_return_the_start():
    found = solve_inner(bowl(), randn(2), inner_solver=GradientDescent(1.0, max_steps=0))
    assert torch.equal(found.inner, torch.zeros(2, dtype=F64))
    assert found.status == (Status.BUDGET,)


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.float16, torch.bfloat16])
def test_dtype_is_inherited(dtype):
    found = solve_inner(bowl(), torch.ones(2, dtype=dtype), inner_solver=GradientDescent(0.5, 3))
    assert found.inner.dtype == dtype
    assert found.residual.dtype == F64


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": 0.1, "max_steps": -1}, "max_steps"),
        ({"lr": 0.1, "momentum": 1.0}, "momentum"),
        ({"lr": 0.1, "momentum": -0.1}, "momentum"),
        ({"lr": 0.1, "tol": 0.0}, "tol"),
        ({"lr": 0.1, "nesterov": True}, "nesterov"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(arguments, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        GradientDescent(**arguments)


def test_an_equilibrium_is_iterated_on_its_stationarity():
    problem = problem_from(
        None,
        lambda z, x, batch: z.sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x),
        stationarity=lambda z, x, batch: z - 0.5 * torch.cos(z + x),
    )
    x = randn(3)
    found = solve_inner(problem, x, Task(), inner_solver=GradientDescent(1.0, 100, tol=1e-12))
    assert found.ok
    z = found.inner
    torch.testing.assert_close(z, 0.5 * torch.cos(z + x), rtol=0, atol=1e-12)
    assert found.value.isnan().all()
