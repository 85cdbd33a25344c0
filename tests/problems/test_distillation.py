import pytest
import torch
import torch.nn.functional as F

from bilevel import hypergradient
from bilevel.problems import Distillation
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
    # More features than synthetic rows: only the decay makes the inner problem convex.
    example = Distillation.generated(features=12, classes=3, per_class=2, tasks=tasks, seed=3)
    found = compute(example, ImplicitCG(max_steps=300, rtol=1e-12))
    assert found.ok
    assert relative_error(found.gradient, example.gradient) <= 1e-9
    assert relative_error(compute(example, Unrolled()).gradient, example.gradient) <= 1e-9
    solved = compute(example, ImplicitCG(300, 1e-12), LBFGS(max_steps=500, tol=1e-12))
    assert relative_error(solved.gradient, example.gradient) <= 1e-9
    descent = GradientDescent(lr=1 / example.lipschitz, max_steps=800)
    unrolled = compute(example, Unrolled(), descent)
    assert relative_error(unrolled.gradient, example.gradient) <= 1e-9


def test_formula_is_the_derivative_of_ridge_regression(relative_error):
    example = Distillation.generated(features=5, classes=3, rows=20)
    features, labels = example.task.outer_batch

    def outer_value(s, t):
        gram = s.mT @ s / len(s) + example.problem.strength * torch.eye(5, dtype=s.dtype)
        w = torch.linalg.inv(gram) @ s.mT @ t / len(s)
        return 0.5 * ((features @ w - F.one_hot(labels)) ** 2).sum() / len(labels)

    leaves = [example.outer[key].clone().requires_grad_() for key in ("rows", "targets")]
    s, t = torch.autograd.grad(outer_value(*leaves), leaves)
    assert relative_error(example.gradient, {"rows": s, "targets": t}) <= 1e-12


def test_a_row_for_each_class_teaches_the_classes():
    example = Distillation.generated(features=10, classes=3, rows=150, separation=4.0)
    outer = example.outer
    first = compute(example, ImplicitCG())
    for _ in range(100):
        gradient = example.problem.exact_hypergradient(outer, example.task)
        outer = {key: leaf - 1.0 * gradient[key] for key, leaf in outer.items()}
    w = example.problem.solution(outer)
    accuracy = example.problem.metrics(w, outer, example.task.outer_batch)["accuracy"]
    assert accuracy > 0.95 > first.metrics["accuracy"]


@pytest.mark.parametrize("setting", [{"strength": 0.0}, {"per_class": 0}, {"rows": 0}])
def test_settings_are_checked(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Distillation.generated(**setting)
