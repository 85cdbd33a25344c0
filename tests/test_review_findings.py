"""What a reviewer found: answers that were wrong in silence, each now right or refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from bilevel import (
    DependenceError,
    ObjectiveError,
    Proximal,
    Task,
    argmin,
    hypergradient,
    problem_from,
)
from bilevel.solvers import (
    ClosedForm,
    DenseExact,
    FirstOrder,
    GradientDescent,
    ImplicitCG,
    TorchOptimizer,
    Unrolled,
)

F64 = torch.float64
H = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, 0.2], [0.1, 0.2, 1.5]], dtype=F64)
X = torch.tensor([1.0, 2.0, 3.0], dtype=F64)


def quadratic(direct=0.0):
    return problem_from(
        lambda z, x, b: 0.5 * z @ H @ z - x @ z,
        lambda z, x, b: (z**2).sum() + direct * x.sum(),
        initial_inner=lambda x, b: torch.zeros(3, dtype=F64),
    )


def exact(direct=0.0):
    return torch.linalg.solve(H, 2 * torch.linalg.solve(H, X)) + direct


@pytest.mark.parametrize("checkpoint", [None, True])
@pytest.mark.parametrize("truncate", [50, 1000])
def test_truncated_unrolling_after_an_early_stop_differentiates_its_last_steps(
    truncate, checkpoint
):
    solver = GradientDescent(lr=0.3, max_steps=3000, tol=1e-8)
    method = Unrolled(truncate=truncate, checkpoint=checkpoint)
    result = hypergradient(quadratic(), X, inner_solver=solver, method=method)
    # K steps of the fixed map from the solution: (I − (I − ηH)ᴷ) of the exact Jacobian.
    contraction = torch.linalg.matrix_power(torch.eye(3, dtype=F64) - 0.3 * H, truncate)
    expected = (torch.eye(3, dtype=F64) - contraction) @ exact()
    torch.testing.assert_close(result.gradient, expected, rtol=1e-6, atol=1e-8)


def test_a_warm_state_does_not_cut_the_unrolled_derivative():
    solver = GradientDescent(lr=0.3, max_steps=3000, tol=1e-10)
    warm = hypergradient(quadratic(0.01), X, inner_solver=solver, method=ImplicitCG()).state
    result = hypergradient(quadratic(0.01), X, inner_solver=solver, method=Unrolled(), state=warm)
    torch.testing.assert_close(result.gradient, exact(0.01), rtol=1e-7, atol=1e-9)


def test_a_constant_start_near_the_solution_is_unrolled_to_the_end():
    near = torch.linalg.solve(H, X) + 1e-6
    result = hypergradient(
        quadratic(),
        X,
        inner=near,
        inner_solver=GradientDescent(lr=0.3, max_steps=300, tol=1e-8),
        method=Unrolled(),
    )
    torch.testing.assert_close(result.gradient, exact(), rtol=1e-7, atol=1e-9)


def test_data_that_requires_grad_is_noticed_at_every_call():
    problem = problem_from(
        lambda z, x, b: 0.5 * z @ H @ z - (x * b) @ z,
        lambda z, x, b: (z**2).sum(),
        initial_inner=lambda x, b: torch.zeros(3, dtype=F64),
    )
    settings = {"inner_solver": GradientDescent(lr=0.3, max_steps=200), "method": DenseExact()}
    weights = torch.ones(3, dtype=F64)
    argmin(problem, X, Task(weights), **settings)
    with pytest.raises(
        DependenceError, match=r"`inner_batch` .* requires grad.*pass it in `outer`"
    ):
        argmin(problem, X, Task(weights.clone().requires_grad_()), **settings)


def test_the_order_of_keys_does_not_matter():
    problem = problem_from(
        lambda z, x, b: 0.5 * ((x - z["a"]) ** 2).sum() + 0.5 * ((z["b"] - 3 * x) ** 2).sum(),
        lambda z, x, b: (z["a"] ** 2).sum(),
        initial_inner=lambda x, b: {"a": torch.zeros_like(x), "b": torch.zeros_like(x)},
    )
    task, one, other = Task(), {"a": X, "b": 3 * X}, {"b": 3 * X, "a": X}
    result = hypergradient(
        problem,
        X,
        [task, task],
        inner=[one, other],
        inner_solver=None,
        method=DenseExact(),
        reduction="none",
    )
    torch.testing.assert_close(result.gradient, torch.stack([2 * X, 2 * X]))
    solver = ClosedForm(lambda x, b: {"b": 3 * x, "a": x})
    found = hypergradient(problem, X, inner_solver=solver, method=DenseExact())
    torch.testing.assert_close(found.gradient, 2 * X)


def test_the_order_of_keys_does_not_matter_in_an_equilibrium_or_a_center():
    equilibrium = problem_from(
        None,
        lambda z, x, b: (z["a"] ** 2).sum(),
        Proximal(1.0, center=lambda x: {"b": 0 * x, "a": x}),
        initial_inner=lambda x, b: {"a": torch.zeros_like(x), "b": torch.zeros_like(x)},
        stationarity=lambda z, x, b: {"b": z["b"] - x, "a": z["a"] - 2 * x},
    )
    solver = GradientDescent(lr=0.5, max_steps=1)
    result = hypergradient(equilibrium, X, inner_solver=solver, method=DenseExact())
    torch.testing.assert_close(result.inner["a"], 1.5 * X)
    torch.testing.assert_close(result.inner["b"], 0.5 * X)
    torch.testing.assert_close(result.gradient, 4.5 * X)


def test_the_gradient_keeps_the_order_of_the_outer_variable():
    problem = problem_from(
        lambda z, x, b: 0.5 * ((z - x["b"] * x["a"]) ** 2).sum(),
        lambda z, x, b: z.sum(),
        initial_inner=lambda x, b: torch.zeros_like(x["a"]),
    )
    outer = {"b": X, "a": 2 * X}
    solver = GradientDescent(lr=1.0, max_steps=1)
    result = hypergradient(problem, outer, inner_solver=solver, method=DenseExact())
    assert list(result.gradient) == ["b", "a"]
    torch.testing.assert_close(result.gradient["b"], outer["a"])


@pytest.mark.parametrize("inner_solver", [None, GradientDescent(lr=0.1, max_steps=3)])
def test_first_order_keeps_the_stated_start_where_a_point_is_given(inner_solver):
    problem = problem_from(
        lambda z, x, b: 0.5 * z @ H @ z, lambda z, x, b: (z**2).sum(), Proximal(1.0)
    )
    result = hypergradient(problem, X, inner=X, inner_solver=inner_solver, method=FirstOrder())
    torch.testing.assert_close(result.gradient, 2 * result.inner)


def test_every_solver_is_copied_and_pickled():
    solver = TorchOptimizer(torch.optim.Adam, max_steps=3, lr=0.1)
    assert copy.deepcopy(solver) == solver
    assert pickle.loads(pickle.dumps(solver)) == solver


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (lambda z, x, b: z.sum(), "`metrics` returned a Tensor"),
        (lambda z, x, b: {f"m{len(b)}": z.sum()}, "the same names for every task"),
    ],
)
def test_wrong_metrics_are_named(metrics, message):
    problem = problem_from(
        lambda z, x, b: ((z - x) ** 2).sum(),
        lambda z, x, b: (z * b.sum()).sum(),
        initial_inner=lambda x, b: torch.zeros_like(x),
        metrics=metrics,
    )
    tasks = [Task(torch.ones(k, dtype=F64), torch.ones(k, dtype=F64)) for k in (1, 2)]
    solver = GradientDescent(lr=0.5, max_steps=1)
    with pytest.raises(ObjectiveError, match=message):
        hypergradient(problem, X, tasks, inner_solver=solver, method=DenseExact())


def test_an_empty_inner_variable_is_named():
    problem = problem_from(
        lambda z, x, b: z.sum() + x.sum(),
        lambda z, x, b: x.sum(),
        initial_inner=lambda x, b: torch.zeros(0, dtype=F64),
    )
    solver = GradientDescent(lr=0.5, max_steps=1)
    with pytest.raises(ObjectiveError, match="holds no number"):
        hypergradient(problem, X, inner_solver=solver, method=DenseExact())
