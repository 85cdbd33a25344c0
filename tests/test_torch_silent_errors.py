"""Where PyTorch is wrong in silence, the library is right or refuses."""

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bilevel import (
    DependenceError,
    NotDifferentiableError,
    Proximal,
    SolveError,
    Status,
    Task,
    argmin,
    hypergradient,
    problem_from,
    solve_inner,
    stateless,
)
from bilevel.solvers import (
    LBFGS,
    DenseExact,
    FirstOrder,
    GradientDescent,
    ImplicitCG,
    NeumannSeries,
    TorchOptimizer,
    Unrolled,
)
from tests.helpers import (
    Solved,
    along,
    assert_directional,
    assert_slopes,
    direction_like,
    five_point,
    inner_product,
    randn,
    slopes,
)

F64 = torch.float64


def name(value):
    return type(value).__name__


# Networks with normalisation layers


class HandWrittenNorm(nn.Module):
    """Layer norm over all features, from var_mean and rsqrt."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x):
        var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(var + 1e-5) * self.weight + self.bias


def conv_net(norm):
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), norm, nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, 2)
    )


def mlp(norm):
    return nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 2))


CONV_NORMS = {
    "batch": lambda: nn.BatchNorm2d(2, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm2d(2, affine=True),
    "layer": lambda: nn.LayerNorm([2, 3, 3]),
    "group": lambda: nn.GroupNorm(2, 2),
}
MLP_NORMS = {
    "batch": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "layer": lambda: nn.LayerNorm(4),
    "instance": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, eps=0.1, affine=True), nn.Flatten()
    ),
    "group": lambda: nn.GroupNorm(2, 4, eps=0.1),
    "rms": lambda: nn.RMSNorm(4),
    "hand-written": lambda: HandWrittenNorm(4),
}


def shaken(module, seed):
    """The module in float64 with random parameters, norms included."""
    module = module.double()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p += 0.3 * randn(*p.shape, seed=seed + i)
    return module


def network_problem(module, *, strength=3.0, learned_strength=True):
    """iMAML on a network, the proximal strength learned too."""
    params, net = stateless(module)

    def loss(w, batch):
        return F.mse_loss(net(w, batch["x"]), batch["y"])

    problem = problem_from(
        lambda w, outer, batch: loss(w, batch),
        lambda w, outer, batch: loss(w, batch),
        Proximal(lambda outer: outer["log_strength"].exp(), lambda outer: outer["params"])
        if learned_strength
        else Proximal(strength, lambda outer: outer["params"]),
    )
    outer = {"params": params}
    if learned_strength:
        outer["log_strength"] = torch.tensor(strength, dtype=F64).log()
    return problem, outer


def image_task(seed, shape=(1, 5, 5), **kwargs):
    data = [
        {"x": randn(4, *shape, seed=10 * seed + i), "y": randn(4, 2, seed=10 * seed + i + 5)}
        for i in (0, 1)
    ]
    return Task(*data, **kwargs)


@cache
def conv_case(norm, tasks):
    """A conv net with that norm, its tasks, and finite differences of the solved problem."""
    problem, outer = network_problem(shaken(conv_net(CONV_NORMS[norm]()), seed=1))
    data = [image_task(seed, weight=1.0 + seed) for seed in range(tasks)]
    return problem, outer, data, slopes(Solved(problem, outer, data), outer)


@pytest.mark.parametrize("method", [ImplicitCG(rtol=1e-12), DenseExact(), Unrolled()], ids=name)
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("norm", CONV_NORMS)
def test_hypergradients_of_conv_nets_with_affine_norms_match_finite_differences(
    norm, tasks, method
):
    problem, outer, data, differences = conv_case(norm, tasks)
    steps = 60 if isinstance(method, Unrolled) else 200
    solver = GradientDescent(lr=0.25, max_steps=steps, tol=1e-9)
    result = hypergradient(
        problem, outer, data if tasks > 1 else data[0], inner_solver=solver, method=method
    )
    assert result.ok, result.summary()
    assert_slopes(result.gradient, differences, rtol=1e-6)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("norm", MLP_NORMS)
def test_hypergradients_of_perceptrons_with_affine_norms_match_finite_differences(norm, tasks):
    problem, outer = network_problem(shaken(mlp(MLP_NORMS[norm]()), seed=2), strength=60.0)
    data = [image_task(seed, shape=(3,)) for seed in range(tasks)]
    solver = LBFGS(tol=1e-10)
    result = hypergradient(problem, outer, data, inner_solver=solver, method=ImplicitCG(rtol=1e-12))
    assert result.ok, result.summary()
    assert_directional(result.gradient, Solved(problem, outer, data), outer, rtol=1e-6)


@pytest.mark.parametrize("norm", CONV_NORMS)
def test_stacked_and_single_networks_with_norms_have_equal_gradients(norm):
    problem, outer = network_problem(shaken(conv_net(CONV_NORMS[norm]()), seed=1))
    data = [image_task(seed) for seed in range(3)]
    settings = {
        "inner_solver": GradientDescent(lr=0.3, max_steps=20),
        "method": ImplicitCG(max_steps=7, rtol=0.0),
    }
    stacked = hypergradient(problem, outer, data, reduction="none", **settings)
    for i, task in enumerate(data):
        alone = hypergradient(problem, outer, task, **settings)
        for key, leaf in alone.gradient["params"].items():
            torch.testing.assert_close(
                stacked.gradient["params"][key][i], leaf, rtol=1e-10, atol=1e-12
            )


# Third derivatives


def squared(problem, outer, task, method, solver=None):
    """Σ z*² as a function in the autograd graph of ``outer``."""
    z = argmin(
        problem,
        outer,
        task,
        inner_solver=solver or LBFGS(tol=1e-11),
        method=method,
    )
    return sum((leaf**2).sum() for leaf in z.values())


def second_derivative(problem, outer, task, method, seed=0, solver=None):
    """A function of a direction d: the gradient of ⟨∇ Σ z*², d⟩, and d itself."""
    leaves = {
        key: value.detach().clone().requires_grad_() for key, value in outer["params"].items()
    }
    d = direction_like(leaves, seed)
    value = squared(problem, {"params": leaves}, task, method, solver)
    first = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
    product = sum((g * d[key]).sum() for key, g in zip(leaves, first, strict=True))
    second = torch.autograd.grad(product, list(leaves.values()))
    return dict(zip(leaves, second, strict=True)), d


def exact_second_derivative(problem, outer, task, d, e):
    """⟨d, ∇² Σ z*² e⟩ by differences of the solved problem's values, mixed, of fourth order."""
    solved = Solved(problem, outer, [task], tol=1e-13)

    def value(t, s):
        params = along(along(outer["params"], d, t), e, s)
        return sum((leaf**2).sum() for leaf in solved.inner({"params": params}).values())

    return five_point(lambda t: five_point(lambda s: value(t, s), 1e-2), 1e-2)


@pytest.mark.parametrize("method", [ImplicitCG(rtol=1e-12), Unrolled()], ids=name)
@pytest.mark.parametrize("norm", ["batch", "layer", "instance"])
def test_second_derivatives_through_argmin_with_native_norms_are_refused(norm, method):
    problem, outer = network_problem(
        shaken(mlp(MLP_NORMS[norm]()), seed=2), strength=20.0, learned_strength=False
    )
    with pytest.raises(NotDifferentiableError, match="third derivative"):
        second_derivative(
            problem,
            outer,
            image_task(0, shape=(3,)),
            method,
            solver=GradientDescent(lr=0.04, max_steps=60),
        )


@pytest.mark.parametrize("norm", ["batch", "layer", "instance"])
def test_first_derivatives_through_argmin_with_native_norms_are_exact(norm):
    problem, outer = network_problem(
        shaken(mlp(MLP_NORMS[norm]()), seed=2), strength=20.0, learned_strength=False
    )
    task = image_task(0, shape=(3,))
    leaves = {key: value.clone().requires_grad_() for key, value in outer["params"].items()}
    squared(problem, {"params": leaves}, task, ImplicitCG(rtol=1e-12)).backward()
    solved = Solved(problem, outer, [task])

    def value(outer):
        return sum((leaf**2).sum() for leaf in solved.inner(outer).values())

    gradient = {"params": {key: leaf.grad for key, leaf in leaves.items()}}
    assert_directional(gradient, value, outer, rtol=1e-6)


@pytest.mark.parametrize("method", [ImplicitCG(rtol=1e-12), DenseExact(), Unrolled()], ids=name)
@pytest.mark.parametrize("norm", ["group", "rms", "hand-written"])
def test_second_derivatives_through_argmin_with_other_norms_are_exact(norm, method):
    problem, outer = network_problem(
        shaken(mlp(MLP_NORMS[norm]()), seed=2), strength=20.0, learned_strength=False
    )
    task = image_task(0, shape=(3,))
    solver = GradientDescent(lr=0.04, max_steps=70) if isinstance(method, Unrolled) else None
    second, d = second_derivative(problem, outer, task, method, solver=solver)
    e = direction_like(outer["params"], 7)
    want = exact_second_derivative(problem, outer, task, d, e)
    scale = math.sqrt(inner_product(second, second))
    assert abs(inner_product(second, e) - want) <= 1e-5 * scale


def test_pytorch_still_gets_third_derivatives_of_layer_norm_wrong():
    # The day this fails, the refusal above can go.
    x = randn(4, 3, seed=1)

    def second(w, norm):
        out = norm(w * x).pow(3).sum()
        (g,) = torch.autograd.grad(out, w, create_graph=True)
        (h,) = torch.autograd.grad((g * x).sum(), w, create_graph=True)
        return h

    def hand_written(y):
        var, mean = torch.var_mean(y, dim=-1, correction=0, keepdim=True)
        return (y - mean) * torch.rsqrt(var + 1e-5)

    errors = {}
    for key, norm in (("native", lambda y: F.layer_norm(y, (3,))), ("hand", hand_written)):
        w = randn(4, 3, seed=2).requires_grad_()
        d = direction_like(w, 3)
        (third,) = torch.autograd.grad((second(w, norm) * d).sum(), w)
        want = five_point(
            lambda t, d=d, w=w, norm=norm: (second(along(w, d, t).requires_grad_(), norm) * d).sum()
        )
        errors[key] = abs(((third * d).sum() - want) / want).item()
    assert errors["hand"] < 1e-8
    assert errors["native"] > 1e-3


def test_a_norm_in_the_outer_objective_alone_does_not_stop_second_derivatives_of_argmin():
    # argmin does not use the outer objective at all.
    problem = problem_from(
        lambda z, x, batch: (z**4).sum() / 4,
        lambda z, x, batch: F.layer_norm(z, (3,)).pow(3).sum(),
        Proximal(1.0),
    )
    x = randn(3).requires_grad_()

    def solve(x):
        return argmin(
            problem,
            x,
            inner_solver=GradientDescent(lr=0.2, max_steps=400, tol=1e-13),
            method=ImplicitCG(rtol=1e-12),
        )

    torch.autograd.gradgradcheck(solve, (x,), fast_mode=True)


# The argmin itself


def softmax_regression(strength=None):
    """Nine inner variables; three outer ones scale the features, and one the regularizer."""
    features, labels = randn(12, 3, seed=4), torch.arange(12) % 3

    def inner(w, x, batch):
        return F.cross_entropy(features * x @ w, labels) + 0.1 * (x**2).sum() * (w**2).sum()

    return problem_from(
        inner,
        lambda w, x, batch: (w**2).sum(),
        initial_inner=lambda x, batch: x.new_zeros(3, 3),
    )


SOLVE = LBFGS(tol=1e-12)


def argmin_of(x, method, solver=SOLVE):
    return argmin(softmax_regression(), x, inner_solver=solver, method=method)


@pytest.mark.parametrize(
    "method",
    [ImplicitCG(rtol=1e-13), DenseExact(), NeumannSeries(terms=500, rtol=1e-9)],
    ids=name,
)
def test_first_and_second_derivatives_of_argmin_are_right(method):
    x = torch.tensor([1.0, 0.7, -1.2], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: argmin_of(x, method), (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: argmin_of(x, method), (x,), fast_mode=True)


def test_unrolled_argmin_has_right_first_and_second_derivatives():
    x = torch.tensor([1.0, 0.7, -1.2], dtype=F64, requires_grad=True)
    solver = GradientDescent(lr=0.5, max_steps=4)
    assert torch.autograd.gradcheck(
        lambda x: argmin_of(x, Unrolled(), solver), (x,), fast_mode=True
    )
    assert torch.autograd.gradgradcheck(
        lambda x: argmin_of(x, Unrolled(), solver), (x,), fast_mode=True
    )


def test_third_derivatives_of_argmin_are_right():
    x = torch.tensor([1.0, 0.7, -1.2], dtype=F64, requires_grad=True)
    d = randn(3, seed=1)

    def second(x):
        (g,) = torch.autograd.grad((argmin_of(x, DenseExact()) ** 2).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad((g * d).sum(), x, create_graph=True)
        return h

    (third,) = torch.autograd.grad((second(x) * d).sum(), x)
    want = five_point(lambda t: (second((x + t * d).detach().requires_grad_()) * d).sum())
    torch.testing.assert_close((third * d).sum(), want.detach(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("batched", [False, True], ids=["list", "stack"])
def test_derivatives_of_argmin_over_stacked_tasks_are_right(batched):
    problem = problem_from(
        lambda z, x, batch: 0.25 * ((z * batch) ** 4).sum() + torch.exp(z * x).sum(),
        lambda z, x, batch: z.sum(),
        Proximal(lambda x: 1 + x[0] ** 2),
    )
    tasks = [Task(randn(3, seed=i), randn(1, seed=i)) for i in range(3)]

    def solve(x):
        z = argmin(
            problem,
            x,
            Task.stack(tasks) if batched else tasks,
            inner_solver=LBFGS(tol=1e-11),
            method=ImplicitCG(rtol=1e-13),
        )
        return z if batched else torch.stack(z)

    x = torch.tensor([0.3, -0.5, 0.8], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(solve, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(solve, (x,), fast_mode=True)


def test_derivatives_of_an_equilibrium_without_symmetry_are_right():
    # z = Φ(z, x), the Jacobian of z − Φ is not symmetric; a game, say.
    A = 0.3 * randn(3, 3, seed=8)
    problem = problem_from(
        None,
        lambda z, x, batch: z.sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x),
        stationarity=lambda z, x, batch: z - torch.tanh(A @ z + x),
    )

    def solve(x):
        return argmin(
            problem,
            x,
            inner_solver=GradientDescent(lr=0.7, max_steps=500, tol=1e-13),
            method=DenseExact(),
        )

    x = randn(3, seed=9).requires_grad_()
    assert torch.autograd.gradcheck(solve, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(solve, (x,), fast_mode=True)


METHODS_OF_ARGMIN = [ImplicitCG(rtol=1e-12), DenseExact(), Unrolled()]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("method", METHODS_OF_ARGMIN, ids=name)
@pytest.mark.parametrize("how", ["func.jvp", "forward_ad", "jvp of jvp", "jacfwd(jacfwd)"])
def test_forward_mode_through_argmin_raises_or_is_right(method, how):
    problem = problem_from(
        lambda z, x, batch: 0.25 * (z**4).sum(), lambda z, x, batch: z.sum(), Proximal(1.0)
    )
    x, d = torch.tensor([0.6, -1.1], dtype=F64), torch.tensor([1.0, 0.5], dtype=F64)
    solver = GradientDescent(lr=0.3, max_steps=120)

    def solve(x):
        return argmin(problem, x, inner_solver=solver, method=method)

    def jvp(f, x):
        return torch.func.jvp(f, (x,), (d,))[1]

    # z³ + z = x, so dz/dx = 1 / (1 + 3z²) and d²z/dx² = −6z / (1 + 3z²)³.
    z = solve(x).detach()
    first, second = 1 / (1 + 3 * z**2), -6 * z / (1 + 3 * z**2) ** 3
    try:
        if how == "func.jvp":
            got, want = jvp(solve, x), first * d
        elif how == "forward_ad":
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, d)
                got = torch.autograd.forward_ad.unpack_dual(solve(dual)).tangent
            want = first * d
        elif how == "jvp of jvp":
            got, want = jvp(lambda x: jvp(solve, x), x), second * d**2
        else:
            got = torch.func.jacfwd(torch.func.jacfwd(solve))(x)
            want = torch.zeros(2, 2, 2, dtype=F64)
            for i in range(2):
                want[i, i, i] = second[i]
    except (RuntimeError, NotImplementedError, NotDifferentiableError):
        return
    assert got is not None, "the tangent was lost in silence"
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("method", METHODS_OF_ARGMIN, ids=name)
@pytest.mark.parametrize("how", ["func.grad", "jacrev", "vmap"])
def test_reverse_transforms_through_argmin_raise_or_are_right(method, how):
    problem = problem_from(
        lambda z, x, batch: 0.25 * (z**4).sum(), lambda z, x, batch: z.sum(), Proximal(1.0)
    )
    solver = GradientDescent(lr=0.3, max_steps=120)

    def solve(x):
        return argmin(problem, x, inner_solver=solver, method=method)

    x = torch.tensor([0.6, -1.1], dtype=F64)
    z = solve(x).detach()
    slope = 1 / (1 + 3 * z**2)
    try:
        if how == "func.grad":
            got, want = torch.func.grad(lambda x: solve(x).sum())(x), slope
        elif how == "jacrev":
            got, want = torch.func.jacrev(solve)(x), torch.diag(slope)
        else:
            got, want = torch.func.vmap(solve)(torch.stack([x, x])), torch.stack([z, z])
    except (RuntimeError, NotImplementedError, NotDifferentiableError):
        return
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_argmin_of_a_closed_over_tensor_is_refused():
    hidden = torch.ones(2, dtype=F64, requires_grad=True)
    problem = problem_from(
        lambda z, x, batch: ((z - hidden) ** 2).sum(), lambda z, x, batch: z.sum(), Proximal(1.0)
    )
    with pytest.raises(DependenceError, match="requires grad"):
        argmin(
            problem,
            torch.ones(2, dtype=F64),
            inner_solver=GradientDescent(lr=0.1, max_steps=3),
            method=ImplicitCG(),
        )


@pytest.mark.parametrize("through", ["leaf", "function of a leaf", "module"])
@pytest.mark.parametrize("tasks", [1, 3])
def test_a_captured_tensor_that_requires_grad_is_refused(through, tasks):
    module = nn.Linear(2, 2).double()
    leaf = torch.ones(2, dtype=F64, requires_grad=True)
    captured = {"leaf": leaf, "function of a leaf": leaf.exp(), "module": module.weight[0]}[through]

    def inner(z, x, batch):
        return ((z - batch) ** 2).sum() + (captured * z).sum()

    problem = problem_from(inner, lambda z, x, batch: z.sum(), Proximal(1.0))
    with pytest.raises(DependenceError, match="`inner_objective` uses a tensor"):
        hypergradient(
            problem,
            torch.ones(2, dtype=F64),
            [Task(randn(2, seed=i)) for i in range(tasks)],
            inner_solver=GradientDescent(lr=0.1, max_steps=3),
            method=ImplicitCG(),
        )


# Unrolled optimizers


def unrolled_problem():
    """Smooth, not quadratic; the outer variable enters g, the start and f."""
    data = randn(4, 3, seed=3)

    def inner(z, x, batch):
        return torch.log1p((data @ z - x["shift"].sum()) ** 2).sum() + 0.1 * (z**2).sum()

    return problem_from(
        inner,
        lambda z, x, batch: (z**2).sum() + (z * x["start"]).sum(),
        Proximal(0.5, lambda x: x["start"]),
    )


def unrolled_outer():
    return {"shift": randn(2, seed=1), "start": randn(3, seed=2)}


def manual_map(cls, outer, steps, **options):
    """T steps of a torch optimizer on the problem above, by hand."""
    problem = unrolled_problem()
    z = outer["start"].detach().clone().requires_grad_()
    # PyTorch keeps step counts and their products in the default dtype.
    torch.set_default_dtype(F64)
    try:
        optimizer = cls([z], **options)
        for _ in range(steps):
            optimizer.zero_grad()
            value = problem.inner_objective(z, outer, None)
            value = value + 0.25 * ((z - outer["start"]) ** 2).sum()
            value.backward()
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    return problem.outer_objective(z.detach(), outer, None)


OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.05}),
    (torch.optim.Adam, {"lr": 0.05}),
    (torch.optim.Adam, {"lr": 0.05, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.0}),
    (torch.optim.NAdam, {"lr": 0.05}),
    (torch.optim.RAdam, {"lr": 0.05}),
    (torch.optim.RMSprop, {"lr": 0.02}),
    (torch.optim.RMSprop, {"lr": 0.02, "centered": True}),
    (torch.optim.RMSprop, {"lr": 0.02, "momentum": 0.7}),
    (torch.optim.Adagrad, {"lr": 0.1}),
    (torch.optim.Adadelta, {"lr": 1.0}),
    (torch.optim.ASGD, {"lr": 0.05}),
]


def optimizer_id(case):
    cls, options = case
    rest = [key for key in options if key not in ("lr", "weight_decay")]
    return "-".join([cls.__name__, *rest])


@pytest.mark.parametrize("case", OPTIMIZERS, ids=optimizer_id)
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("checkpoint", [None, 2])
def test_unrolled_torch_optimizers_match_finite_differences_of_the_same_map(
    case, steps, checkpoint
):
    cls, options = case
    outer = unrolled_outer()
    result = hypergradient(
        unrolled_problem(),
        outer,
        inner_solver=TorchOptimizer(cls, max_steps=steps, **options),
        method=Unrolled(checkpoint=checkpoint),
    )
    assert_directional(
        result.gradient, lambda x: manual_map(cls, x, steps, **options), outer, rtol=1e-6
    )


@pytest.mark.parametrize("case", OPTIMIZERS, ids=optimizer_id)
@pytest.mark.parametrize("unrolled", [False, True], ids=["plain", "unrolled"])
def test_torch_optimizers_take_the_steps_that_pytorch_takes(case, unrolled):
    # differentiable=True makes PyTorch's Adam count its steps in float32, even for float64.
    cls, options = case
    problem, outer = unrolled_problem(), unrolled_outer()
    solver = TorchOptimizer(cls, max_steps=5, **options)
    if unrolled:
        z = hypergradient(problem, outer, inner_solver=solver, method=Unrolled()).inner
    else:
        z = solve_inner(problem, outer, inner_solver=solver).inner
    got = problem.outer_objective(z, outer, None)
    want = manual_map(cls, outer, 5, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("optimizer", ["Adamax", "Rprop", "Adafactor", "Muon", "LBFGS"])
def test_torch_optimizers_that_cannot_be_unrolled_are_refused(optimizer):
    solver = TorchOptimizer(
        optimizer, max_steps=3, **({"weight_decay": 0.0} if optimizer == "Muon" else {})
    )
    with pytest.raises(NotDifferentiableError, match=optimizer):
        hypergradient(unrolled_problem(), unrolled_outer(), inner_solver=solver, method=Unrolled())


def test_the_lbfgs_of_the_library_is_refused_by_unrolled():
    with pytest.raises(NotDifferentiableError, match="LBFGS"):
        hypergradient(unrolled_problem(), unrolled_outer(), inner_solver=LBFGS(), method=Unrolled())


def test_sgd_with_momentum_is_refused_by_unrolled():
    # torch.optim.SGD detaches its first momentum buffer: 16-20 % wrong in silence.
    solver = TorchOptimizer("SGD", max_steps=5, lr=0.05, momentum=0.9)
    with pytest.raises(NotDifferentiableError, match=r"GradientDescent\(.*momentum"):
        hypergradient(unrolled_problem(), unrolled_outer(), inner_solver=solver, method=Unrolled())


@pytest.mark.parametrize("nesterov", [False, True], ids=["polyak", "nesterov"])
@pytest.mark.parametrize("checkpoint", [None, True, 3])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_unrolled_momentum_matches_finite_differences_of_sgd_itself(nesterov, checkpoint, steps):
    outer = unrolled_outer()
    result = hypergradient(
        unrolled_problem(),
        outer,
        inner_solver=GradientDescent(lr=0.05, max_steps=steps, momentum=0.9, nesterov=nesterov),
        method=Unrolled(checkpoint=checkpoint),
    )
    options = {"lr": 0.05, "momentum": 0.9, "nesterov": nesterov}
    want = manual_map(torch.optim.SGD, outer, steps, **options)
    torch.testing.assert_close(result.outer_value[0], want, rtol=1e-12, atol=1e-14)
    assert_directional(
        result.gradient,
        lambda x: manual_map(torch.optim.SGD, x, steps, **options),
        outer,
        rtol=1e-6,
    )


@pytest.mark.parametrize("truncate", [1, 3, 7, 20])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("checkpoint", [None, 2])
def test_truncated_unrolling_differentiates_the_last_steps_only(truncate, momentum, checkpoint):
    # Written out: the first steps without a graph, the last ones with one.
    problem, outer, steps, lr = unrolled_problem(), unrolled_outer(), 7, 0.05
    leaves = {key: value.clone().requires_grad_() for key, value in outer.items()}
    z, buffer = leaves["start"], torch.zeros(3, dtype=F64)
    for t in range(steps):
        if 0 < t == steps - truncate:
            z, buffer = z.detach(), buffer.detach()
        if not z.requires_grad:
            z = z.detach().requires_grad_()
        value = problem.inner_objective(z, leaves, None)
        value = value + 0.25 * ((z - leaves["start"]) ** 2).sum()
        (g,) = torch.autograd.grad(value, z, create_graph=True)
        buffer = momentum * buffer + g
        z = z - lr * buffer
    value = problem.outer_objective(z, leaves, None)
    want = torch.autograd.grad(value, list(leaves.values()))
    result = hypergradient(
        problem,
        outer,
        inner_solver=GradientDescent(lr=lr, max_steps=steps, momentum=momentum),
        method=Unrolled(truncate=truncate, checkpoint=checkpoint),
    )
    for got, expected in zip(result.gradient.values(), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


ZERO_GRADIENT = ["Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "ASGD", "SGD"]


@pytest.mark.parametrize("optimizer", ZERO_GRADIENT)
def test_exactly_zero_gradients_never_give_a_silent_nan(optimizer):
    # The derivative of √v at v = 0 is infinite, in PyTorch and in its Adam.
    problem = problem_from(
        lambda z, x, batch: (z**2).sum() + 0.0 * x.sum(),
        lambda z, x, batch: ((z - 1) ** 2).sum() + (x**2).sum(),
        initial_inner=lambda x, batch: x - x.detach(),
    )
    x = torch.ones(2, dtype=F64)
    options = {"weight_decay": 0.0} if optimizer == "AdamW" else {}
    solver = TorchOptimizer(optimizer, max_steps=3, **options)
    try:
        result = hypergradient(problem, x, inner_solver=solver, method=Unrolled())
    except SolveError as error:
        told = "NON_FINITE" in str(error)
    else:
        told = bool(result.gradient.isfinite().all())
    assert told


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_adam_with_exactly_zero_gradients_fails_that_task_alone(reduction):
    problem = problem_from(
        lambda z, x, batch: ((z - batch) ** 2).sum(),
        lambda z, x, batch: ((z - 1) ** 2).sum() + (z * x).sum(),
        initial_inner=lambda x, batch: x * 1.0,
    )
    x = torch.ones(2, dtype=F64)
    tasks = [Task(torch.full((2,), v, dtype=F64)) for v in (3.0, 1.0, -2.0)]
    solver = TorchOptimizer("Adam", max_steps=3, lr=0.1)
    settings = {"inner_solver": solver, "method": Unrolled()}
    result = hypergradient(problem, x, tasks, reduction=reduction, **settings)
    alone = [hypergradient(problem, x, tasks[i], **settings).gradient for i in (0, 2)]
    assert result.status[1] == Status.NON_FINITE
    assert result.diagnostics.failed == (1,)
    if reduction == "mean":
        torch.testing.assert_close(result.gradient, sum(alone) / 2, rtol=1e-12, atol=0)
    else:
        torch.testing.assert_close(result.gradient[[0, 2]], torch.stack(alone), rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", OPTIMIZERS, ids=optimizer_id)
def test_torch_optimizers_on_stacked_tasks_equal_each_task_alone(case):
    cls, options = case
    problem = problem_from(
        lambda z, x, batch: torch.log1p((batch @ z) ** 2).sum(),
        lambda z, x, batch: (z**3).sum(),
        Proximal(0.5),
    )
    tasks = [Task(randn(4, 3, seed=i)) for i in range(3)]
    settings = {
        "inner_solver": TorchOptimizer(cls, max_steps=6, **options),
        "method": Unrolled(),
    }
    x = randn(3, seed=9)
    stacked = hypergradient(problem, x, tasks, reduction="none", **settings)
    for i, task in enumerate(tasks):
        alone = hypergradient(problem, x, task, **settings)
        torch.testing.assert_close(stacked.gradient[i], alone.gradient, rtol=1e-10, atol=1e-12)


# Double backward through one Newton step would be 30 % wrong; hypergradients alone are not enough


def test_the_hessian_of_the_hyperobjective_through_argmin_is_symmetric_and_right():
    x = torch.tensor([1.0, 0.7, -1.2], dtype=F64)

    def value(x):
        return (argmin_of(x, DenseExact()) ** 3).sum()

    H = torch.autograd.functional.hessian(value, x)
    torch.testing.assert_close(H, H.mT, rtol=1e-9, atol=1e-12)
    solved = Solved(softmax_regression(), x, [Task()], tol=1e-13)

    def slow(t, s, i, j):
        step = torch.zeros(3, dtype=F64)
        step[i] += t
        step[j] += s
        return (solved.inner(x + step) ** 3).sum()

    for i, j in ((0, 0), (0, 1), (1, 2)):
        want = five_point(lambda t, i=i, j=j: five_point(lambda s: slow(t, s, i, j), 1e-2), 1e-2)
        torch.testing.assert_close(H[i, j], want.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", [ImplicitCG(), FirstOrder(), Unrolled()], ids=name)
def test_native_norms_do_not_stop_hypergradients(method):
    # Only argmin's double backward needs third derivatives.
    problem, outer = network_problem(
        shaken(mlp(MLP_NORMS["layer"]()), seed=2), strength=20.0, learned_strength=False
    )
    result = hypergradient(
        problem,
        outer,
        image_task(0, shape=(3,)),
        inner_solver=GradientDescent(lr=0.04, max_steps=10),
        method=method,
    )
    assert result.ok
