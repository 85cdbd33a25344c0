"""Derivatives of `argmin` to third order, against finite differences and exact formulas."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from bilevel import (
    DependenceError,
    NotDifferentiableError,
    Proximal,
    Task,
    TaskBatch,
    argmin,
    exact_norms,
    problem_from,
    stateless,
)
from bilevel.problems import FewShot, Logistic, Quadratic, Ridge, Sinusoid, conv_strided
from bilevel.solvers import LBFGS, DenseExact, GradientDescent, ImplicitCG, Unrolled
from tests.helpers import five_point, randn

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
F64 = torch.float64
CG = ImplicitCG(rtol=1e-13)
TIGHT = {"inner_solver": LBFGS(tol=1e-12), "method": CG}


def solution(problem, outer, task, **settings):
    """The leaves of the inner solution as a function of the leaves of ``outer``, and those."""
    leaves, spec = tree_flatten(outer)

    def solve(*leaves):
        z = argmin(problem, tree_unflatten(list(leaves), spec), task, **settings)
        return tuple(tree_flatten(z)[0])

    return solve, [leaf.detach().clone().requires_grad_() for leaf in leaves]


def assert_derivatives(problem, outer, task, **settings):
    solve, leaves = solution(problem, outer, task, **settings)
    assert gradcheck(solve, leaves, fast_mode=True)
    assert gradgradcheck(solve, leaves, fast_mode=True)


def registered(problem, tasks):
    example = problem.example(tasks=None if tasks == 1 else 3)
    task = example.task.unstack() if tasks == "list" else example.task
    return {
        "problem": example.problem,
        "outer": example.outer,
        "task": task,
        "inner_solver": example.inner_solver,
    }


kinds = pytest.mark.parametrize("tasks", [1, "stack", "list"])


@kinds
@pytest.mark.parametrize("problem", [Quadratic, Ridge, Logistic])
def test_gradcheck_and_gradgradcheck_on_registered_problems(problem, tasks):
    assert_derivatives(**registered(problem, tasks), method=CG)


@pytest.mark.slow
@kinds
def test_gradcheck_and_gradgradcheck_on_sinusoids(tasks):
    assert_derivatives(**registered(Sinusoid, tasks), method=CG)


# Own problems: an objective whose every derivative in (z, x) is full, and an equilibrium.


def smooth():
    def inner(z, x, batch):
        return 0.25 * ((z * batch) ** 4).sum() + torch.exp(z * x).sum() + torch.sin(z).prod() * x[0]

    return problem_from(inner, lambda z, x, batch: z.sum(), Proximal(lambda x: 2 + x[0] ** 2))


def equilibrium():
    A = 0.3 * randn(3, 3, seed=8)
    return problem_from(
        None,
        lambda z, x, batch: z.sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x),
        stationarity=lambda z, x, batch: z - torch.tanh(A @ z * batch + x),
    )


OWN = {
    "smooth": (smooth, TIGHT),
    "equilibrium": (
        equilibrium,
        {"inner_solver": GradientDescent(0.7, 500, tol=1e-13), "method": DenseExact()},
    ),
    "unrolled": (smooth, {"inner_solver": GradientDescent(0.05, 6), "method": Unrolled()}),
}
X = torch.tensor([0.3, -0.5, 0.8], dtype=F64)
DATA = [0.5 * randn(3, seed=i) for i in range(3)]
TASKS = {
    1: Task(DATA[0]),
    "stack": TaskBatch(torch.stack(DATA)),
    "list": [Task(data) for data in DATA],
}


def own(case, tasks):
    """A function of x ``[3]`` with every row of the inner solutions, ``[tasks, 3]``."""
    build, settings = OWN[case]
    problem = build()

    def solve(x):
        z = argmin(problem, x, TASKS[tasks], **settings)
        return torch.stack(z) if isinstance(z, list) else z

    return solve


own_cases = pytest.mark.parametrize("case", OWN)


@own_cases
@kinds
def test_gradcheck_and_gradgradcheck_on_own_problems(case, tasks):
    x = X.clone().requires_grad_()
    assert gradcheck(own(case, tasks), (x,), check_forward_ad=True)
    assert gradgradcheck(own(case, tasks), (x,), check_fwd_over_rev=True, check_rev_over_rev=True)


@own_cases
@kinds
def test_the_hessian_matches_finite_differences_of_values(case, tasks):
    solve = own(case, tasks)

    def value(x):
        return (solve(x).sin() ** 2).sum() + (x**3).sum()

    hessian = torch.autograd.functional.hessian(value, X)
    for i, e in enumerate(torch.eye(3, dtype=F64)):
        for j, d in enumerate(torch.eye(3, dtype=F64)):
            want = five_point(
                lambda t, e=e, d=d: five_point(lambda s: value(X + t * e + s * d), 1e-2), 1e-2
            )
            torch.testing.assert_close(hessian[i, j], want, rtol=1e-6, atol=1e-6)


@own_cases
@kinds
def test_third_derivatives_match_finite_differences_of_second_ones(case, tasks):
    solve, d = own(case, tasks), torch.tensor([0.4, 1.0, -0.7], dtype=F64)

    def value(x):
        return (solve(x).sin() ** 2).sum()

    def second(x):
        (g,) = torch.autograd.grad(value(x), x, create_graph=True)
        (h,) = torch.autograd.grad((g * d).sum(), x, create_graph=True)
        return h

    x = X.clone().requires_grad_()
    (third,) = torch.autograd.grad((second(x) * d).sum(), x)
    want = five_point(lambda t: (second((X + t * d).requires_grad_()) * d).sum().detach())
    torch.testing.assert_close((third * d).sum(), want, rtol=1e-8, atol=1e-9)


# Norms


def normed(norm):
    """A small net with a norm, adapted to data; the outer variable is where it starts."""
    net = nn.Sequential(nn.Linear(2, 3), norm, nn.Tanh(), nn.Linear(3, 1)).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p += 0.3 * randn(*p.shape, seed=i)
    params, apply = stateless(net)
    problem = problem_from(
        lambda w, x, batch: F.mse_loss(apply(w, batch[0]), batch[1]),
        lambda w, x, batch: sum((p**2).sum() for p in w.values()),
        Proximal(20.0),
    )
    return problem, params, Task((randn(5, 2, seed=30), randn(5, 1, seed=31)))


NORMS = {
    "batch": lambda: nn.BatchNorm1d(3, track_running_stats=False),
    "layer": lambda: nn.LayerNorm(3, eps=0.1),
}
STEPS = GradientDescent(0.04, 8)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("settings", [TIGHT, {"inner_solver": STEPS, "method": Unrolled()}])
def test_exact_norms_have_second_derivatives_where_native_ones_are_refused(norm, settings):
    assert_derivatives(*normed(exact_norms(NORMS[norm]())), **settings)
    solve, leaves = solution(*normed(NORMS[norm]()), **settings)
    assert gradcheck(solve, leaves, fast_mode=True)
    with pytest.raises(NotDifferentiableError, match="exact_norms"):
        gradgradcheck(solve, leaves, fast_mode=True)


@pytest.mark.slow
def test_gradgradcheck_on_few_shot_learning_with_exact_norms():
    module = conv_strided(3, channels=2, size=6, blocks=2, activation=nn.Tanh, seed=0).double()
    params, net = stateless(exact_norms(module))
    example = FewShot.example()
    assert_derivatives(
        FewShot(net, strength=30.0),
        params,
        example.task,
        inner_solver=LBFGS(tol=1e-11),
        method=CG,
    )


# Edges


def test_only_solution_outer_variable_and_data_are_kept_between_the_passes():
    x, data = randn(16, seed=3).requires_grad_(), randn(4, 16, seed=2)
    problem = problem_from(
        lambda z, x, batch: (z**4).sum() + torch.exp(z * (batch @ x.sin())).sum(),
        lambda z, x, batch: z.sum(),
        initial_inner=lambda x, batch: batch.new_zeros(4),
    )
    z = argmin(problem, x, Task(data), inner_solver=GradientDescent(0.01, 50), method=CG)
    nodes, shapes = [z.grad_fn], []
    while nodes:
        node = nodes.pop()
        shapes += [tuple(t.shape) for t in getattr(node, "saved_tensors", ())]
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    assert sorted(shapes) == [(1, 4), (1, 4, 16), (16,)]


@pytest.mark.parametrize("method", [CG, Unrolled()], ids=["implicit", "unrolled"])
def test_data_that_require_grad_are_refused(method):
    data = DATA[0].clone().requires_grad_()
    with pytest.raises(DependenceError, match=r"`inner_batch` of the task requires grad"):
        argmin(smooth(), X, Task(data), inner_solver=GradientDescent(0.05, 6), method=method)


def test_the_outer_batch_is_not_used_and_may_require_grad():
    task = Task(DATA[0], DATA[1].clone().requires_grad_())
    x = X.clone().requires_grad_()
    z = argmin(smooth(), x, task, **TIGHT)
    want = argmin(smooth(), x, Task(DATA[0]), **TIGHT)
    torch.testing.assert_close(
        torch.autograd.grad(z.sum(), x)[0], torch.autograd.grad(want.sum(), x)[0]
    )
