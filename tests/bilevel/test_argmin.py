import pytest
import torch

from bilevel import (
    NotDifferentiableError,
    Proximal,
    SolveError,
    StructureError,
    Task,
    argmin,
    hypergradient,
    problem_from,
)
from bilevel.solvers import DenseExact, FirstOrder, GradientDescent, ImplicitCG, Unrolled
from tests.helpers import quadratic, quadratic_answer, quadratic_task, randn

F64 = torch.float64
GD = GradientDescent(0.9, 200)
METHODS = [ImplicitCG(rtol=1e-12), DenseExact(), Unrolled()]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_loss_of_the_argmin_has_the_hypergradient(method):
    task, x = quadratic_task(4, condition=5.0), randn(4).requires_grad_()
    z = argmin(quadratic(), x, task, inner_solver=GD, method=method)
    value = quadratic().outer_objective(z, x, task.outer_batch)
    (got,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(got, quadratic_answer(task, x.detach()), rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_outer_variable_may_stand_in_a_graph(method):
    task, w = quadratic_task(4, condition=5.0), randn(4).requires_grad_()
    z = argmin(quadratic(), w.sin(), task, inner_solver=GD, method=method)
    (got,) = torch.autograd.grad(z.sum(), w)
    A, B = task.inner_batch["A"], task.inner_batch["B"]
    want = w.cos() * (B.mT @ torch.linalg.solve(A, torch.ones(4, dtype=F64)))
    torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_without_a_graph_there_is_none(method):
    task = quadratic_task(4, condition=5.0)
    z = argmin(quadratic(), randn(4), task, inner_solver=GD, method=method)
    assert not z.requires_grad
    with torch.no_grad():
        z = argmin(quadratic(), randn(4).requires_grad_(), task, inner_solver=GD, method=method)
    assert not z.requires_grad


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_two_levels_nest(method):
    # y*(x) = argmin ½‖y − x‖² + ½‖y‖² = x/2; z*(y) = argmin ½‖z − y‖² + ¼ Σ z⁴.
    middle = problem_from(
        lambda y, x, b: 0.5 * (y**2).sum(), lambda y, x, b: y.sum(), Proximal(1.0)
    )
    last = problem_from(lambda z, y, b: 0.25 * (z**4).sum(), lambda z, y, b: z.sum(), Proximal(1.0))
    x = randn(3).requires_grad_()
    solver = GradientDescent(0.3, 150)
    y = argmin(middle, x, inner_solver=solver, method=method)
    z = argmin(last, y, inner_solver=solver, method=method)
    (got,) = torch.autograd.grad(z.sum(), x)
    want = 0.5 / (1 + 3 * z.detach() ** 2)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_an_argmin_can_stand_inside_an_outer_objective(method):
    # A bilevel problem whose outer objective solves a problem of its own.
    last = problem_from(lambda z, y, b: 0.25 * (z**4).sum(), lambda z, y, b: z.sum(), Proximal(1.0))
    problem = problem_from(
        lambda y, x, b: 0.5 * (y**2).sum(),
        lambda y, x, b: argmin(
            last, y, inner_solver=GradientDescent(0.3, 150), method=method
        ).sum(),
        Proximal(1.0),
    )
    x = randn(3)
    result = hypergradient(
        problem, x, inner_solver=GradientDescent(0.5, 5), method=ImplicitCG(rtol=1e-12)
    )
    z = argmin(last, x / 2, inner_solver=GradientDescent(0.3, 150), method=method).detach()
    torch.testing.assert_close(result.gradient, 0.5 / (1 + 3 * z**2), rtol=1e-9, atol=0)


def test_the_result_looks_like_the_task():
    tasks = [quadratic_task(n, 2, condition=4.0) for n in (3, 4, 3)]
    x = randn(2).requires_grad_()
    settings = {"inner_solver": GD, "method": ImplicitCG(rtol=1e-12)}
    listed = argmin(quadratic(), x, tasks, **settings)
    assert [len(z) for z in listed] == [3, 4, 3]
    stacked = argmin(quadratic(), x, Task.stack([tasks[0], tasks[2]]), **settings)
    assert stacked.shape == (2, 3)
    total = sum(z.sum() for z in listed)
    (got,) = torch.autograd.grad(total, x)
    want = sum(
        t.inner_batch["B"].mT
        @ torch.linalg.solve(t.inner_batch["A"], torch.ones(len(t.inner_batch["A"]), dtype=F64))
        for t in tasks
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


def test_a_failed_inner_solve_raises_or_is_ignored():
    task, x = quadratic_task(4, condition=50.0), randn(4).requires_grad_()
    settings = {"inner_solver": GradientDescent(0.9, 3, tol=1e-9), "method": ImplicitCG()}
    with pytest.raises(SolveError, match=r"inner solve failed.*MAX_STEPS"):
        argmin(quadratic(), x, task, **settings)
    z = argmin(quadratic(), x, task, on_failure="ignore", **settings)
    assert z.requires_grad


def test_a_failed_adjoint_solve_raises_or_is_ignored():
    task, x = quadratic_task(4, condition=50.0), randn(4).requires_grad_()
    settings = {"inner_solver": GD, "method": ImplicitCG(max_steps=1, rtol=1e-9)}
    z = argmin(quadratic(), x, task, **settings)
    with pytest.raises(SolveError, match=r"adjoint solve failed.*MAX_STEPS"):
        z.sum().backward()
    z = argmin(quadratic(), x, task, on_failure="ignore", **settings)
    z.sum().backward()
    assert x.grad.isfinite().all()


def test_a_method_without_a_derivative_of_the_solution_is_refused():
    with pytest.raises(NotDifferentiableError, match="FirstOrder"):
        argmin(quadratic(), randn(4), quadratic_task(4), inner_solver=GD, method=FirstOrder())


def test_a_structure_that_the_solver_cannot_take_is_refused():
    problem = problem_from(
        None,
        lambda z, x, b: z.sum(),
        initial_inner=lambda x, b: torch.zeros_like(x),
        stationarity=lambda z, x, b: z - x,
    )
    with pytest.raises(StructureError, match="SYMMETRIC"):
        argmin(problem, randn(2), inner_solver=GD, method=ImplicitCG())


def test_an_unknown_failure_policy_is_named():
    with pytest.raises(ValueError, match="`on_failure` is 'warn'"):
        argmin(
            quadratic(),
            randn(4),
            quadratic_task(4),
            inner_solver=GD,
            method=ImplicitCG(),
            on_failure="warn",
        )


@pytest.mark.parametrize("method", METHODS[:2], ids=repr)
def test_backward_twice_through_one_argmin_is_allowed(method):
    x = randn(4).requires_grad_()
    z = argmin(quadratic(), x, quadratic_task(4, condition=3.0), inner_solver=GD, method=method)
    first = torch.autograd.grad(z[0], x, retain_graph=True)[0]
    second = torch.autograd.grad(z[0], x)[0]
    assert torch.equal(first, second)


def test_outer_leaves_that_do_not_require_grad_get_none():
    problem = problem_from(
        lambda z, x, b: 0.5 * ((z - x["a"] * x["b"]) ** 2).sum(),
        lambda z, x, b: z.sum(),
        initial_inner=lambda x, b: torch.zeros_like(x["a"]),
    )
    x = {"a": randn(3).requires_grad_(), "b": randn(3, seed=1)}
    z = argmin(problem, x, inner_solver=GD, method=ImplicitCG())
    z.sum().backward()
    torch.testing.assert_close(x["a"].grad, x["b"])
    assert x["b"].grad is None
