import pytest
import torch
from torch import nn

from bilevel import hypergradient, stateless
from bilevel.problems import FewShot, conv_strided
from bilevel.solvers import LBFGS, DenseExact, GradientDescent, ImplicitCG


@pytest.mark.parametrize("tasks", [None, 2])
def test_hypergradient_is_strength_times_adjoint(tasks, inner_hessian, relative_error):
    """dF/dθ = λ (H + λI)⁻¹ ∇f, iMAML's equation 6."""
    example = FewShot.example(tasks=tasks)
    problem = example.problem
    found = hypergradient(
        problem,
        example.outer,
        example.task,
        inner_solver=example.inner_solver,
        method=ImplicitCG(max_steps=300, rtol=1e-12),
    )
    rows = []
    for i, task in enumerate([example.task] if tasks is None else example.task.unstack()):
        inner = {k: v if tasks is None else v[i] for k, v in found.inner.items()}
        inner = {k: v.detach().requires_grad_() for k, v in inner.items()}
        f = problem.outer_objective(inner, example.outer, task.outer_batch)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(f, list(inner.values()))])
        hessian = inner_hessian(problem, example.outer, task, inner)
        rows.append(problem.strength * torch.linalg.solve(hessian, gradient))
    expected = torch.stack(rows).mean(0)
    assert relative_error(found.gradient, expected) <= 1e-8


def test_learned_strength(relative_error, dense_hypergradient):
    example = FewShot.example(tasks=2)
    problem = FewShot(example.problem.net, strength=3.0, learn_strength=True)
    outer = problem.initial_outer(example.outer)
    assert outer["log_strength"].shape == ()
    assert outer["log_strength"].dtype == torch.float64
    found = hypergradient(
        problem,
        outer,
        example.task,
        inner_solver=example.inner_solver,
        method=ImplicitCG(max_steps=300, rtol=1e-12),
    )
    fixed = hypergradient(
        example.problem,
        example.outer,
        example.task,
        inner_solver=example.inner_solver,
        method=DenseExact(),
    )
    assert found.ok
    assert relative_error(found.gradient["theta"], fixed.gradient) <= 1e-8
    reference = dense_hypergradient(problem, outer, example.task, found.inner)
    assert relative_error(found.gradient, reference) <= 1e-8
    strength = found.gradient["log_strength"]
    assert strength.item() == pytest.approx(reference["log_strength"].item(), rel=1e-8)
    assert strength != 0


def test_accuracy_counts_correct_labels():
    problem = FewShot(lambda params, images: images * params["scale"])
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 4.0]])
    batch = (logits, torch.tensor([0, 1, 1, 1]))
    inner = {"scale": torch.tensor(1.0)}
    assert problem.metrics(inner, inner, batch)["accuracy"] == 0.75
    expected = torch.nn.functional.cross_entropy(*batch)
    assert torch.equal(problem.outer_objective(inner, inner, batch), expected)
    assert torch.equal(problem.inner_objective(inner, inner, batch), expected)


def test_adaptation_raises_accuracy_of_the_published_network():
    params, net = stateless(conv_strided(3, channels=8))
    task = FewShot.example().task
    size = {"size": (28, 28), "mode": "nearest"}
    resize = nn.functional.interpolate
    (images, labels), (query, answers) = task.inner_batch, task.outer_batch
    support = (resize(images.float(), **size), labels)
    questions = (resize(query.float(), **size), answers)
    problem = FewShot(net, strength=0.5)
    found = hypergradient(
        problem,
        params,
        type(task)(support, questions),
        inner_solver=GradientDescent(lr=0.1, max_steps=16),
        method=ImplicitCG(max_steps=5, rtol=0.0),
    )
    assert found.ok
    before = problem.metrics(params, params, questions)["accuracy"]
    assert found.metrics["accuracy"] > before


def test_printing_and_settings():
    net = FewShot.example().problem.net
    assert repr(FewShot(net, 0.5, learn_strength=True)) == (
        "FewShot(strength=0.5, learn_strength=True)"
    )
    with pytest.raises(ValueError, match="strength"):
        FewShot(net, strength=-1.0)
    with pytest.raises(ValueError, match="strength"):
        FewShot(net, strength=0.0, learn_strength=True)


def test_example_solver_is_tight():
    assert isinstance(FewShot.example().inner_solver, LBFGS)
