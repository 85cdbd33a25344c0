"""Stacked tasks are the same as each task alone: by vmap, by a loop, or refused with the cure."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_flatten

from bilevel import (
    BilevelError,
    BilevelWarning,
    ObjectiveError,
    Proximal,
    RandomnessError,
    SolveError,
    Status,
    Task,
    TaskBatch,
    hypergradient,
    problem_from,
    solve_inner,
    stateless,
)
from bilevel.solvers import (
    CG,
    LBFGS,
    ClosedForm,
    DenseExact,
    FirstOrder,
    GradientDescent,
    Implicit,
    ImplicitCG,
    NeumannSeries,
    TorchOptimizer,
    Unrolled,
)
from tests.helpers import (
    Solved,
    assert_directional,
    quadratic,
    quadratic_answer,
    quadratic_task,
    randn,
)

F64 = torch.float64


def name(value):
    return type(value).__name__


def assert_same(got, want, rtol=1e-10, atol=1e-12):
    """Two pytrees are equal to rounding: each leaf relative to its own norm."""
    pairs = zip(tree_flatten(got)[0], tree_flatten(want)[0], strict=True)
    for a, b in pairs:
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert (a - b).norm() <= rtol * b.norm() + atol, (a, b)


def assert_stack_equals_singles(problem, outer, tasks, **settings):
    """Per-task gradients, values and solutions of a list equal those of single calls."""
    stacked = hypergradient(problem, outer, tasks, reduction="none", **settings)
    for i, task in enumerate(tasks):
        alone = hypergradient(problem, outer, task, **settings)
        leaves = [leaf[i] for leaf in tree_flatten(stacked.gradient)[0]]
        assert_same(leaves, tree_flatten(alone.gradient)[0])
        assert_same(stacked.inner[i], alone.inner)
        assert_same(stacked.outer_value[i], alone.outer_value[0])
        assert_same(stacked.inner_value[i], alone.inner_value[0])
        assert stacked.status[i] == alone.status[0]
    return stacked


GD = GradientDescent(lr=0.1, max_steps=8)
CG5 = ImplicitCG(max_steps=5, rtol=0.0)


# What vmap refuses is looped


def cell_problem(kind):
    torch.manual_seed(3)
    cell = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "LSTM": nn.LSTM, "GRU": nn.GRU}[kind](2, 3)
    params, net = stateless(cell.double())

    def loss(w, batch):
        out = net(w, batch)
        out = out[0] if isinstance(out, tuple) else out
        return (out**2).sum() + out.sum()

    return problem_from(
        lambda w, x, batch: loss(w, batch), lambda w, x, batch: loss(w, batch), Proximal(2.0)
    ), params


def item_problem(kind):
    """Value-dependent Python of four kinds; each branch is a smooth function."""

    def inner(z, x, batch):
        if kind == "if":
            scale = 2.0 if batch["level"] > 0 else 0.5
        elif kind == "item":
            scale = 1.0 + abs(batch["level"].item())
        elif kind == "float":
            scale = 1.0 + abs(float(batch["level"]))
        else:
            kept = batch["data"][batch["data"] > 0]
            return ((z - x) ** 2).sum() + (kept.sum() * z).sin().sum()
        return scale * ((z - x) ** 2).sum() + (batch["data"] * z).sin().sum()

    return problem_from(inner, lambda z, x, batch: (z**2).sum(), Proximal(1.0))


def item_tasks(count=3):
    return [
        Task({"level": randn(seed=i), "data": randn(3, seed=10 + i)}, None) for i in range(count)
    ]


@pytest.mark.parametrize("method", [CG5, Unrolled()], ids=name)
@pytest.mark.parametrize("kind", ["lstm", "LSTM", "GRU"])
def test_recurrent_networks_run_in_a_loop_and_agree_with_single_tasks(kind, method):
    problem, params = cell_problem(kind)
    tasks = [Task(randn(4, 2, seed=i), randn(4, 2, seed=10 + i)) for i in range(3)]
    with pytest.warns(BilevelWarning, match="cannot be stacked by torch.vmap"):
        assert_stack_equals_singles(problem, params, tasks, inner_solver=GD, method=method)


@pytest.mark.filterwarnings("ignore::bilevel.BilevelWarning")
@pytest.mark.parametrize("method", [CG5, Unrolled()], ids=name)
def test_a_gru_cell_agrees_with_single_tasks(method):
    # Here vmap has a slow path of its own; whether it is taken or the loop is not our business.
    problem, params = cell_problem("gru")
    tasks = [Task(randn(4, 2, seed=i), randn(4, 2, seed=10 + i)) for i in range(3)]
    assert_stack_equals_singles(problem, params, tasks, inner_solver=GD, method=method)


@pytest.mark.parametrize("method", [CG5, Unrolled(), FirstOrder()], ids=name)
@pytest.mark.parametrize("kind", ["if", "item", "float", "mask"])
def test_value_dependent_objectives_run_in_a_loop_and_agree_with_single_tasks(kind, method):
    with pytest.warns(BilevelWarning, match="`inner_objective` cannot be stacked"):
        assert_stack_equals_singles(
            item_problem(kind), randn(3), item_tasks(), inner_solver=GD, method=method
        )


def test_the_loop_is_told_once_for_each_problem():
    problem = item_problem("item")
    with pytest.warns(BilevelWarning, match="cannot be stacked") as told:
        hypergradient(problem, randn(3), item_tasks(), inner_solver=GD, method=CG5)
    assert len(told) == 1
    # Warnings are errors here: the same problem says nothing more, another one does.
    hypergradient(problem, randn(3), item_tasks(4), inner_solver=GD, method=CG5)
    with pytest.warns(BilevelWarning, match="cannot be stacked"):
        hypergradient(item_problem("item"), randn(3), item_tasks(), inner_solver=GD, method=CG5)


def test_stacking_loop_says_nothing():
    problem = item_problem("item")
    problem.stacking = "loop"
    assert_stack_equals_singles(problem, randn(3), item_tasks(), inner_solver=GD, method=CG5)


def test_stacking_vmap_raises_what_vmap_refuses():
    problem = item_problem("item")
    problem.stacking = "vmap"
    with pytest.raises(RuntimeError, match="item"):
        hypergradient(problem, randn(3), item_tasks(), inner_solver=GD, method=CG5)


def test_the_other_objective_stays_stacked():
    calls = []

    def outer(z, x, batch):
        calls.append(z.shape)
        return (z**2).sum()

    problem = item_problem("item")
    problem.outer_objective = outer
    with pytest.warns(BilevelWarning, match="`inner_objective`"):
        hypergradient(problem, randn(3), item_tasks(), inner_solver=GD, method=CG5)
    # Twice in the first look, once in the linearisation: never once for each of three tasks.
    assert len(calls) == 3


def test_an_error_of_the_objective_itself_is_not_hidden_by_the_loop():
    problem = problem_from(
        lambda z, x, batch: (batch @ z).sum(), lambda z, x, batch: z.sum(), Proximal(1.0)
    )
    tasks = [Task(randn(2, 5, seed=i)) for i in range(3)]
    with pytest.raises(RuntimeError, match=r"size mismatch|shape"):
        hypergradient(problem, randn(3), tasks, inner_solver=GD, method=CG5)


@pytest.mark.parametrize("method", [CG5, DenseExact(), Unrolled(), FirstOrder()], ids=name)
def test_loop_and_vmap_agree(method):
    results = []
    for mode in ("loop", "vmap"):
        problem = problem_from(
            lambda z, x, batch: torch.log1p((batch @ z) ** 2).sum() + (z * x).sum(),
            lambda z, x, batch: (z**3).sum() + (x * z).sum(),
            Proximal(0.5),
        )
        problem.stacking = mode
        tasks = [Task(randn(4, 3, seed=i), weight=1.0 + i) for i in range(3)]
        results.append(hypergradient(problem, randn(3), tasks, inner_solver=GD, method=method))
    assert_same(results[0].gradient, results[1].gradient)


# Attention


class Attention(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        if kind == "functional":
            self.qkv = nn.Linear(2, 6)
        else:
            self.attention = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, x):
        if self.kind == "functional":
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return F.scaled_dot_product_attention(q, k, v)
        return self.attention(x, x, x, need_weights=False)[0]


def attention_problem(kind):
    torch.manual_seed(5)
    params, net = stateless(Attention(kind).double())

    def loss(w, batch):
        return ((net(w, batch["x"]) - batch["y"]) ** 2).mean()

    problem = problem_from(
        lambda w, x, batch: loss(w, batch), lambda w, x, batch: loss(w, batch), Proximal(2.0)
    )
    return problem, params


def attention_task(i):
    return Task(
        *(
            {"x": randn(2, 3, 2, seed=40 + 4 * i + j), "y": randn(2, 3, 2, seed=80 + 4 * i + j)}
            for j in (0, 1)
        )
    )


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("kind", ["functional", "module"])
def test_attention_gets_a_kernel_with_second_derivatives(kind, tasks):
    problem, params = attention_problem(kind)
    data = [attention_task(i) for i in range(tasks)]
    result = hypergradient(
        problem,
        params,
        data,
        inner_solver=LBFGS(tol=1e-11),
        method=ImplicitCG(rtol=1e-12),
    )
    assert result.ok, result.summary()
    # The reference needs the math kernel too.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert_directional(result.gradient, Solved(problem, params, data), params, rtol=1e-6)


@pytest.mark.parametrize("kind", ["functional", "module"])
def test_attention_can_be_unrolled(kind):
    problem, params = attention_problem(kind)
    data = [attention_task(i) for i in range(2)]
    assert_stack_equals_singles(
        problem, params, data, inner_solver=GradientDescent(0.1, 3), method=Unrolled()
    )


# Randomness


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_a_dropout_module_is_refused_with_the_cure(rate):
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(rate))
    with pytest.raises(RandomnessError, match=r"module\.1.*eval\(\)"):
        stateless(module)


@pytest.mark.parametrize(
    "module",
    [
        nn.Dropout2d(0.1),
        nn.AlphaDropout(0.1),
        nn.LSTM(2, 2, num_layers=2, dropout=0.2),
        nn.MultiheadAttention(2, 1, dropout=0.1),
        nn.TransformerEncoderLayer(2, 1, 4),
    ],
    ids=name,
)
def test_every_layer_that_drops_entries_is_refused(module):
    with pytest.raises(RandomnessError, match="rate to 0"):
        stateless(nn.Sequential(nn.Linear(2, 2), module))


def test_dropout_without_effect_is_taken():
    stateless(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)))
    stateless(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval())


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(2), nn.InstanceNorm1d(2, track_running_stats=True)], ids=name
)
def test_a_norm_that_tracks_statistics_is_refused_with_the_cure(norm):
    with pytest.raises(ObjectiveError, match=r"module\.1.*track_running_stats=False.*eval\(\)"):
        stateless(nn.Sequential(nn.Linear(2, 2), norm))
    stateless(nn.Sequential(nn.Linear(2, 2), norm).eval())


RANDOM = {
    "dropout": lambda z: F.dropout(z, 0.5, training=True),
    "normal": lambda z: z + torch.randn(3, dtype=F64),
    "like": lambda z: z + torch.rand_like(z),
    "permutation": lambda z: z * torch.randperm(3),
}


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("mode", ["auto", "loop"])
@pytest.mark.parametrize("where", ["inner", "outer"])
def test_random_numbers_in_an_objective_are_refused(kind, tasks, mode, where):
    def noisy(z, x, batch):
        return (RANDOM[kind](z) ** 2).sum()

    def plain(z, x, batch):
        return (z**2).sum()

    problem = problem_from(
        noisy if where == "inner" else plain, noisy if where == "outer" else plain, Proximal(1.0)
    )
    problem.stacking = mode
    data = [Task(randn(2, seed=i), randn(2, seed=i)) for i in range(tasks)]
    with pytest.raises(RandomnessError, match=f"{where}_objective.*in the batch"):
        hypergradient(problem, randn(3), data, inner_solver=GD, method=CG5)


@pytest.mark.parametrize("tasks", [1, 3])
def test_the_first_look_leaves_the_random_state_alone(tasks):
    before = torch.get_rng_state()
    data = [Task(randn(2, seed=i)) for i in range(tasks)]
    problem = problem_from(
        lambda z, x, batch: (z**2).sum(), lambda z, x, batch: z.sum(), Proximal(1.0)
    )
    hypergradient(problem, randn(3), data, inner_solver=GD, method=CG5)
    assert torch.equal(before, torch.get_rng_state())


# Batched equals looped, whatever the conditioning

CONDITIONS = [2.0, 30.0, 1e3, 1e4]
CONDITIONED = [
    quadratic_task(5, condition=condition, seed=i) for i, condition in enumerate(CONDITIONS)
]
METHODS = [
    ImplicitCG(rtol=1e-10),
    ImplicitCG(max_steps=3, rtol=0.0),
    ImplicitCG(damping=0.01),
    DenseExact(),
    NeumannSeries(terms=40),
    NeumannSeries(terms=40, scale=0.7),
    NeumannSeries(terms=500, rtol=1e-3),
    Implicit(CG(max_steps=4)),
    Unrolled(),
    Unrolled(truncate=4),
    Unrolled(checkpoint=True),
    FirstOrder(),
]
SOLVERS = [
    GradientDescent(lr=0.9, max_steps=15),
    GradientDescent(lr=0.9, max_steps=300, tol=1e-3),
    GradientDescent(lr=0.5, max_steps=15, momentum=0.8),
    GradientDescent(lr=0.5, max_steps=15, momentum=0.8, nesterov=True),
    TorchOptimizer("Adam", max_steps=15, lr=0.1),
    TorchOptimizer("SGD", max_steps=150, lr=0.5, tol=1e-2),
    LBFGS(max_steps=4, tol=None),
    TorchOptimizer("LBFGS", max_steps=4),
    ClosedForm(lambda x, batch: torch.linalg.solve(batch["A"], batch["B"] @ x)),
]


def direct_quadratic():
    """`quadratic` with a start that depends on the outer variable, so that no method is blind."""
    problem = quadratic()
    return problem_from(
        problem.inner_objective,
        problem.outer_objective,
        initial_inner=lambda x, batch: 0.1 * x + batch["b"],
    )


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_batched_equals_looped_for_every_method(method):
    assert_stack_equals_singles(
        direct_quadratic(), randn(5, seed=7), CONDITIONED, inner_solver=SOLVERS[0], method=method
    )


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: repr(s).split(" at 0x")[0][:60])
def test_batched_equals_looped_for_every_inner_solver(solver):
    result = assert_stack_equals_singles(
        direct_quadratic(),
        randn(5, seed=7),
        CONDITIONED,
        inner_solver=solver,
        method=ImplicitCG(max_steps=20),
    )
    alone = [
        solve_inner(direct_quadratic(), randn(5, seed=7), task, inner_solver=solver)
        for task in CONDITIONED
    ]
    assert result.diagnostics.inner.steps.tolist() == [one.steps.item() for one in alone]


def test_batched_equals_looped_for_lbfgs_that_stops_by_itself():
    # A residual of tol leaves an error of tol · κ in z: well-conditioned tasks compare to 1e-10.
    assert_stack_equals_singles(
        direct_quadratic(),
        randn(5, seed=7),
        CONDITIONED[:2],
        inner_solver=LBFGS(tol=1e-11),
        method=DenseExact(),
    )


@pytest.mark.parametrize("solver", SOLVERS[:6], ids=repr)
def test_batched_equals_looped_for_every_unrolled_solver(solver):
    assert_stack_equals_singles(
        direct_quadratic(), randn(5, seed=7), CONDITIONED, inner_solver=solver, method=Unrolled()
    )


@pytest.mark.parametrize("method", [ImplicitCG(rtol=1e-12, max_steps=200), DenseExact()], ids=name)
def test_every_task_meets_its_own_tolerance(method):
    x = randn(5, seed=7)
    result = hypergradient(
        quadratic(), x, CONDITIONED, inner_solver=SOLVERS[-1], method=method, reduction="none"
    )
    assert result.ok, result.summary()
    for got, task in zip(result.gradient, CONDITIONED, strict=True):
        want = quadratic_answer(task, x)
        assert (got - want).norm() <= 1e-7 * want.norm()


def test_a_tolerance_is_relative_to_the_task_and_not_to_the_batch():
    # The second task's right-hand side is 10⁸ times smaller; it must be solved as well as alone.
    def outer(z, x, batch):
        return batch["scale"] * (z - batch["target"]).sum()

    base = quadratic()
    problem = problem_from(
        base.inner_objective, outer, initial_inner=lambda x, batch: torch.zeros_like(batch["b"])
    )
    tasks = []
    for scale in (1.0, 1e-8):
        task = quadratic_task(5, condition=30.0)
        data = {**task.outer_batch, "scale": torch.tensor(scale, dtype=F64)}
        tasks.append(Task(task.inner_batch, data))
    result = hypergradient(
        problem,
        randn(5),
        tasks,
        inner_solver=LBFGS(),
        method=ImplicitCG(rtol=1e-3),
        reduction="none",
    )
    torch.testing.assert_close(result.gradient[1], 1e-8 * result.gradient[0], rtol=1e-9, atol=0.0)
    assert result.diagnostics.linear.steps[0] == result.diagnostics.linear.steps[1]


# A failing task does not disturb its neighbours


def spoiled(kind):
    """Four tasks; the one at position 2 fails."""
    tasks = [quadratic_task(3, condition=4.0, seed=i, weight=1.0 + i) for i in range(4)]
    bad = tasks[2]
    data, target = dict(bad.inner_batch), dict(bad.outer_batch)
    if kind == "nan data":
        data["B"] = data["B"] * float("nan")
    elif kind == "infinite data":
        data["B"] = data["B"] * float("inf")
    elif kind == "nan target":
        target["target"] = target["target"] * float("nan")
    elif kind == "diverging":
        data["A"] = data["A"] * 50.0
    tasks[2] = Task(data, target, weight=3.0)
    return tasks


FAILURES = {
    "nan data": {Status.NON_FINITE},
    "infinite data": {Status.NON_FINITE},
    "nan target": {Status.NON_FINITE},
    "diverging": {Status.DIVERGED, Status.NON_FINITE},
}


@pytest.mark.parametrize(
    "method",
    [ImplicitCG(rtol=1e-10), DenseExact(), NeumannSeries(50), Unrolled(), FirstOrder()],
    ids=name,
)
@pytest.mark.parametrize("kind", FAILURES)
def test_a_failing_task_is_left_out_and_its_neighbours_are_as_alone(method, kind):
    tasks = spoiled(kind)
    settings = {"inner_solver": GradientDescent(lr=0.9, max_steps=25), "method": method}
    x = randn(3, seed=7)
    result = hypergradient(direct_quadratic(), x, tasks, **settings)
    assert result.status[2] in FAILURES[kind]
    assert result.diagnostics.failed == (2,)
    assert not result.ok
    good = [task for i, task in enumerate(tasks) if i != 2]
    want = hypergradient(direct_quadratic(), x, good, **settings)
    assert want.ok, want.summary()
    assert_same(result.gradient, want.gradient)
    for i, j in ((0, 0), (1, 1), (3, 2)):
        assert_same(result.inner[i], want.inner[j])
        assert_same(result.outer_value[i], want.outer_value[j])
        assert result.status[i] == want.status[j]


@pytest.mark.parametrize("kind", FAILURES)
def test_per_task_gradients_beside_a_failing_task_are_as_alone(kind):
    tasks = spoiled(kind)
    settings = {
        "inner_solver": GradientDescent(lr=0.9, max_steps=40),
        "method": ImplicitCG(),
        "reduction": "none",
    }
    result = hypergradient(direct_quadratic(), randn(3), tasks, **settings)
    for i in (0, 1, 3):
        alone = hypergradient(direct_quadratic(), randn(3), [tasks[i]], **settings)
        assert_same(result.gradient[i], alone.gradient[0])


@pytest.mark.parametrize("batched", [False, True], ids=["list", "stack"])
def test_when_every_task_fails_nothing_is_returned(batched):
    tasks = [spoiled("nan data")[2], spoiled("nan target")[2]]
    x = randn(3).requires_grad_()
    before = x.detach().clone()
    with pytest.raises(SolveError, match="tasks 0, 1: NON_FINITE"):
        hypergradient(
            direct_quadratic(),
            x,
            Task.stack(tasks) if batched else tasks,
            inner_solver=GD,
            method=CG5,
        )
    assert torch.equal(x, before)
    assert x.grad is None


def test_a_failing_group_of_another_shape_is_left_out():
    good = [quadratic_task(3, condition=4.0, seed=i) for i in range(2)]
    bad = quadratic_task(4, 3, condition=4.0)
    data = {**bad.inner_batch, "B": bad.inner_batch["B"] * float("nan")}
    tasks = [good[0], Task(data, bad.outer_batch), good[1]]
    settings = {"inner_solver": GradientDescent(0.9, 50), "method": ImplicitCG()}
    result = hypergradient(quadratic(), randn(3), tasks, **settings)
    assert result.diagnostics.failed == (1,)
    assert_same(result.gradient, hypergradient(quadratic(), randn(3), good, **settings).gradient)


def test_a_task_recovers_from_an_earlier_failure():
    # The state of a task that diverged must not poison the next call.
    tasks = spoiled("diverging")
    problem, x = direct_quadratic(), randn(3)
    first = hypergradient(
        problem, x, tasks, inner_solver=GradientDescent(0.9, 250), method=ImplicitCG()
    )
    assert first.diagnostics.failed == (2,)
    careful = {"inner_solver": GradientDescent(0.02, 200), "method": ImplicitCG()}
    second = hypergradient(problem, x, tasks, state=first.state, **careful)
    assert second.diagnostics.failed == ()
    assert second.gradient.isfinite().all()


def test_a_weight_of_zero_leaves_a_task_out_of_the_mean():
    tasks = [
        quadratic_task(3, condition=4.0, seed=i, weight=w) for i, w in enumerate([1.0, 0.0, 2.0])
    ]
    settings = {"inner_solver": GradientDescent(0.9, 30), "method": CG5}
    result = hypergradient(quadratic(), randn(3), tasks, **settings)
    want = hypergradient(quadratic(), randn(3), [tasks[0], tasks[2]], **settings)
    assert_same(result.gradient, want.gradient)
    assert len(result.status) == 3


def test_weights_that_are_all_zero_are_an_error():
    tasks = [quadratic_task(3, condition=4.0, seed=i, weight=0.0) for i in range(2)]
    with pytest.raises(BilevelError, match="zero"):
        hypergradient(quadratic(), randn(3), tasks, inner_solver=GD, method=CG5)


# Lists of tasks


def mixed_tasks():
    sizes = [(3, 2.0), (4, 1.0), (3, 0.5), (5, 3.0), (4, 1.5)]
    return [
        quadratic_task(n, 2, condition=2.0, seed=i, weight=w, key=f"task {i}")
        for i, (n, w) in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    "method", [ImplicitCG(rtol=1e-12), DenseExact(), NeumannSeries(60), Unrolled()], ids=name
)
def test_tasks_of_different_shapes_give_the_weighted_mean_in_order(method):
    tasks, x = mixed_tasks(), randn(2, seed=1)
    settings = {"inner_solver": GradientDescent(0.9, 45), "method": method}
    result = hypergradient(quadratic(), x, tasks, **settings)
    answers = [quadratic_answer(task, x) for task in tasks]
    weights = [task.weight for task in tasks]
    want = sum(w * a for w, a in zip(weights, answers, strict=True)) / sum(weights)
    assert_same(result.gradient, want, rtol=1e-8)
    assert [len(z) for z in result.inner] == [3, 4, 3, 5, 4]
    each = hypergradient(quadratic(), x, tasks, reduction="none", **settings)
    assert_same(each.gradient, torch.stack(answers), rtol=1e-8)


def test_per_task_gradients_do_not_depend_on_weights():
    x = randn(2, seed=1)
    settings = {"inner_solver": GradientDescent(0.9, 30), "method": CG5, "reduction": "none"}
    weighted = hypergradient(quadratic(), x, mixed_tasks(), **settings)
    plain = [Task(t.inner_batch, t.outer_batch) for t in mixed_tasks()]
    assert_same(weighted.gradient, hypergradient(quadratic(), x, plain, **settings).gradient)


def test_a_list_a_stack_and_single_tasks_give_the_same_mean():
    tasks = [quadratic_task(3, condition=5.0, seed=i, weight=1.0 + i) for i in range(3)]
    x = randn(3)
    settings = {"inner_solver": GradientDescent(0.9, 12), "method": CG5}
    listed = hypergradient(quadratic(), x, tasks, **settings).gradient
    stacked = hypergradient(quadratic(), x, Task.stack(tasks), **settings).gradient
    singles = [hypergradient(quadratic(), x, task, **settings).gradient for task in tasks]
    mean = sum(t.weight * g for t, g in zip(tasks, singles, strict=True)) / 6
    assert_same(listed, stacked)
    assert_same(listed, mean)


@pytest.mark.parametrize("count", [1, 3])
def test_stacked_tasks_without_data_are_taken(count):
    problem = problem_from(
        lambda z, x, batch: 0.5 * (z**2).sum(), lambda z, x, batch: z.sum(), Proximal(1.0)
    )
    x = torch.ones(2, dtype=F64)
    settings = {"inner_solver": GradientDescent(0.5, 3), "method": CG5}
    for tasks in (TaskBatch(count=count), [Task()] * count):
        result = hypergradient(problem, x, tasks, **settings)
        assert len(result.status) == count
        assert_same(result.gradient, torch.full((2,), 0.5, dtype=F64))


@pytest.mark.parametrize("side", ["inner", "outer"])
def test_stacked_tasks_with_data_on_one_side_only_are_taken(side):
    problem = problem_from(
        lambda z, x, batch: 0.5 * ((z if batch is None else z - batch) ** 2).sum(),
        lambda z, x, batch: ((z if batch is None else z - batch) ** 2).sum(),
        Proximal(1.0),
    )
    tasks = [Task(**{f"{side}_batch": randn(2, seed=i)}) for i in range(3)]
    assert_stack_equals_singles(problem, randn(2), tasks, inner_solver=GD, method=CG5)


def test_inner_results_look_like_the_task_they_were_computed_for():
    problem = problem_from(
        lambda z, x, batch: (z["a"] ** 2).sum() * batch.sum() ** 2 + z["b"] ** 2,
        lambda z, x, batch: z["a"].sum() + z["b"],
        Proximal(1.0),
    )
    x = {"a": randn(2), "b": torch.tensor(1.0, dtype=F64)}
    tasks = [Task(randn(2, seed=i)) for i in range(3)]
    settings = {"inner_solver": GD, "method": CG5}
    single = hypergradient(problem, x, tasks[0], **settings).inner
    listed = hypergradient(problem, x, tasks, **settings).inner
    stacked = hypergradient(problem, x, Task.stack(tasks), **settings).inner
    assert single["a"].shape == (2,)
    assert single["b"].shape == ()
    assert isinstance(listed, list)
    assert stacked["a"].shape == (3, 2)
    assert stacked["b"].shape == (3,)
    for i in range(3):
        assert_same(listed[i], {key: leaf[i] for key, leaf in stacked.items()})
    assert_same(single, listed[0])


def test_warm_starts_are_those_of_the_same_tasks():
    tasks, x = mixed_tasks(), randn(2)
    settings = {"inner_solver": GradientDescent(0.9, 20), "method": ImplicitCG(rtol=1e-8)}
    first = hypergradient(quadratic(), x, tasks, **settings)
    second = hypergradient(quadratic(), x, tasks, state=first.state, **settings)
    # Twenty steps after twenty steps are forty steps.
    forty = {**settings, "inner_solver": GradientDescent(0.9, 40)}
    want = hypergradient(quadratic(), x, tasks, **forty)
    for a, b in zip(second.inner, want.inner, strict=True):
        assert_same(a, b)
    assert (second.diagnostics.linear.steps <= first.diagnostics.linear.steps).all()


def test_a_given_start_of_a_list_is_that_of_each_task():
    tasks, x = mixed_tasks(), randn(2)
    solved = [torch.linalg.solve(t.inner_batch["A"], t.inner_batch["B"] @ x) for t in tasks]
    result = hypergradient(
        quadratic(), x, tasks, inner_solver=None, inner=solved, method=DenseExact()
    )
    for a, b in zip(result.inner, solved, strict=True):
        assert torch.equal(a, b)
    weights = [task.weight for task in tasks]
    answers = [quadratic_answer(task, x) for task in tasks]
    want = sum(w * a for w, a in zip(weights, answers, strict=True)) / sum(weights)
    assert_same(result.gradient, want, rtol=1e-9)


def test_metrics_are_in_the_order_of_the_tasks():
    base = quadratic()
    problem = problem_from(
        base.inner_objective,
        base.outer_objective,
        initial_inner=lambda x, batch: torch.zeros_like(batch["b"]),
        metrics=lambda z, x, batch: {"first": batch["target"][0], "n": z.sum() * 0 + len(z)},
    )
    tasks = mixed_tasks()
    result = hypergradient(problem, randn(2), tasks, inner_solver=GD, method=CG5)
    assert result.metrics["n"].tolist() == [3, 4, 3, 5, 4]
    want = torch.stack([task.outer_batch["target"][0] for task in tasks])
    assert torch.equal(result.metrics["first"], want)


# Properties


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    logs=st.lists(st.floats(0.1, 4.0), min_size=4, max_size=4),
    seed=st.integers(0, 10**6),
)
def test_random_quadratics_match_dense_algebra(sizes, logs, seed):
    tasks = [
        quadratic_task(n, 3, condition=10**log, seed=seed + i, weight=0.5 + i)
        for i, (n, log) in enumerate(zip(sizes, logs, strict=False))
    ]
    x = randn(3, seed=seed)
    result = hypergradient(
        quadratic(),
        x,
        tasks,
        inner_solver=ClosedForm(lambda x, b: torch.linalg.solve(b["A"], b["B"] @ x)),
        method=ImplicitCG(max_steps=400, rtol=1e-12),
        reduction="none",
    )
    assert result.ok, result.summary()
    for got, task in zip(result.gradient, tasks, strict=True):
        want = quadratic_answer(task, x)
        assert (got - want).norm() <= 1e-8 * max(want.norm(), 1.0)


SHAPES = st.lists(st.integers(1, 3), max_size=2).map(tuple)
TREES = st.recursive(
    SHAPES.map(lambda shape: ("leaf", shape)),
    lambda children: st.one_of(
        st.lists(children, min_size=1, max_size=3).map(lambda c: ("list", c)),
        st.lists(children, min_size=1, max_size=2).map(lambda c: ("tuple", c)),
        st.dictionaries(st.sampled_from("abc"), children, min_size=1).map(lambda c: ("dict", c)),
    ),
    max_leaves=5,
)


def grow(tree, counter):
    kind, value = tree
    if kind == "leaf":
        counter.append(0)
        return randn(*value, seed=len(counter))
    if kind == "dict":
        return {key: grow(child, counter) for key, child in value.items()}
    children = [grow(child, counter) for child in value]
    return children if kind == "list" else tuple(children)


@settings(max_examples=20)
@given(tree=TREES, tasks=st.integers(1, 3))
@pytest.mark.parametrize("method", [ImplicitCG(rtol=1e-13), Unrolled()], ids=name)
def test_any_pytree_of_outer_and_inner_variables_gets_its_exact_gradient(method, tree, tasks):
    # g = Σ ½ a z², r = ½ (z − x)², f = Σ z²: z = x / (1 + a), dF/dx = 2x / (1 + a)², leaf by leaf.
    x = grow(tree, [])

    def total(function, tree):
        return sum(function(leaf).sum() for leaf in tree_flatten(tree)[0])

    problem = problem_from(
        lambda z, x, batch: 0.5 * batch * total(torch.square, z),
        lambda z, x, batch: total(torch.square, z),
        Proximal(1.0),
    )
    scales = [0.5, 1.0, 2.0][:tasks]
    data = [Task(torch.tensor(a, dtype=F64)) for a in scales]
    result = hypergradient(problem, x, data, inner_solver=GradientDescent(0.44, 25), method=method)
    assert tree_flatten(result.gradient)[1] == tree_flatten(x)[1]
    factor = sum(2 / (1 + a) ** 2 for a in scales) / tasks
    for got, leaf in zip(tree_flatten(result.gradient)[0], tree_flatten(x)[0], strict=True):
        assert got.shape == leaf.shape
        torch.testing.assert_close(got, factor * leaf, rtol=1e-10, atol=1e-12)
