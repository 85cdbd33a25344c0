"""`argmin` under torch.func, forward mode and modules: equal to the plain tape, task by task."""

import warnings
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F

from bilevel import (
    BilevelWarning,
    Proximal,
    SolveError,
    Stream,
    Structure,
    Task,
    TaskBatch,
    argmin,
    assert_hypergradient,
    hypergradient,
    problem_from,
)
from bilevel.solvers import LBFGS, DenseExact, GradientDescent, ImplicitCG, Unrolled
from tests.helpers import randn

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
F64 = torch.float64
TIGHT = {"inner_solver": LBFGS(tol=1e-12), "method": ImplicitCG(rtol=1e-13)}
X = torch.tensor([0.3, -0.5, 0.8], dtype=F64)
D = torch.tensor([0.2, 1.1, -0.4], dtype=F64)
MANY = torch.stack([X, X / 2, X - 0.2, D])
DATA = torch.stack([0.5 * randn(3, seed=i) for i in range(3)])


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


CASES = {
    "smooth": (smooth, TIGHT),
    "equilibrium": (
        equilibrium,
        {"inner_solver": GradientDescent(0.7, 500, tol=1e-13), "method": DenseExact()},
    ),
    "unrolled": (smooth, {"inner_solver": GradientDescent(0.05, 6), "method": Unrolled()}),
    "checkpointed": (
        smooth,
        {"inner_solver": GradientDescent(0.05, 6), "method": Unrolled(truncate=5, checkpoint=2)},
    ),
}
TASKS = {
    1: Task(DATA[0]),
    "stack": TaskBatch(DATA),
    "list": [Task(data) for data in DATA],
}


@pytest.fixture(params=[(c, t) for c in CASES for t in TASKS], ids=lambda p: f"{p[0]}-{p[1]}")
def solve(request):
    """A function of x ``[3]``: the inner solutions, ``[3]`` or ``[tasks, 3]``."""
    case, tasks = request.param
    build, settings = CASES[case]
    problem = build()

    def solve(x):
        z = argmin(problem, x, TASKS[tasks], **settings)
        return torch.stack(z) if isinstance(z, list) else z

    return solve


def loss(solve):
    """F(x) = f(x, z*(x))."""
    return lambda x: (solve(x).sin() ** 2).sum() + (x**3).sum()


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


# By the tape alone


def tape_gradient(f, x):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def tape_jacobian(f, x):
    return torch.autograd.functional.jacobian(f, x)


def tape_hessian(f, x):
    return torch.autograd.functional.hessian(f, x)


def test_reverse_transforms(solve):
    f = loss(solve)
    H = tape_hessian(f, X)
    close(grad(f)(X), tape_gradient(f, X))
    close(grad(lambda x: grad(f)(x) @ D)(X), H @ D)
    close(jacrev(solve)(X), tape_jacobian(solve, X))
    close(jacrev(grad(f))(X), H)
    close(jacrev(jacrev(f))(X), H)
    out, pull = vjp(solve, X)
    close(pull(torch.ones_like(out))[0], tape_jacobian(solve, X).sum(tuple(range(out.ndim))))


def test_forward_mode_once(solve):
    f, J = loss(solve), tape_jacobian(solve, X)
    close(jvp(solve, (X,), (D,))[1], J @ D)
    close(jacfwd(solve)(X), J)
    H = tape_hessian(f, X)
    close(hessian(f)(X), H)
    close(jacfwd(grad(f))(X), H)
    close(jacrev(jacfwd(f))(X), H)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, D)
        close(forward_ad.unpack_dual(solve(dual)).tangent, J @ D)
        x = X.clone().requires_grad_()
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, D))).tangent
        close(torch.autograd.grad(tangent, x)[0], H @ D)
        dual = forward_ad.make_dual(x, D)
        (g,) = torch.autograd.grad(f(dual), dual, create_graph=True)
        close(forward_ad.unpack_dual(g).tangent, H @ D)


def test_third_derivatives(solve):
    f = loss(solve)

    def second(x):
        (g,) = torch.autograd.grad(f(x), x, create_graph=True)
        (h,) = torch.autograd.grad(g @ D, x, create_graph=True)
        return h

    x = X.clone().requires_grad_()
    (third,) = torch.autograd.grad(second(x) @ D, x)
    close(jacrev(hessian(f))(X) @ D @ D, third)
    close(jacfwd(jacrev(jacrev(f)))(X) @ D @ D, third)
    close(grad(lambda x: grad(lambda x: grad(f)(x) @ D)(x) @ D)(X), third)


def test_vmap_over_the_outer_variable_equals_the_loop(solve):
    f = loss(solve)
    close(vmap(solve)(MANY), torch.stack([solve(x) for x in MANY]))
    gradients = torch.stack([tape_gradient(f, x) for x in MANY])
    close(vmap(grad(f))(MANY), gradients)
    close(vmap(grad(f), in_dims=1, out_dims=1)(MANY.mT), gradients.mT)
    close(vmap(vmap(grad(f)))(MANY.reshape(2, 2, 3)), gradients.reshape(2, 2, 3))
    close(grad(lambda many: vmap(f)(many).sum())(MANY), gradients)
    close(vmap(hessian(f))(MANY), torch.stack([tape_hessian(f, x) for x in MANY]))
    jacobians = torch.stack([tape_jacobian(solve, x) for x in MANY])
    close(vmap(lambda x: jvp(solve, (x,), (D,))[1])(MANY), jacobians @ D)
    many = MANY.clone().requires_grad_()
    close(torch.autograd.grad(vmap(f)(many).sum(), many)[0], gradients)


# vmap


@dataclass(frozen=True)
class Counted(GradientDescent):
    """Counts its solves, and the tasks in them."""

    tasks: list = field(default_factory=list, compare=False)

    def solve(self, flat, z=None):
        self.tasks.append(flat.count)
        return super().solve(flat, z)


def test_the_solver_runs_once_for_all_points_of_a_vmap():
    solver = Counted(0.05, 6)
    vmap(lambda x: argmin(smooth(), x, TaskBatch(DATA), inner_solver=solver, method=ImplicitCG()))(
        MANY
    )
    assert solver.tasks == [12]


def test_statuses_are_checked_under_vmap():
    settings = {"inner_solver": GradientDescent(0.05, 3, tol=1e-9), "method": ImplicitCG()}
    with pytest.raises(SolveError, match=r"inner solve failed: tasks 0, 1, 2, 3: MAX_STEPS"):
        vmap(lambda x: argmin(smooth(), x, Task(DATA[0]), **settings))(MANY)
    found = vmap(lambda x: argmin(smooth(), x, Task(DATA[0]), on_failure="ignore", **settings))(
        MANY
    )
    assert found.shape == (4, 3)
    settings = {"inner_solver": LBFGS(tol=1e-12), "method": ImplicitCG(max_steps=1, rtol=1e-9)}
    with pytest.raises(SolveError, match="adjoint solve failed"):
        vmap(grad(lambda x: argmin(smooth(), x, Task(DATA[0]), **settings).sum()))(MANY)


def test_data_may_be_mapped():
    def one(x, data):
        return argmin(smooth(), x, Task(data), **TIGHT).sin().sum()

    want = torch.stack([tape_gradient(lambda x, d=d: one(x, d), X) for d in DATA])
    close(vmap(grad(one), in_dims=(None, 0))(X, DATA), want)
    pairs = list(zip(MANY, DATA, strict=False))
    want = torch.stack([tape_hessian(lambda x, d=d: one(x, d), x) for x, d in pairs])
    close(vmap(hessian(one))(MANY[:3], DATA), want)


def test_stacked_data_of_several_tasks_may_be_mapped():
    batches = torch.stack([DATA, DATA + 0.1, DATA - 0.3, 2 * DATA])

    def one(x, data):
        return argmin(smooth(), x, TaskBatch(data), **TIGHT).sin().sum()

    rows = [tape_gradient(lambda x, d=d: one(x, d), x) for x, d in zip(MANY, batches, strict=True)]
    close(vmap(grad(one))(MANY, batches), torch.stack(rows))


def test_integer_data_and_starting_points_may_be_mapped():
    features = randn(12, 3, seed=4)

    def inner(w, x, batch):
        return F.cross_entropy(batch[0] * x @ w, batch[1]) + 0.5 * (w**2).sum()

    problem = problem_from(
        inner, lambda w, x, b: w.sum(), initial_inner=lambda x, b: x.new_zeros(3, 3)
    )

    def one(x, labels, start):
        task = Task((features, labels))
        return (argmin(problem, x, task, inner=start, **TIGHT) ** 2).sum()

    labels = torch.stack([torch.arange(12) % 3, torch.arange(12) // 4])
    starts = randn(2, 3, 3, seed=2)
    want = [
        tape_gradient(lambda x, i=i: one(x, labels[i], starts[i]), x)
        for i, x in enumerate(MANY[:2])
    ]
    close(vmap(grad(one))(MANY[:2], labels, starts), torch.stack(want))


def test_some_leaves_of_the_outer_variable_may_be_mapped():
    problem = problem_from(
        lambda z, x, batch: 0.25 * (z**4).sum() + (z * x["a"]).sum(),
        lambda z, x, batch: z.sum(),
        Proximal(lambda x: x["s"].exp(), lambda x: x["c"]),
    )

    def one(a, s):
        return argmin(problem, {"a": a, "s": s, "c": X}, TaskBatch(count=2), **TIGHT).sum()

    s = torch.tensor(0.3, dtype=F64)
    got = vmap(grad(one, argnums=(0, 1)), in_dims=(0, None))(MANY, s)
    rows = [grad(one, argnums=(0, 1))(a, s) for a in MANY]
    close(got, tuple(torch.stack(column) for column in zip(*rows, strict=True)))


@pytest.mark.parametrize("case", ["smooth", "unrolled"])
def test_streams_are_repeated_for_every_point(case):
    build, settings = CASES[case]
    noise = 0.0 if case == "smooth" else 0.1
    tasks = [Task(Stream(lambda step, d=d: d + noise * step)) for d in DATA]

    def one(x):
        return torch.stack(argmin(build(), x, tasks, **settings))

    close(vmap(one)(MANY), torch.stack([one(x) for x in MANY]))
    got = vmap(jacrev(one))(MANY)
    close(got, torch.stack([tape_jacobian(one, x) for x in MANY]))


# Nested


def last():
    return problem_from(
        lambda z, y, batch: 0.25 * (z**4).sum() + (z * batch).sum(),
        lambda z, y, batch: z.sum(),
        Proximal(1.0),
    )


def in_the_outer_objective(settings):
    problem = last()
    return problem_from(
        lambda y, x, batch: 0.5 * ((y - batch) ** 2).sum() * (1 + x[0] ** 2),
        lambda y, x, batch: argmin(problem, y, Task(batch), **settings).sum(),
        Proximal(1.0),
    )


def in_the_inner_objective(settings):
    problem = last()

    def inner(y, x, batch):
        z = argmin(problem, y * x, Task(batch), **settings)
        return 0.5 * ((y - batch) ** 2).sum() + 0.3 * (z**2).sum()

    return problem_from(inner, lambda y, x, batch: (y**2).sum(), Proximal(1.0))


NESTED = {
    "implicit": {"inner_solver": LBFGS(tol=1e-13), "method": ImplicitCG(rtol=1e-12)},
    "unrolled": {"inner_solver": GradientDescent(0.3, 15), "method": Unrolled()},
}
SOLVER = GradientDescent(0.3, 200, tol=1e-11)


@pytest.mark.parametrize("settings", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("build", [in_the_outer_objective, in_the_inner_objective])
def test_an_argmin_inside_an_objective_is_right_and_stacks(build, settings):
    problem = build(settings)
    tasks = [Task(randn(3, seed=i), randn(3, seed=i + 9)) for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", BilevelWarning)  # no loop over the tasks
        stacked = hypergradient(
            problem,
            X,
            tasks,
            inner_solver=SOLVER,
            method=ImplicitCG(rtol=1e-11),
            reduction="none",
        )
    for i, task in enumerate(tasks):
        one = hypergradient(problem, X, task, inner_solver=SOLVER, method=ImplicitCG(rtol=1e-11))
        close(stacked.gradient[i], one.gradient)
    assert_hypergradient(problem, X, tasks[0], inner_solver=SOLVER, method=ImplicitCG(rtol=1e-11))


@pytest.mark.slow
def test_two_levels_have_right_second_derivatives_under_transforms():
    problem = in_the_inner_objective(NESTED["implicit"])

    def f(x):
        z = argmin(
            problem,
            x,
            TaskBatch(DATA),
            inner_solver=SOLVER,
            method=ImplicitCG(rtol=1e-12),
        )
        return (z**2).sum()

    close(hessian(f)(X), tape_hessian(f, X))
    close(vmap(grad(f))(MANY[:2]), torch.stack([tape_gradient(f, x) for x in MANY[:2]]))


# Modules


class Smoother(nn.Module):
    """A layer: y = argmin ½‖y − x‖² + strength · Σ log cosh(Δy), with a learned strength."""

    def __init__(self):
        super().__init__()
        self.log_strength = nn.Parameter(torch.tensor(-2.0, dtype=F64))

        def inner(y, outer, batch):
            smooth = torch.log(torch.cosh(y.diff())).sum()
            return 0.5 * ((y - outer["x"]) ** 2).sum() + outer["s"].exp() * smooth

        self.problem = problem_from(
            inner, lambda y, outer, batch: y.sum(), initial_inner=lambda outer, batch: outer["x"]
        )
        self.problem.structure = Structure.POSITIVE_DEFINITE

    def forward(self, x):
        def one(x):
            return argmin(self.problem, {"x": x, "s": self.log_strength}, **TIGHT)

        return vmap(one)(x)


def test_a_layer_is_trained_by_an_optimizer():
    net = nn.Sequential(nn.Linear(4, 6), Smoother(), nn.Linear(6, 1)).double()
    x, y = randn(8, 4), randn(8, 1, seed=1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    losses = []
    before = net[1].log_strength.item()
    for _ in range(40):
        optimizer.zero_grad()
        value = F.mse_loss(net(x), y)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.3 * losses[0]  # 0.03 of it
    assert net[1].log_strength.item() != before


def test_the_gradient_of_a_layer_is_right_and_functional():
    net = nn.Sequential(nn.Linear(4, 6), Smoother()).double()
    x = randn(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: net(x), (x,), fast_mode=True)
    params = {key: p.detach().clone().requires_grad_() for key, p in net.named_parameters()}
    keys = list(params)

    def value(*leaves):
        state = dict(zip(keys, leaves, strict=True))
        return torch.func.functional_call(net, state, (x.detach(),)).pow(2).sum()

    assert torch.autograd.gradcheck(value, tuple(params.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(value, tuple(params.values()), fast_mode=True)
    per_sample = vmap(
        grad(lambda p, x: torch.func.functional_call(net, p, (x[None],)).sum()), in_dims=(None, 0)
    )({key: p.detach() for key, p in params.items()}, x.detach())
    total = torch.autograd.grad(net(x).sum(), net[1].log_strength)[0]
    close(per_sample["1.log_strength"].sum(), total)
