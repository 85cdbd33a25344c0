import pytest
import torch

from bilevel import hypergradient
from bilevel.problems import Ridge
from bilevel.solvers import LBFGS, GradientDescent, ImplicitCG, Unrolled


def compute(example, method, inner_solver=None):
    return hypergradient(
        example.problem,
        example.outer,
        example.task,
        inner_solver=inner_solver or example.inner_solver,
        method=method,
    )


@pytest.mark.parametrize("tasks", [None, 3])
def test_methods_meet_the_formula(tasks, relative_error):
    # More features than rows: only the decay makes the inner problem convex.
    example = Ridge.generated(features=40, rows=30, spread=4.0, tasks=tasks, seed=3)
    found = compute(example, ImplicitCG(max_steps=300, rtol=1e-12))
    assert found.ok
    assert relative_error(found.gradient, example.gradient) <= 1e-9
    assert relative_error(compute(example, Unrolled()).gradient, example.gradient) <= 1e-9
    solved = compute(example, ImplicitCG(300, 1e-12), LBFGS(max_steps=500, tol=1e-12))
    assert relative_error(solved.gradient, example.gradient) <= 1e-9


def test_unrolled_descent_converges_to_the_formula(relative_error):
    example = Ridge.example(tasks=2)
    descent = GradientDescent(lr=1 / example.lipschitz, max_steps=500)
    found = compute(example, Unrolled(), descent)
    assert relative_error(found.gradient, example.gradient) <= 1e-9


def test_solution_is_least_squares_with_extra_rows():
    example = Ridge.example()
    x, y = example.task.inner_batch
    penalty = (len(y) * example.outer.exp()).sqrt().diag()
    rows = torch.cat([x, penalty])
    targets = torch.cat([y, torch.zeros(len(penalty), dtype=y.dtype)])
    expected = torch.linalg.lstsq(rows, targets.unsqueeze(-1)).solution.squeeze(-1)
    found = example.problem.solution(example.outer, (x, y))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_descent_finds_the_informative_features():
    example = Ridge.generated(features=30, informative=4, rows=100, validation_rows=400)
    problem, outer = example.problem, example.outer
    validation = example.task.outer_batch

    def error(outer):
        w = problem.solution(outer, example.task.inner_batch)
        return problem.metrics(w, outer, validation)["mse"]

    first = error(outer)
    for _ in range(200):
        outer = outer - 10.0 * problem.exact_hypergradient(outer, example.task)
    assert error(outer) < 0.8 * first
    assert outer[:4].max() < outer[4:].quantile(0.25)


def test_too_many_informative_features_are_refused():
    with pytest.raises(ValueError, match="informative"):
        Ridge.generated(features=3, informative=4)
    with pytest.raises(ValueError, match="rows"):
        Ridge.generated(rows=0, validation_rows=0)
    with pytest.raises(ValueError, match="spread"):
        Ridge.generated(spread=0.5)
