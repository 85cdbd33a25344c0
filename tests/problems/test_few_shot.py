import pytest
import torch
from torch import nn

from bilevel import hypergradient, stateless
from bilevel.problems import FewShot, conv_strided
from bilevel.pytree import tree_flatten, tree_leaves, tree_unflatten
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
    problem = FewShot(example.problem.net, strength=3.0, learn_strength="scalar")
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
    assert repr(FewShot(net, 0.5, learn_strength="scalar")) == (
        "FewShot(strength=0.5, learn_strength='scalar')"
    )
    with pytest.raises(ValueError, match="strength"):
        FewShot(net, strength=-1.0)
    with pytest.raises(ValueError, match="strength"):
        FewShot(net, strength=0.0, learn_strength="scalar")


def test_example_solver_is_tight():
    assert isinstance(FewShot.example().inner_solver, LBFGS)


# Strengths that are learned, parameters that are not adapted


SLOW_SOLVE = LBFGS(max_steps=2000, tol=1e-12)


@pytest.mark.parametrize("kind", ["scalar", "layer", "parameter"])
def test_derivative_in_the_strength_meets_finite_differences(kind):
    """dF/dλ of the converged problem, by central differences: relative error at most 1e-5."""
    example = FewShot.example()
    problem = FewShot(example.problem.net, strength=3.0, learn_strength=kind)
    outer = problem.initial_outer(example.outer)

    def value(outer):
        from bilevel import solve_inner

        inner = solve_inner(problem, outer, example.task, inner_solver=SLOW_SOLVE).inner
        return problem.outer_objective(inner, outer, example.task.outer_batch).item()

    found = hypergradient(
        problem, outer, example.task, inner_solver=SLOW_SOLVE, method=ImplicitCG(300, 1e-13)
    )
    leaves, spec = tree_flatten(outer["log_strength"])
    gradients = tree_leaves(found.gradient["log_strength"])
    total = sum(g.square().sum() for g in gradients).sqrt()
    generator = torch.Generator().manual_seed(0)
    for i in range(len(leaves)):
        direction = torch.randn(leaves[i].shape, generator=generator, dtype=torch.float64)

        def moved(t, i=i, direction=direction):
            new = [leaf + t * direction if j == i else leaf for j, leaf in enumerate(leaves)]
            return value({**outer, "log_strength": tree_unflatten(new, spec)})

        h = 1e-3
        slope = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
        expected = (gradients[i] * direction).sum()
        assert abs(slope - expected) <= 1e-5 * max(abs(slope), (total * 1e-2).item())


def test_derivative_in_a_scalar_strength_meets_the_formula_of_the_paper():
    """dL/dλ = ∇L̂(φ)ᵀ g / λ², with g the hypergradient."""
    example = FewShot.example()
    problem = FewShot(example.problem.net, strength=3.0, learn_strength="scalar")
    outer = problem.initial_outer(example.outer)
    found = hypergradient(
        problem, outer, example.task, inner_solver=SLOW_SOLVE, method=ImplicitCG(300, 1e-13)
    )
    inner = {k: v.requires_grad_() for k, v in found.inner.items()}
    support = problem.inner_objective(inner, outer, example.task.inner_batch)
    slopes = torch.autograd.grad(support, list(inner.values()))
    theta = found.gradient["theta"]
    product = sum((a * theta[k]).sum() for k, a in zip(inner, slopes, strict=True))
    # The outer variable is log λ, so that dL/d(log λ) = λ dL/dλ.
    assert found.gradient["log_strength"].item() == pytest.approx(product.item() / 3.0, rel=1e-5)


def test_learned_strengths_have_the_shapes_that_they_say():
    example = FewShot.example()
    net, params = example.problem.net, example.outer
    layers = FewShot(net, 2.0, learn_strength="layer").initial_outer(params)["log_strength"]
    assert list(layers) == ["0", "1", "3", "4", "7"]
    assert all(x.shape == () and x.exp() == pytest.approx(2.0) for x in layers.values())
    each = FewShot(net, 2.0, learn_strength="parameter").initial_outer(params)["log_strength"]
    assert {k: v.shape for k, v in each.items()} == {k: v.shape for k, v in params.items()}


@pytest.mark.parametrize("kind", [None, "layer"])
def test_only_the_head_is_adapted(kind, dense_hypergradient, relative_error):
    """ANIL: the body is the outer variable's alone, and has its part in both objectives."""
    example = FewShot.example(tasks=2)
    net, params = example.problem.net, example.outer
    head = [name for name in params if name.startswith("7.")]
    problem = FewShot(net, strength=3.0, learn_strength=kind, adapted=head)
    outer = problem.initial_outer(params)
    found = hypergradient(
        problem, outer, example.task, inner_solver=SLOW_SOLVE, method=ImplicitCG(300, 1e-12)
    )
    assert found.ok
    assert list(found.inner) == head
    reference = dense_hypergradient(problem, outer, example.task, found.inner)
    assert relative_error(found.gradient, reference) <= 1e-8
    theta = found.gradient if kind is None else found.gradient["theta"]
    assert all(theta[name].norm() > 0 for name in ("0.weight", "1.bias", *head))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learn_strength": "layers"}, "`learn_strength` is 'layers'; pass one of 'scalar'"),
        ({"learn_strength": True}, "`learn_strength` is True"),
        ({"adapted": []}, "`adapted` is empty"),
        ({"adapted": ["8.weight"]}, "`adapted` names '8.weight'; known: 0.weight"),
    ],
)
def test_wrong_choices_are_named(settings, message):
    example = FewShot.example()
    with pytest.raises(ValueError, match=message):
        FewShot(example.problem.net, **settings).initial_outer(example.outer)


def test_the_reference_reaches_the_network():
    params, net = stateless(conv_strided(3, channels=4, size=8, blocks=2))
    problem = FewShot(net)
    images, labels, support = (
        torch.rand(6, 1, 8, 8),
        torch.arange(3).repeat(2),
        torch.rand(3, 1, 8, 8),
    )
    predicted = problem.predict(params, params, (images, labels, support))
    assert predicted.equal(net(params, images, support))
    assert not torch.allclose(predicted, problem.predict(params, params, (images, labels)))
