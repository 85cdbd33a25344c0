"""Products with the Hessian, recomputed: what a kept graph gives, and nothing held between them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from bilevel import (
    Kernels,
    Proximal,
    Stream,
    Task,
    TaskBatch,
    Trainer,
    exact_norms,
    hypergradient,
    problem_from,
    stateless,
)
from bilevel.flat import FlatProblem, Outer
from bilevel.linearised import linearise
from bilevel.memory import peak_bytes
from bilevel.probe import probe
from bilevel.problems import FewShot, conv_strided
from bilevel.pytree import tree_leaves
from bilevel.recomputed import RecomputedStationarity
from bilevel.registry import PROBLEMS
from bilevel.solvers import (
    CG,
    GMRES,
    DenseExact,
    GradientDescent,
    Implicit,
    ImplicitCG,
    NeumannSeries,
)
from tests.helpers import peak_saved, quadratic, quadratic_task, randn

F64 = torch.float64
KEPT, RECOMPUTED = Kernels(), Kernels(products="recomputed")
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def systems(problem, outer, tasks, *, per_task=False):
    """The problem linearised near its start, with either kind of products."""
    found = []
    for kernels in (KEPT, RECOMPUTED):
        flat = FlatProblem.of(problem, Outer.of(outer), tasks, kernels=kernels)
        probe(flat)
        flat = flat.expanded() if per_task else flat
        z = flat.start + 0.1 * randn(*flat.start.shape, seed=1).to(flat.start)
        found.append(linearise(flat, z))
    return found


def assert_close(found, wanted, rtol=1e-9):
    """Equal up to rounding, relative to the size of the whole."""
    assert (found is None) == (wanted is None)
    if wanted is not None:
        assert found.shape == wanted.shape
        assert not found.requires_grad
        assert (found - wanted).norm() <= rtol * max(wanted.norm().item(), 1e-12)


def assert_same_products(kept, recomputed):
    assert isinstance(recomputed.graph, RecomputedStationarity)
    assert_close(recomputed.stationarity, kept.stationarity)
    assert_close(recomputed.residual, kept.residual)
    torch.testing.assert_close(recomputed.inner_value, kept.inner_value, equal_nan=True, **CLOSE)
    for seed in range(2):
        v = randn(*kept.z.shape, seed=seed).to(kept.z)
        assert_close(recomputed.pull(v), kept.pull(v))
        assert_close(recomputed.push(v), kept.push(v))
        for a, b in zip(recomputed.cross(v), kept.cross(v), strict=True):
            assert_close(a, b)
    assert recomputed.flat.counts == kept.flat.counts
    for name, note in kept.flat.notes.items():
        assert_close(recomputed.flat.notes[name], note)


def both(run):
    """The results of ``run(kernels)``, once by either kind of products, which must agree."""
    kept, recomputed = run(KEPT), run(RECOMPUTED)
    pairs = zip(tree_leaves(recomputed.gradient), tree_leaves(kept.gradient), strict=True)
    for a, b in pairs:
        assert_close(a, b)
    assert recomputed.status == kept.status
    assert recomputed.diagnostics.counts == kept.diagnostics.counts
    return kept, recomputed


# The same numbers


@pytest.mark.parametrize("per_task", [False, True], ids=["shared", "per-task"])
@pytest.mark.parametrize("tasks", [None, 3], ids=["single", "batch"])
@pytest.mark.parametrize("problem_name", list(PROBLEMS))
def test_products_are_those_of_a_kept_graph(problem_name, tasks, per_task):
    example = PROBLEMS[problem_name].example(tasks=tasks)
    batch = Task.stack([example.task]) if tasks is None else example.task
    assert_same_products(*systems(example.problem, example.outer, batch, per_task=per_task))


HOW = [{"engine": "loop"}, {"engine": "batched"}, {"engine": "batched", "task_chunk": 2}]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("problem_name", list(PROBLEMS))
def test_hypergradients_are_those_of_a_kept_graph(problem_name, how, reduction):
    example = PROBLEMS[problem_name].example(tasks=3)
    symmetric = example.problem.structure.satisfies(CG.needs)
    both(
        lambda kernels: hypergradient(
            example.problem,
            example.outer,
            example.task,
            inner_solver=example.inner_solver,
            method=ImplicitCG(rtol=1e-10) if symmetric else Implicit(GMRES(rtol=1e-10)),
            reduction=reduction,
            kernels=kernels,
            **how,
        )
    )


@pytest.mark.parametrize(
    "method",
    [
        ImplicitCG(rtol=1e-10, error_estimate=True, correct=True, check_minimum=True),
        DenseExact(),
        NeumannSeries(terms=30, scale=1.0),
    ],
    ids=lambda method: type(method).__name__,
)
def test_whatever_asks_for_products_gets_the_same(method):
    tasks = [quadratic_task(5, m=3, seed=i) for i in range(3)]
    kept, recomputed = both(
        lambda kernels: hypergradient(
            quadratic(strength=0.5),
            randn(5),
            [replace(task, inner_batch={**task.inner_batch, "B": randn(5, 5)}) for task in tasks],
            inner_solver=GradientDescent(0.5, 10),
            method=method,
            kernels=kernels,
        )
    )
    for a, b in zip(recomputed.state.adjoint, kept.state.adjoint, strict=True):
        assert_close(a, b)
    if getattr(method, "error_estimate", False):
        estimates = [one.diagnostics.error_estimate for one in (recomputed, kept)]
        assert_close(*estimates, 1e-6)


# The outer variable's ways into the stationarity


def learned(z, x, batch):
    """An inner objective with an outer leaf of its own, beside those of the regularizer."""
    return 0.5 * ((batch @ z["w"] - x["shift"]) ** 2).mean() + (x["weight"] * z["w"].sin()).sum()


@pytest.mark.parametrize("per_task", [False, True], ids=["shared", "per-task"])
@pytest.mark.parametrize("which", ["both", "strength", "center", "objective"])
def test_learned_strength_and_center(which, per_task):
    strength = 0.7 if which in ("center", "objective") else lambda x: x["log"].exp()

    def center(x):
        fixed = which in ("strength", "objective")
        return {"w": torch.ones(4, dtype=F64) if fixed else x["center"]}

    outer = {
        "log": randn(4, seed=1) if which == "both" else torch.tensor(0.3, dtype=F64),
        "center": randn(4, seed=2),
        "shift": randn(seed=3),
        "weight": randn(4, seed=4),
    }
    if which == "both":
        outer["log"], strength = {"w": outer["log"]}, lambda x: {"w": x["log"]["w"].exp()}
    objective = learned if which in ("both", "objective") else _without_outer
    problem = problem_from(
        objective,
        lambda z, x, batch: (z["w"] ** 2).sum() + (x["weight"] ** 2).sum(),
        Proximal(strength, center),
    )
    tasks = TaskBatch(randn(3, 6, 4), None)
    kept, recomputed = systems(problem, outer, tasks, per_task=per_task)
    assert_same_products(kept, recomputed)
    used = [one is not None for one in recomputed.cross(randn(3, 4))]
    assert (
        used
        == {
            "both": [True, True, True, True],
            "strength": [True, False, False, False],
            "center": [False, True, False, False],
            "objective": [False, False, True, True],
        }[which]
    )


def _without_outer(z, x, batch):
    return 0.5 * ((batch @ z["w"] - 1.0) ** 2).mean()


def test_a_leaf_without_curvature_and_one_that_is_not_used():
    problem = problem_from(
        lambda z, x, batch: (z["a"] * x).sum() + (z["b"] ** 3).sum(),
        lambda z, x, batch: (z["a"] ** 2).sum() + (z["b"] ** 2).sum(),
        initial_inner=lambda x, batch: {k: torch.ones_like(x) for k in ("a", "b", "c")},
    )
    kept, recomputed = systems(problem, randn(3), TaskBatch(torch.zeros(2, 1, dtype=F64), None))
    assert_same_products(kept, recomputed)
    flat = problem_from(
        lambda z, x, batch: (z * x).sum(),
        lambda z, x, batch: (z**2).sum(),
        initial_inner=lambda x, batch: torch.ones_like(x),
    )
    kept, recomputed = systems(flat, randn(3), TaskBatch(torch.zeros(2, 1, dtype=F64), None))
    assert_same_products(kept, recomputed)
    assert not recomputed.pull(randn(2, 3)).any()


@pytest.mark.parametrize("tasks", [1, 3])
def test_an_equilibrium_that_returns_its_arguments(tasks):
    """Leaves themselves stand behind the slopes, not what was made of them."""
    problem = problem_from(
        None,
        lambda z, x, batch: (z["a"] ** 2).sum() + (z["b"] ** 2).sum(),
        stationarity=lambda z, x, batch: {"a": z["a"], "b": x},
        initial_inner=lambda x, batch: {"a": 2 * x, "b": 3 * x},
    )
    data = TaskBatch(torch.zeros(tasks, 1, dtype=F64), None)
    kept, recomputed = systems(problem, randn(3), data)
    assert_same_products(kept, recomputed)
    assert not recomputed.stationarity.requires_grad
    v = randn(tasks, 6)
    torch.testing.assert_close(recomputed.pull(v)[:, :3], v[:, :3], rtol=0, atol=0)


# Networks: where forward mode would be wrong in silence


def network(norm):
    modules = {
        "batch": [nn.BatchNorm1d(6, track_running_stats=False)],
        "layer": [nn.LayerNorm(6)],
        "instance": [nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()],
    }[norm]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), *modules, nn.Tanh(), nn.Linear(6, 3)).double()
        for parameter in net.parameters():
            nn.init.uniform_(parameter, -1.0, 1.0)
    return net


@pytest.mark.parametrize("stacked", [1, 3])
@pytest.mark.parametrize("exact", [False, True], ids=["native", "exact"])
@pytest.mark.parametrize("norm", ["batch", "layer", "instance"])
def test_norms_against_differences_of_the_gradient(norm, exact, stacked):
    net = network(norm)
    params, apply = stateless(exact_norms(net) if exact else net)
    problem = FewShot(apply, strength=2.0)
    labels = torch.arange(3).repeat(2).expand(stacked, 6)
    tasks = TaskBatch((randn(stacked, 6, 4, seed=5), labels), (randn(stacked, 6, 4), labels))
    kept, recomputed = systems(problem, problem.initial_outer(params), tasks)
    assert_same_products(kept, recomputed)
    flat, z, v = recomputed.flat.plain(), recomputed.z, randn(*recomputed.z.shape, seed=6)
    h = 1e-4
    by_differences = (
        8 * (flat.gradient(z + h * v) - flat.gradient(z - h * v))
        - (flat.gradient(z + 2 * h * v) - flat.gradient(z - 2 * h * v))
    ) / (12 * h)
    assert_close(recomputed.pull(v), by_differences, 1e-6)


@pytest.mark.parametrize("norm", ["batch", "layer", "instance"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_why_forward_mode_is_not_used(norm):
    """Reverse mode over forward mode needs less memory; once PyTorch mends it, think again."""
    net = network(norm).requires_grad_(False)
    x, v, weight = randn(6, 4, seed=5), randn(6, 4, seed=6), randn(6, 3, seed=7)

    def objective(x):
        return (weight * net(x)).sum()

    at = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(at), at, create_graph=True)
    (right,) = torch.autograd.grad(slope, at, v)
    (wrong,) = torch.autograd.grad(torch.func.jvp(objective, (at,), (v,))[1], at)
    assert (wrong - right).norm() > 0.01 * right.norm()


def test_a_function_that_vmap_refuses_runs_in_a_loop():
    problem = problem_from(
        lambda z, x, batch: 0.5 * ((z - x) ** 2).sum() if batch.sum() > 0 else (z * x).cosh().sum(),
        lambda z, x, batch: (z**2).sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x),
    )
    problem.stacking = "loop"
    data = torch.tensor([[1.0], [-1.0], [2.0]], dtype=F64)
    assert_same_products(*systems(problem, randn(3), TaskBatch(data, None)))


# Streams, training


def test_the_batch_of_a_stream_is_drawn_once_for_all_products():
    calls = []

    def draw(step):
        calls.append(step)
        return randn(6, 2, seed=7)

    problem = problem_from(
        lambda z, x, d: 0.5 * ((d @ z - x) ** 2).mean(),
        lambda z, x, d: (z**2).sum(),
        Proximal(lambda x: x.exp(), lambda x: x * torch.ones(2, dtype=F64)),
    )
    task = Task.stack([Task(Stream(draw))])
    kept, recomputed = systems(problem, torch.tensor(0.3, dtype=F64), task)
    assert_same_products(kept, recomputed)
    calls.clear()
    for _ in range(3):
        recomputed.pull(randn(1, 2))
    assert not calls


def test_training_passes_it_on():
    example = PROBLEMS["quadratic"].example(tasks=3)
    ends = []
    for kernels in (KEPT, RECOMPUTED):
        trainer = Trainer(
            example.problem,
            inner_solver=example.inner_solver,
            method=ImplicitCG(rtol=1e-10),
            optimizer=lambda leaves: torch.optim.SGD(leaves, lr=0.1),
            kernels=kernels,
        )
        outer = example.outer.clone()
        training = trainer.begin(outer)
        for _ in range(3):
            training.advance(example.task)
        ends.append(outer)
    assert_close(ends[1], ends[0])


# Memory


def few_shot(count, channels=64):
    params, net = stateless(conv_strided(5, channels=channels, seed=0))
    problem = FewShot(net, strength=20.0)
    images = torch.rand(count, 5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5).expand(count, 5)
    return problem, problem.initial_outer(params), TaskBatch((images, labels), (images, labels))


@pytest.mark.parametrize("count", [1, 4])
def test_less_memory_is_needed(count):
    """Measured: 0.84 of a hypergradient's peak, and 0.70 of that of products alone."""
    problem, outer, tasks = few_shot(count)
    whole, alone, between = {}, {}, {}
    for kernels in (KEPT, RECOMPUTED):

        def run(kernels=kernels):
            hypergradient(
                problem,
                outer,
                tasks,
                inner_solver=GradientDescent(0.01, 2),
                method=ImplicitCG(max_steps=3, rtol=0.0),
                engine="batched",
                kernels=kernels,
            )

        flat = FlatProblem.of(problem, Outer.of(outer), tasks, kernels=kernels)
        v = torch.ones_like(flat.start)

        def products(flat=flat, v=v):
            system = linearise(flat, flat.start)
            for _ in range(2):
                system.graph.pull(v)

        run()
        products()
        whole[kernels.products] = peak_bytes(run)
        alone[kernels.products] = peak_bytes(products)
        kept_alive = []
        between[kernels.products] = peak_saved(
            lambda flat=flat, keep=kept_alive: keep.append(linearise(flat, flat.start).graph)
        )
        del kept_alive
    assert whole["recomputed"] < 0.92 * whole["kept"]
    assert alone["recomputed"] < 0.80 * alone["kept"]
    assert between["recomputed"] < between["kept"]


def test_nothing_is_kept_between_products():
    problem, outer, tasks = few_shot(2, channels=4)
    flat = FlatProblem.of(problem, Outer.of(outer), tasks, kernels=RECOMPUTED)
    held = []

    class Held:
        def __init__(self, tensor):
            # Without its graph: an output that is saved with it would keep its node alive.
            self.tensor = tensor.detach()
            held.append(self.tensor.numel())

        def __del__(self):
            held.remove(self.tensor.numel())

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda saved: saved.tensor):
        system = linearise(flat, flat.start)
        v = torch.ones_like(flat.start)
        assert not held
        system.pull(v)
        assert not held
        system.push(v)
        assert not held
        system.cross(v)
    # The regularizer's center and strength are made once.
    assert sum(held) <= 2 * flat.n
