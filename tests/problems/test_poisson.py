import pytest
import torch

from bilevel import hypergradient
from bilevel.problems import Poisson
from bilevel.solvers import DenseExact, GradientDescent, ImplicitCG, Unrolled


def newton(outer, task, steps=30):
    """w* and the hypergradient by Newton's method and dense algebra written out."""
    (a, y), (b, t) = task.inner_batch, task.outer_batch
    weights = outer.exp()
    w = torch.zeros_like(outer)
    for _ in range(steps):
        rate = (a @ w).exp()
        gradient = a.mT @ (rate - y) / len(y) + weights * w
        hessian = (a.mT * rate) @ a / len(y) + weights.diag()
        w = w - torch.linalg.solve(hessian, gradient)
    rhs = b.mT @ ((b @ w).exp() - t) / len(t)
    return w, -weights * w * torch.linalg.solve(hessian, rhs)


def compute(example, method, inner_solver=None):
    return hypergradient(
        example.problem,
        example.outer,
        example.task,
        inner_solver=inner_solver or example.inner_solver,
        method=method,
    )


@pytest.mark.parametrize("method", [DenseExact(), ImplicitCG(max_steps=300, rtol=1e-12)], ids=repr)
def test_meets_newton(method, relative_error):
    example = Poisson.generated(features=20, rows=60, spread=3.0)
    w, gradient = newton(example.outer, example.task)
    solution = example.problem.solution(example.outer, example.task.inner_batch)
    torch.testing.assert_close(solution, w)
    found = compute(example, method)
    assert relative_error(found.inner, w) <= 1e-8
    assert relative_error(found.gradient, gradient) <= 1e-8


def test_stacked_tasks_meet_newton(relative_error):
    example = Poisson.generated(features=8, rows=40, spread=3.0, tasks=3)
    expected = [newton(example.outer, task)[1] for task in example.task.unstack()]
    found = compute(example, ImplicitCG(max_steps=300, rtol=1e-12))
    assert relative_error(found.gradient, torch.stack(expected).mean(0)) <= 1e-8
    assert (found.metrics["deviance"] > 0).all()


def test_unrolled_descent_meets_newton(relative_error):
    example = Poisson.example()
    descent = GradientDescent(lr=1 / example.lipschitz, max_steps=300)
    found = compute(example, Unrolled(), descent)
    assert relative_error(found.gradient, newton(example.outer, example.task)[1]) <= 1e-9


def test_curvature_varies_with_the_inner_point():
    example = Poisson.example()
    batch = example.task.inner_batch
    hessians = [
        example.problem.hessian(w, example.outer, batch)
        for w in (
            torch.zeros_like(example.outer),
            example.problem.solution(example.outer, batch),
        )
    ]
    assert (hessians[1] - hessians[0]).norm() > 0.2 * hessians[0].norm()


def test_counts_are_counts_and_settings_are_checked():
    counts = Poisson.generated().task.inner_batch[1]
    assert torch.equal(counts, counts.round())
    assert counts.min() == 0 < counts.max()
    with pytest.raises(ValueError, match="informative"):
        Poisson.generated(features=3, informative=4)
