"""What PyTorch cannot do around `argmin` is refused with the cure, never answered wrongly."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd import functional as legacy
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F

from bilevel import (
    DependenceError,
    NotDifferentiableError,
    Proximal,
    Stream,
    Task,
    TaskBatch,
    argmin,
    problem_from,
)
from bilevel.solvers import LBFGS, GradientDescent, ImplicitCG, Unrolled

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
F64 = torch.float64
IMPLICIT = {"inner_solver": LBFGS(tol=1e-12), "method": ImplicitCG(rtol=1e-13)}
UNROLLED = {"inner_solver": GradientDescent(0.05, 6), "method": Unrolled()}
both = pytest.mark.parametrize("settings", [IMPLICIT, UNROLLED], ids=["implicit", "unrolled"])
X = torch.tensor([0.3, -0.5, 0.8], dtype=F64)
D = torch.tensor([0.2, 1.1, -0.4], dtype=F64)
MANY = torch.stack([X, X / 2, X - 0.2, D])


def objective(z, x, data):
    return 0.25 * (z**4).sum() + torch.exp(z * x * data).sum()


def problem(data=None, **settings):
    """With ``data`` captured instead of passed in the batch, where they are given."""
    return problem_from(
        lambda z, x, batch: objective(z, x, batch if data is None else data),
        lambda z, x, batch: z.sum(),
        settings.get("regularizer", Proximal(2.0)),
    )


def solver(settings):
    return lambda x: argmin(problem(), x, Task(D), **settings)


# Forward mode twice


TWICE = {
    "jvp of jvp": lambda f: jvp(lambda x: jvp(f, (x,), (D,))[1], (X,), (D,)),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f))(X),
    "jvp of jvp of grad": lambda f: jacfwd(jacfwd(grad(lambda x: f(x).sum())))(X),
    "vmap in between": lambda f: jvp(
        lambda m: vmap(lambda x: jvp(f, (x,), (D,))[1])(m), (MANY,), (MANY,)
    ),
    "of a pull": lambda f: jacfwd(jacfwd(lambda c: (vjp(f, c)[1](c)[0] * c).sum()))(X),
}


@both
@pytest.mark.parametrize("how", TWICE)
def test_forward_mode_over_forward_mode_is_refused(how, settings):
    with pytest.raises(NotDifferentiableError, match=r"`jvp` of `jvp`.*torch.func.hessian"):
        TWICE[how](solver(settings))


def test_forward_mode_twice_beside_an_argmin_is_none_of_its_business():
    def fixed():
        return argmin(problem(D), X, **IMPLICIT)

    second = jacfwd(jacfwd(lambda x: (fixed() * x**2).sum()))(X)
    torch.testing.assert_close(second, torch.diag(2 * fixed()))


def test_pytorch_still_loses_tangents_in_jvp_of_jvp():
    # The day this fails, the refusal can go.
    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.sin()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_forward(*inputs)

        @staticmethod
        def jvp(ctx, t):
            return t * ctx.saved_tensors[0].cos()

    x = torch.tensor(0.5, dtype=F64)
    one = torch.ones_like(x)
    second = jvp(lambda x: jvp(Sine.apply, (x,), (one,))[1], (x,), (one,))[1]
    assert second == 0  # and not −sin(0.5)


# The older vmap


LEGACY = {
    "is_grads_batched": lambda f: batched_rows(f),
    "jacobian": lambda f: legacy.jacobian(f, X, vectorize=True),
    "hessian": lambda f: legacy.hessian(lambda x: f(x).sum(), X, vectorize=True),
    "forward jacobian": lambda f: legacy.jacobian(f, X, vectorize=True, strategy="forward-mode"),
}


def batched_rows(f):
    x = X.clone().requires_grad_()
    return torch.autograd.grad(f(x), x, torch.eye(3, dtype=F64), is_grads_batched=True)[0]


@pytest.mark.parametrize("how", LEGACY)
def test_batched_gradients_of_the_older_kind_are_refused(how):
    with pytest.raises(NotDifferentiableError, match=r"is_grads_batched.*torch\.func\.jacrev"):
        LEGACY[how](solver(IMPLICIT))


@pytest.mark.parametrize("how", LEGACY)
def test_batched_gradients_of_the_older_kind_are_refused_or_right_for_unrolled_steps(how):
    f = solver(UNROLLED)
    try:
        got = LEGACY[how](f)
    except NotDifferentiableError:
        assert how == "forward jacobian"
        return
    want = jacrev(grad(lambda x: f(x).sum()))(X) if how == "hessian" else jacrev(f)(X)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


# Tensors of a transform that are not passed in


CAPTURED = {
    "objective": lambda d, **settings: argmin(problem(d), X, **settings),
    "objective of stacked tasks": lambda d, **settings: argmin(
        problem(d), X, TaskBatch(MANY), **settings
    ),
    "center": lambda d, **settings: argmin(
        problem(regularizer=Proximal(2.0, lambda x: d)), X, Task(D), **settings
    ),
    "strength": lambda d, **settings: argmin(
        problem(regularizer=Proximal(lambda x: d.sum().exp(), lambda x: x)), X, Task(D), **settings
    ),
    "stream": lambda d, **settings: argmin(problem(), X, Task(Stream(lambda step: d)), **settings),
}


def dual(f):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(X, D))


AROUND = {
    "vmap": lambda f: vmap(f)(MANY),
    "grad": lambda f: grad(lambda d: f(d).sum())(X),
    "jvp": lambda f: jvp(f, (X,), (D,)),
    "dual": dual,
    "vmap of grad": lambda f: vmap(grad(lambda d: f(d).sum()))(MANY),
}


@both
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("what", CAPTURED)
def test_captured_tensors_of_a_transform_are_refused(what, around, settings):
    with pytest.raises(DependenceError, match="put it into `outer`"):
        AROUND[around](lambda d: CAPTURED[what](d, **settings))


@both
@pytest.mark.parametrize("around", [k for k in AROUND if k != "vmap"])
def test_differentiated_data_are_refused(around, settings):
    with pytest.raises(DependenceError, match="derivatives in `outer` only"):
        AROUND[around](lambda d: argmin(problem(), X, Task(d), **settings))


@both
def test_differentiated_data_of_an_outer_level_are_refused(settings):
    def inner(d):
        return grad(lambda x: argmin(problem(), x, Task(d), **settings).sum())(X).sum()

    with pytest.raises(DependenceError, match="derivatives in `outer` only"):
        grad(inner)(D)


# Third derivatives of native norms


def normed():
    return problem_from(
        lambda z, x, batch: F.layer_norm(z, (3,), eps=0.5).pow(3).sum() + (z * x).sum(),
        lambda z, x, batch: z.sum(),
        Proximal(6.0),
    )


@both
@pytest.mark.parametrize("tasks", [None, TaskBatch(count=2)], ids=["one", "stack"])
def test_second_derivatives_of_native_norms_are_refused_under_transforms(tasks, settings):
    def f(x):
        return argmin(normed(), x, tasks, **settings).sin().sum()

    for second, x in ((jacrev(grad(f)), X), (jacfwd(grad(f)), X), (vmap(jacrev(grad(f))), MANY)):
        with pytest.raises(NotDifferentiableError, match="exact_norms"):
            second(x)


@both
@pytest.mark.parametrize("tasks", [None, TaskBatch(count=2)], ids=["one", "stack"])
def test_first_derivatives_of_native_norms_are_right_in_either_mode(tasks, settings):
    def hand_written(y):
        var, mean = torch.var_mean(y, dim=-1, correction=0, keepdim=True)
        return (y - mean) * torch.rsqrt(var + 0.5)

    exact = problem_from(
        lambda z, x, batch: hand_written(z).pow(3).sum() + (z * x).sum(),
        lambda z, x, batch: z.sum(),
        Proximal(6.0),
    )
    want = jacrev(lambda x: argmin(exact, x, tasks, **settings))(X)
    for mode in (jacrev, jacfwd):
        got = mode(lambda x: argmin(normed(), x, tasks, **settings))(X)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_transforms_inside_an_objective_are_not_taken_for_captured_tensors():
    nested = problem_from(
        lambda z, x, batch: (grad(lambda y: (y**4).sum() / 4)(z) * z).sum() + (z * x).sum(),
        lambda z, x, batch: z.sum(),
        Proximal(1.0),
    )
    got = vmap(lambda x: argmin(nested, x, TaskBatch(count=2), **IMPLICIT))(MANY)
    want = torch.stack([argmin(nested, x, TaskBatch(count=2), **IMPLICIT) for x in MANY])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
