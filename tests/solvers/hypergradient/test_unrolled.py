import pytest
import torch

from bilevel import Proximal, Status, StructureError, Task, hypergradient, problem_from
from bilevel.solvers import (
    ClosedForm,
    FirstOrder,
    GradientDescent,
    ImplicitCG,
    TorchOptimizer,
    Unrolled,
)
from tests.helpers import quadratic, quadratic_answer, quadratic_task, randn

F64 = torch.float64


def maml():
    """f and g share their data's curvature; the start is the outer variable."""
    return problem_from(
        lambda z, x, d: torch.log1p(((d @ z) ** 2).sum()),
        lambda z, x, d: (torch.tanh(z) ** 2).sum() + (x * z).sum(),
        initial_inner=lambda x, d: x,
    )


def by_hand(x, data, steps, lr):
    z = x
    for _ in range(steps):
        (g,) = torch.autograd.grad(maml().inner_objective(z, x, data), z, create_graph=True)
        z = z - lr * g
    return maml().outer_objective(z, x, None)


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("checkpoint", [None, False, True, 1, 3, 50])
def test_maml_is_the_derivative_through_the_steps(steps, checkpoint):
    x = randn(3, seed=2).requires_grad_()
    data = randn(4, 3, seed=3)
    (want,) = torch.autograd.grad(by_hand(x, data, steps, 0.1), x)
    result = hypergradient(
        maml(),
        x,
        Task(data),
        inner_solver=GradientDescent(0.1, max_steps=steps),
        method=Unrolled(checkpoint=checkpoint),
    )
    torch.testing.assert_close(result.gradient, want, rtol=1e-12, atol=1e-14)
    assert result.diagnostics.linear is None


def test_unrolling_to_convergence_meets_the_implicit_answer():
    task, x = quadratic_task(5, condition=5.0), randn(5)
    result = hypergradient(
        quadratic(), x, task, inner_solver=GradientDescent(0.9, 120), method=Unrolled()
    )
    want = quadratic_answer(task, x)
    assert (result.gradient - want).norm() <= 1e-9 * want.norm()


@pytest.mark.parametrize("k", [1, 3, 10])
def test_truncation_on_a_quadratic_is_the_truncated_neumann_series(k):
    task, x, lr = quadratic_task(4, condition=5.0), randn(4), 0.8
    A, B = task.inner_batch["A"], task.inner_batch["B"]
    z = torch.linalg.solve(A, B @ x)
    power, v = z - task.outer_batch["target"], torch.zeros(4, dtype=F64)
    for _ in range(k):
        v, power = v + lr * power, power - lr * (A @ power)
    result = hypergradient(
        quadratic(),
        x,
        task,
        inner_solver=GradientDescent(lr, max_steps=150),
        method=Unrolled(truncate=k),
    )
    torch.testing.assert_close(result.gradient, x / 7 + B.mT @ v, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("checkpoint", [None, 4])
def test_a_tolerance_judges_and_does_not_stop(checkpoint):
    """A start at the solution meets any tolerance; its derivative is that of all steps."""
    task, x = quadratic_task(3, condition=1.2), randn(3)
    z = torch.linalg.solve(task.inner_batch["A"], task.inner_batch["B"] @ x)
    results = [
        hypergradient(
            quadratic(),
            x,
            task,
            inner_solver=GradientDescent(0.9, max_steps=60, tol=tol),
            method=Unrolled(checkpoint=checkpoint),
            inner=z,
        )
        for tol in (1e-2, None)
    ]
    assert results[0].status == (Status.CONVERGED,)
    assert results[0].diagnostics.inner.steps.tolist() == [60]
    assert results[0].gradient.equal(results[1].gradient)
    torch.testing.assert_close(results[0].gradient, quadratic_answer(task, x), rtol=1e-9, atol=0)


def saved_elements(method, steps):
    count = 0

    def pack(x):
        nonlocal count
        count += x.numel()
        return x

    task, x = quadratic_task(30, condition=5.0), randn(30)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hypergradient(quadratic(), x, task, inner_solver=GradientDescent(0.5, steps), method=method)
    return count


def test_an_implicit_method_saves_nothing_per_inner_step():
    # The inner solve takes gradients, each with a graph of its own that dies at once: what a
    # hypergradient holds at its end is the linearisation, the same after 5 steps and after 50.
    live = []
    for steps in (5, 50):
        task, x = quadratic_task(30, condition=5.0), randn(30)
        result = hypergradient(
            quadratic(), x, task, inner_solver=GradientDescent(0.5, steps), method=ImplicitCG()
        )
        live.append(result.diagnostics.counts["products"])
    assert saved_elements(ImplicitCG(), 50) < saved_elements(Unrolled(), 50)


def test_a_given_start_is_a_constant():
    x, data = randn(3).requires_grad_(), randn(4, 3, seed=3)
    start = x.detach().clone()
    result = hypergradient(
        maml(),
        x,
        Task(data),
        inner=start,
        inner_solver=GradientDescent(0.1, 0),
        method=Unrolled(),
    )
    # Only f's direct dependence is left: ∂f/∂x = z.
    torch.testing.assert_close(result.gradient, start)


def test_without_a_solver_there_is_nothing_to_unroll():
    with pytest.raises(StructureError, match="`inner_solver` is None"):
        hypergradient(
            maml(),
            randn(3),
            Task(randn(4, 3)),
            inner_solver=None,
            inner=randn(3),
            method=Unrolled(),
        )


@pytest.mark.parametrize(
    "arguments", [{"truncate": 0}, {"truncate": -1}, {"checkpoint": -1}], ids=str
)
def test_settings_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` is"):
        Unrolled(**arguments)


# First order


def test_first_order_counts_the_inner_steps_as_the_identity():
    x, data = randn(3, seed=2), randn(4, 3, seed=3)
    result = hypergradient(
        maml(), x, Task(data), inner_solver=GradientDescent(0.1, 4), method=FirstOrder()
    )
    z = result.inner.clone().requires_grad_()
    leaf = x.clone().requires_grad_()
    fz, fx = torch.autograd.grad(maml().outer_objective(z, leaf, None), [z, leaf])
    torch.testing.assert_close(result.gradient, fz + fx, rtol=1e-12, atol=0)
    assert (
        result.diagnostics.counts["products"] == 0
        if ("products" in result.diagnostics.counts)
        else True
    )


def test_first_order_goes_through_the_map_to_the_start():
    problem = problem_from(
        lambda z, x, d: (z**2).sum(),
        lambda z, x, d: (z**2).sum(),
        Proximal(1.0, lambda x: x["w"] * 3.0),
    )
    x = {"w": randn(2)}
    result = hypergradient(problem, x, inner_solver=GradientDescent(0.1, 3), method=FirstOrder())
    torch.testing.assert_close(result.gradient["w"], 3.0 * 2 * result.inner, rtol=1e-12, atol=0)


def test_first_order_takes_any_solver():
    for solver in (TorchOptimizer("LBFGS", 2), ClosedForm(lambda x, d: torch.zeros_like(x))):
        result = hypergradient(
            maml(), randn(3), Task(randn(4, 3)), inner_solver=solver, method=FirstOrder()
        )
        assert result.status[0] in (Status.BUDGET, Status.CONVERGED)
