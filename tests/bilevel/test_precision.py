"""Inner steps in low precision: all that judges them, and all that follows, keeps its digits."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from bilevel import (
    Kernels,
    NotDifferentiableError,
    ObjectiveError,
    Proximal,
    Status,
    Task,
    TaskBatch,
    Trainer,
    hypergradient,
    problem_from,
    stateless,
)
from bilevel.problems import EpisodeSampler, FewShot, Logistic, Ridge, conv_strided, data
from bilevel.pytree import tree_leaves, tree_map
from bilevel.rows import full_precision, step_precision
from bilevel.solvers import (
    LBFGS,
    BacktrackingDescent,
    ClosedForm,
    DenseExact,
    FirstOrder,
    GradientDescent,
    HessianFree,
    ImplicitCG,
    ProximalGradient,
    TorchOptimizer,
    Unrolled,
)
from tests.helpers import randn, spd

F32, F64 = torch.float32, torch.float64
BF16 = Kernels(precision="bf16")
ESTIMATE = ImplicitCG(error_estimate=True)


def made(problem, seed, dtype):
    """Two tasks of a strongly convex problem, of numbers that float32 holds, in either dtype."""
    example = problem.generated(tasks=2, seed=seed, dtype=F32)
    to = partial(tree_map, lambda x: x.to(dtype))
    task = TaskBatch(to(example.task.inner_batch), to(example.task.outer_batch))
    return replace(example, task=task, outer=to(example.outer))


def rows(gradient):
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in tree_leaves(gradient)], 1).double()


def solved(example, method=ESTIMATE, solver=None, **more):
    solver = solver or GradientDescent(1 / example.lipschitz, 300)
    return hypergradient(
        example.problem, example.outer, example.task, inner_solver=solver, method=method, **more
    )


def true_residual(example, z):
    """‖∂_z G‖ of each task at ``z`` in float64, written here."""
    regularizer, found = example.problem.regularizer, []
    outer = example.outer.double()
    for one, task in zip(z, example.task.unstack(), strict=True):
        point = one.double().requires_grad_()
        batch = tree_map(torch.Tensor.double, task.inner_batch)
        pull = regularizer.strength(outer) * (point - regularizer.center(outer)) ** 2
        value = example.problem.inner_objective(point, outer, batch) + 0.5 * pull.sum()
        found.append(torch.autograd.grad(value, point)[0].norm())
    return torch.stack(found)


# What is rounded, and what is not


@pytest.mark.parametrize("tol", [None, 1e-5])
def test_the_steps_are_rounded_and_nothing_else(tol):
    seen = {"inner": [], "outer": [], "start": []}

    def note(name, x):
        seen[name].append(torch.is_autocast_enabled("cpu"))
        return x

    A = torch.eye(3) + 0.1
    problem = problem_from(
        lambda z, x, batch: note("inner", 0.5 * z @ (A @ z) - x @ z),
        lambda z, x, batch: note("outer", ((z - 1.0) ** 2).sum()),
        Proximal(0.1),
        initial_inner=lambda x, batch: note("start", torch.zeros_like(x)),
    )
    solver = GradientDescent(0.5, 20, tol=tol)
    method = ImplicitCG(error_estimate=True, correct=True)
    settings = {"inner_solver": solver, "method": method}
    hypergradient(problem, torch.ones(3), **settings)
    for calls in seen.values():
        assert not any(calls)
        calls.clear()
    result = hypergradient(problem, torch.ones(3), kernels=BF16, **settings)
    # One gradient beforehand tells how far off the steps are.
    assert sum(seen["inner"]) == int(result.diagnostics.inner.steps.max()) + 1
    assert not any(seen["outer"] + seen["start"])
    assert result.gradient.dtype == result.inner.dtype == F32


@pytest.mark.parametrize("seed", [0, 10, 20])
@pytest.mark.parametrize("problem", [Logistic, Ridge], ids=lambda p: p.__name__)
def test_the_residual_is_that_of_the_point_in_full(problem, seed):
    example = made(problem, seed, F32)
    full, low = solved(example), solved(example, kernels=BF16)
    reported = low.diagnostics.inner.residual
    torch.testing.assert_close(reported, true_residual(example, low.inner), rtol=1e-2, atol=0)
    assert (reported > 10 * full.diagnostics.inner.residual).all()
    assert low.status == full.status == (Status.BUDGET, Status.BUDGET)
    off = (low.gradient - full.gradient).norm() / full.gradient.norm()
    assert 1e-5 < off < 2e-2


def test_a_tolerance_that_rounded_steps_cannot_meet_is_not_met():
    example = made(Logistic, 0, F32)
    for tol, status in ((1e-5, Status.MAX_STEPS), (5e-3, Status.CONVERGED)):
        result = solved(example, solver=GradientDescent(1.0, 300, tol=tol), kernels=BF16)
        assert set(result.status) == {status}
        residual = true_residual(example, result.inner)
        assert ((residual <= tol) == (status is Status.CONVERGED)).all()


@pytest.mark.parametrize("seed", [0, 10, 20, 30, 40])
@pytest.mark.parametrize("problem", [Logistic, Ridge], ids=lambda p: p.__name__)
@pytest.mark.parametrize("correct", [False, True])
def test_the_error_stays_within_the_estimate(problem, seed, correct):
    """Against float64, solved to 1e-10; the factors are those of the estimates in float64."""
    double = made(problem, seed, F64)
    tight = GradientDescent(1 / double.lipschitz, 100_000, tol=1e-10)
    exact = solved(double, DenseExact(), tight, reduction="none")
    assert exact.ok
    example = made(problem, seed, F32)
    method = ImplicitCG(error_estimate=True, correct=correct)
    result = solved(example, method, kernels=BF16, reduction="none")
    true = (rows(result.gradient) - rows(exact.gradient)).norm(dim=1)
    true = true / rows(result.gradient).norm(dim=1)
    ratio = result.diagnostics.error_estimate / true
    assert (ratio > 0.7).all()
    assert (ratio < 1.4).all()
    # One Newton step in full precision brings the digits back.
    assert (true < (1e-4 if correct else 2e-2)).all()
    assert correct or (true > 1e-4).all()


def test_a_network_on_glyphs():
    pool = data.glyphs(classes=12, examples=6, alphabets=2)
    tasks = EpisodeSampler(pool, ways=3, shots=2, queries=2, tasks=3)(0)
    module = conv_strided(3, channels=8, activation=torch.nn.Tanh, norm="none", seed=0)
    params, net = stateless(module)
    problem = FewShot(net, strength=2.0)
    settings = {"inner_solver": GradientDescent(0.1, 16), "method": ImplicitCG(50)}

    def run(**more):
        return hypergradient(problem, params, tasks, **settings, **more)

    full, low = run(), run(kernels=BF16)
    chunks = [run(kernels=BF16, engine="loop"), run(kernels=BF16, task_chunk=2)]
    flat = [
        torch.cat([leaf.flatten() for leaf in tree_leaves(one.gradient)])
        for one in (full, low, *chunks)
    ]
    for one in flat[1:]:
        assert 0 < (one - flat[0]).norm() < 0.05 * flat[0].norm()
    assert low.ok
    assert all(leaf.dtype == F32 for leaf in tree_leaves([low.gradient, low.inner]))


@pytest.mark.parametrize(
    "solver",
    [
        GradientDescent(0.3, 60, momentum=0.5, nesterov=True),
        ProximalGradient(0.3, 60),
        TorchOptimizer("Adam", 200, lr=0.02),
        TorchOptimizer("Adafactor", 200, lr=0.02),
    ],
    ids=repr,
)
@pytest.mark.parametrize("method", [ImplicitCG(), FirstOrder()], ids=repr)
def test_solvers_that_compare_no_values(solver, method):
    A = torch.diag(torch.tensor([1.0, 2.0, 0.5])) + 0.1
    problem = problem_from(
        lambda z, x, batch: 0.5 * z @ A @ z - batch * z.sum(),
        lambda z, x, batch: ((z - 1.0) ** 2).sum(),
        Proximal(0.5),
        initial_inner=lambda x, batch: 1.0 * x,
    )
    tasks = Task.stack([Task(torch.tensor(1.0)), Task(torch.tensor(0.3))])
    settings = {"inner_solver": solver, "method": method}
    x = torch.tensor([0.1, -0.7, 0.4])
    full = hypergradient(problem, x, tasks, **settings)
    low = hypergradient(problem, x, tasks, kernels=BF16, **settings)
    assert not low.inner.equal(full.inner)
    torch.testing.assert_close(low.inner, full.inner, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(low.gradient, full.gradient, rtol=5e-2, atol=5e-2)
    assert low.inner.dtype == low.gradient.dtype == F32


def test_an_equilibrium_iterates_on_its_rounded_stationarity():
    A = torch.tensor([[0.2, 0.9], [-0.5, 0.1]])
    problem = problem_from(
        None,
        lambda z, x, b: ((z - 1) ** 2).sum(),
        initial_inner=lambda x, b: torch.zeros_like(x),
        stationarity=lambda z, x, b: z - torch.tanh(A @ z + x),
    )
    x = torch.tensor([0.3, -0.2])
    settings = {"inner_solver": GradientDescent(1.0, 50), "method": DenseExact()}
    full = hypergradient(problem, x, **settings)
    low = hypergradient(problem, x, kernels=BF16, **settings)
    assert 0 < (low.gradient - full.gradient).norm() < 2e-2 * full.gradient.norm()
    assert low.inner.dtype == F32
    residual = (low.inner - torch.tanh(A @ low.inner + x)).norm().double()
    torch.testing.assert_close(low.diagnostics.inner.residual[0], residual, rtol=1e-3, atol=1e-8)


def test_a_stationarity_that_is_rounded_as_a_whole():
    B = torch.tensor([[0.8, -0.3, 1.0, 0.0], [0.3, 0.8, 0.0, 1.0]])
    problem = problem_from(
        None,
        lambda z, x, b: ((z - 1) ** 2).sum(),
        initial_inner=lambda x, b: torch.zeros_like(x),
        stationarity=lambda z, x, b: B @ torch.cat([z, x]),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (B @ torch.ones(4)).dtype == torch.bfloat16
    for solver in (GradientDescent(0.5, 60), TorchOptimizer("SGD", 60, lr=0.5)):
        result = hypergradient(
            problem,
            torch.tensor([0.3, -0.2]),
            inner_solver=solver,
            method=DenseExact(),
            kernels=BF16,
        )
        assert result.inner.dtype == F32
        assert 1e-5 < result.diagnostics.inner.residual < 1e-2


def test_full_precision_is_what_it_was():
    example = made(Logistic, 0, F32)
    plain, full = solved(example), solved(example, kernels=Kernels(precision="full"))
    for a, b in zip(
        tree_leaves([plain.gradient, plain.inner, plain.diagnostics.inner.residual]),
        tree_leaves([full.gradient, full.inner, full.diagnostics.inner.residual]),
        strict=True,
    ):
        assert a.equal(b)
    assert plain.diagnostics.counts == full.diagnostics.counts


# Divergence


@pytest.mark.parametrize("seed", range(3))
def test_steps_that_leave_a_solution_by_their_rounding_do_not_diverge(seed):
    """From the solution, and from where rounded steps rest, whose rounded gradient is small."""
    A, b = 100 * spd(6, 3.0, seed, largest=1.0).float(), 100 * randn(6, seed=seed, dtype=F32)
    problem = problem_from(
        lambda z, x, batch: 0.5 * z @ A @ z - z @ b, lambda z, x, batch: (z**2).sum(), Proximal(1.0)
    )
    x = torch.zeros(6)

    def solve(start, steps, tol=None, kernels=BF16):
        solver = GradientDescent(0.01, steps, tol=tol)
        settings = {"inner_solver": solver, "method": ImplicitCG(), "kernels": kernels}
        return hypergradient(problem, x, inner=start, **settings)

    solution, resting = (solve(x, 500, kernels=one) for one in (Kernels(), BF16))
    before = solution.diagnostics.inner.residual
    for start in (solution.inner, resting.inner):
        for tol, wanted in ((None, Status.BUDGET), (1e-9, Status.MAX_STEPS)):
            found = solve(start, 50, tol)
            assert (found.diagnostics.inner.residual > 1e3 * before).all()
            assert set(found.status) == {wanted}


def test_a_divergence_is_still_seen():
    A = torch.eye(2) + 0.1
    problem = problem_from(
        lambda z, x, batch: batch * 0.5 * z @ A @ z - x @ z,
        lambda z, x, batch: (z**2).sum(),
        Proximal(1.0),
    )
    result = hypergradient(
        problem,
        torch.ones(2),
        Task.stack([Task(torch.tensor(1.0)), Task(torch.tensor(5.0))]),
        inner_solver=GradientDescent(0.4, 40),
        method=ImplicitCG(),
        kernels=BF16,
    )
    assert result.status == (Status.BUDGET, Status.DIVERGED)


# What is set is restored


@pytest.mark.parametrize("before", [False, True])
def test_autocast_is_left_as_it_was(before):
    broken = []

    def inner(z, x, batch):
        if broken and torch.get_autocast_dtype("cpu") == torch.bfloat16:
            raise KeyError("broken")
        return 0.5 * ((z - x) ** 2).sum()

    problem = problem_from(inner, lambda z, x, batch: (z**2).sum(), Proximal(1.0))
    settings = {"inner_solver": GradientDescent(0.4, 5), "method": ImplicitCG(), "kernels": BF16}

    def state():
        return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    with torch.autocast("cpu", dtype=torch.float16, enabled=before):
        wanted = state()
        hypergradient(problem, torch.ones(2), **settings)
        assert state() == wanted
        broken.append(True)
        with pytest.raises(KeyError):
            hypergradient(problem, torch.ones(2), **settings)
        assert state() == wanted


@pytest.mark.parametrize("before", [(False, False), (True, False), (False, True)], ids=str)
def test_tf32_is_allowed_for_a_while(before):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    cuda = torch.device("cuda")

    def state():
        return matmul.allow_tf32, cudnn.allow_tf32

    first = state()
    matmul.allow_tf32, cudnn.allow_tf32 = before
    try:
        with step_precision("tf32", cuda):
            assert state() == (True, True)
            with full_precision(cuda):
                assert state() == (False, False)
            assert state() == (True, True)
        assert state() == before
        with pytest.raises(KeyError), step_precision("tf32", cuda):
            raise KeyError
        assert state() == before
        with step_precision("full", cuda):
            assert state() == before
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = first


# Refusals


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        (BacktrackingDescent(0.1), "BacktrackingDescent compares values of the inner objective"),
        (LBFGS(), "LBFGS compares values"),
        (HessianFree(), "HessianFree compares values"),
        (TorchOptimizer("LBFGS"), "torch.optim.LBFGS evaluates the inner objective within a step"),
        (ClosedForm(lambda x, batch: x), "ClosedForm takes none"),
        (None, "`inner_solver` is None"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_solvers_whose_steps_cannot_be_rounded(solver, words):
    example = made(Logistic, 0, F32)
    with pytest.raises(ValueError, match=f"`precision` is 'bf16', .*{words}.*precision='full'"):
        hypergradient(
            example.problem,
            example.outer,
            example.task,
            inner=torch.zeros(2, *example.outer.shape),
            inner_solver=solver,
            method=ImplicitCG(),
            kernels=BF16,
        )


@pytest.mark.parametrize("method", [Unrolled(), Unrolled(truncate=2)], ids=repr)
def test_rounded_steps_are_not_differentiated(method):
    example = made(Logistic, 0, F32)
    with pytest.raises(NotDifferentiableError, match=r"Unrolled differentiates .* ImplicitCG"):
        solved(example, method, kernels=BF16)


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_a_setting_without_effect_is_refused(dtype):
    """Autocast leaves float64 alone, and there is nothing to round in what is rounded already."""
    z = torch.ones(2, 2, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (z @ z).dtype == dtype
    problem = problem_from(
        lambda z, x, b: 0.5 * (z**2).sum(), lambda z, x, b: z.sum(), Proximal(1.0)
    )
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"the inner variable is {name}; pass precision='full'"):
        hypergradient(
            problem,
            torch.ones(2, dtype=dtype),
            inner_solver=GradientDescent(0.4, 5),
            method=ImplicitCG(),
            kernels=BF16,
        )


def test_tf32_needs_a_device_that_has_it(monkeypatch):
    with pytest.raises(ValueError, match=r"'tf32', which cpu does not have; pass precision='full'"):
        solved(made(Logistic, 0, F32), kernels=Kernels(precision="tf32"))
    solver, cuda = GradientDescent(0.1), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="'tf32', which cuda does not have"):
        solver.require_precision("tf32", F32, cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    solver.require_precision("tf32", F32, cuda)


def test_an_objective_that_autocast_breaks_is_told():
    A = torch.eye(3)
    problem = problem_from(
        lambda z, x, batch: torch.dot(A @ z, z) - x @ z,
        lambda z, x, batch: (z**2).sum(),
        Proximal(0.1),
    )
    settings = {"inner_solver": GradientDescent(0.2, 5), "method": ImplicitCG()}
    hypergradient(problem, torch.ones(3), **settings)
    with pytest.raises(ObjectiveError, match=r"`precision` is 'bf16', .*same dtype.* with `@`"):
        hypergradient(problem, torch.ones(3), kernels=BF16, **settings)


def test_a_training_takes_rounded_steps():
    example = made(Logistic, 0, F32)

    def fit(kernels):
        outer = example.outer.clone()
        trainer = Trainer(
            example.problem,
            inner_solver=GradientDescent(1.0, 30),
            method=ImplicitCG(),
            optimizer=lambda leaves: torch.optim.SGD(leaves, lr=1.0),
            warm_start="both",
            kernels=kernels,
        )
        trainer.fit(outer, example.task, 5)
        return outer

    full, low = fit(None), fit(BF16)
    assert 0 < (low - full).norm() < 0.05 * (full - example.outer).norm()
