import pytest
import torch

from bilevel import Proximal, Status, StructureError, Task, hypergradient, problem_from, solve_inner
from bilevel.problems import FewShot
from bilevel.solvers import GradientDescent, ImplicitCG, ProximalGradient, Unrolled
from tests.helpers import assert_directional, quadratic, quadratic_task, randn, spd

F64 = torch.float64
A = spd(4, condition=10.0, largest=1.0)


def problem(strength):
    """g = ½ (z − batch)ᵀ A (z − batch), held near x; f = ½ ‖z‖²."""
    return problem_from(
        lambda z, x, batch: 0.5 * (z - batch) @ A @ (z - batch),
        lambda z, x, batch: 0.5 * (z**2).sum(),
        Proximal(strength),
    )


@pytest.mark.parametrize("strength", [0.0, 0.1, 10.0, 1e4])
def test_one_rate_suits_every_strength(strength):
    task, x = Task(randn(4, seed=1)), randn(4, seed=2)
    solver = ProximalGradient(lr=1.0, max_steps=2000, tol=1e-10 * max(1.0, strength))
    found = solve_inner(problem(strength), x, task, inner_solver=solver)
    assert found.status == (Status.CONVERGED,)
    matrix = A + strength * torch.eye(4, dtype=F64)
    want = torch.linalg.solve(matrix, A @ task.inner_batch + strength * x)
    torch.testing.assert_close(found.inner, want, rtol=1e-8, atol=1e-9)


def test_gradient_descent_at_that_rate_diverges():
    task, x = Task(randn(4, seed=1)), randn(4, seed=2)
    found = solve_inner(
        problem(10.0), x, task, inner_solver=GradientDescent(lr=1.0, max_steps=100, tol=1e-9)
    )
    assert found.status[0] >= Status.DIVERGED


def test_a_step_is_the_formula():
    z0, x, batch, lr, strength = randn(4, seed=3), randn(4, seed=2), randn(4, seed=1), 0.5, 3.0
    found = solve_inner(
        problem(strength), x, Task(batch), inner_solver=ProximalGradient(lr, 1), inner=z0
    )
    forward = z0 - lr * A @ (z0 - batch)
    torch.testing.assert_close(found.inner, (forward + lr * strength * x) / (1 + lr * strength))


def test_strengths_that_vary_and_are_learned_are_unrolled_exactly():
    example = FewShot.example(tasks=2)
    learned = FewShot(example.problem.net, strength=3.0, learn_strength="parameter")
    outer = learned.initial_outer(example.outer)
    settings = {"inner_solver": ProximalGradient(lr=0.2, max_steps=7)}
    found = hypergradient(learned, outer, example.task, method=Unrolled(), **settings)

    def value(point):
        solved = hypergradient(learned, point, example.task, method=Unrolled(), **settings)
        return solved.outer_value.mean()

    assert_directional(found.gradient, value, outer, rtol=1e-6)


def test_implicit_and_unrolled_agree_once_solved():
    task, x = Task(randn(4, seed=1)), randn(4, seed=2)
    solver = ProximalGradient(lr=1.0, max_steps=400, tol=1e-13)
    implicit, unrolled = (
        hypergradient(problem(2.0), x, task, inner_solver=solver, method=method).gradient
        for method in (ImplicitCG(rtol=1e-13), Unrolled())
    )
    torch.testing.assert_close(implicit, unrolled, rtol=1e-10, atol=1e-12)


def test_a_problem_without_regularizer_is_refused():
    with pytest.raises(StructureError, match="use GradientDescent, or set a `regularizer`"):
        solve_inner(quadratic(), randn(3), quadratic_task(3), inner_solver=ProximalGradient(lr=0.1))


@pytest.mark.parametrize("arguments", [{"lr": 0.0}, {"lr": float("inf")}, {"tol": -1.0}], ids=str)
def test_settings_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
        ProximalGradient(**{"lr": 0.1, **arguments})
