"""Stacked, in chunks or one after the other: the same results."""

import pytest
import torch

from bilevel import (
    DependenceError,
    Proximal,
    SolveError,
    TaskBatch,
    Trainer,
    hypergradient,
    problem_from,
    stateless,
)
from bilevel.memory import peak_bytes
from bilevel.problems import FewShot, Quadratic, conv_strided
from bilevel.pytree import tree_leaves
from bilevel.registry import METHODS, PROBLEMS
from bilevel.solvers import GradientDescent, ImplicitCG
from tests.helpers import quadratic, quadratic_task, randn
from tests.test_contract import BIASED, exact_settings, fits

F64 = torch.float64
ENGINES = [{"engine": "loop"}, {"engine": "batched", "task_chunk": 2}, {"engine": "auto"}]


def agree(found, wanted):
    close = {"rtol": 1e-10, "atol": 1e-10}
    for a, b in (
        (found.gradient, wanted.gradient),
        (found.inner, wanted.inner),
        (found.metrics, wanted.metrics),
    ):
        for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
            torch.testing.assert_close(x, y, **close)
    torch.testing.assert_close(found.outer_value, wanted.outer_value, **close)
    torch.testing.assert_close(found.inner_value, wanted.inner_value, equal_nan=True, **close)
    assert found.status == wanted.status
    for a, b in zip(found.state.inner, wanted.state.inner, strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.filterwarnings("ignore::bilevel.BilevelWarning")
@pytest.mark.parametrize("how", ENGINES[:2], ids=str)  # "auto" is one of the others
@pytest.mark.parametrize("method_name", [*METHODS])
@pytest.mark.parametrize("problem_name", list(PROBLEMS))
def test_every_method_gives_the_same_on_every_problem(problem_name, method_name, how):
    example = PROBLEMS[problem_name].example(tasks=3)
    if method_name in BIASED:
        method, solver = METHODS[method_name](), example.inner_solver
    else:
        method, solver = exact_settings(method_name, example, F64)
    if not fits(method, example.problem):
        pytest.skip("the method needs more structure than the problem promises")

    def run(**engine):
        return hypergradient(
            example.problem,
            example.outer,
            example.task,
            inner_solver=solver,
            method=method,
            **engine,
        )

    try:
        wanted = run(engine="batched")
    except DependenceError:
        pytest.skip("the first-order gradient of this problem is zero")
    agree(run(**how), wanted)


@pytest.mark.parametrize("how", ENGINES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_lists_weights_starts_and_warm_starts_keep_their_order(how, reduction):
    sizes = (3, 2, 3, 3, 2)
    tasks = [quadratic_task(n, m=3, seed=i, weight=1.0 + i) for i, n in enumerate(sizes)]
    starts = [randn(n, seed=10 + i) for i, n in enumerate(sizes)]
    settings = {"inner_solver": GradientDescent(0.5, 4), "method": ImplicitCG(rtol=1e-12)}

    def run(state=None, **engine):
        return hypergradient(
            quadratic(), randn(3), tasks, inner=starts, state=state, reduction=reduction,
            **settings, **engine,
        )  # fmt: skip

    wanted, found = run(engine="batched"), run(**how)
    agree(found, wanted)
    # A state is the same whatever ran, and serves any other way.
    assert [x.shape for x in found.state.adjoint] == [x.shape for x in wanted.state.adjoint]
    agree(run(found.state, engine="batched"), run(wanted.state, **how))


def failing(poisoned):
    data = torch.ones(5, 2, dtype=F64)
    data[poisoned] = float("nan")
    problem = problem_from(
        lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        lambda z, x, batch: ((z - 1.0) ** 2).sum(),
        Proximal(1.0),
    )
    return problem, TaskBatch(data, data)


@pytest.mark.parametrize("how", ENGINES, ids=str)
def test_failed_tasks_leave_the_mean(how):
    problem, tasks = failing([0, 3])
    settings = {"inner_solver": GradientDescent(0.5, 5), "method": ImplicitCG()}
    x = torch.zeros(2, dtype=F64)
    wanted = hypergradient(problem, x, tasks, engine="batched", **settings)
    found = hypergradient(problem, x, tasks, **how, **settings)
    assert found.diagnostics.failed == wanted.diagnostics.failed == (0, 3)
    torch.testing.assert_close(found.gradient, wanted.gradient, rtol=1e-12, atol=0)
    problem, tasks = failing(slice(None))
    with pytest.raises(SolveError, match="no task has a usable hypergradient"):
        hypergradient(problem, x, tasks, **how, **settings)


def test_the_engine_is_told_and_remembered():
    example = Quadratic.example(tasks=4)
    settings = {"inner_solver": example.inner_solver, "method": ImplicitCG()}

    def engine(**how):
        found = hypergradient(example.problem, example.outer, example.task, **how, **settings)
        return found.diagnostics.engine

    assert engine(engine="loop") == ("loop",)
    assert engine(engine="batched") == engine(engine="batched", task_chunk=3) == ("batched",)
    remembered = example.problem._stacking.one_by_one
    assert not remembered
    first = engine(engine="auto")
    assert len(remembered) == 1
    (key,) = remembered
    # What was measured holds until someone says otherwise.
    remembered[key] = first != ("loop",)
    assert engine(engine="auto") != first
    assert engine() == ("batched",)


def test_a_training_keeps_its_engine_when_resumed():
    example = Quadratic.example(tasks=3)
    trainer = Trainer(
        example.problem,
        inner_solver=example.inner_solver,
        method=ImplicitCG(),
        optimizer=lambda leaves: torch.optim.SGD(leaves, lr=0.1),
        engine="auto",
    )
    outer = example.outer.clone()
    training = trainer.begin(outer)
    training.advance(example.task)
    kept = training.state_dict()["engine"]
    assert kept in ("loop", "batched")
    other = "loop" if kept == "batched" else "batched"
    state = {**training.state_dict(), "engine": other}
    resumed = trainer.begin(example.outer.clone())
    resumed.load_state_dict(state)
    _, result = resumed.advance(example.task)
    assert result.diagnostics.engine == (other,)


def test_chunks_bound_memory():
    params, net = stateless(conv_strided(3, channels=4, size=14, seed=0))
    problem = FewShot(net, strength=20.0)
    images = torch.rand(8, 6, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(3).repeat(2).expand(8, 6)
    tasks = TaskBatch((images, labels), (images, labels))

    def peak(**how):
        def run():
            hypergradient(
                problem, params, tasks, inner_solver=GradientDescent(0.01, 3), method=ImplicitCG(),
                **how,
            )  # fmt: skip

        run()
        return peak_bytes(run)

    whole, half, single = (peak(engine="batched", task_chunk=n) for n in (8, 4, 1))
    assert single < 0.35 * whole
    assert half < 0.75 * whole


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"engine": "fast"}, "`engine` is 'fast'; pass one of 'auto', 'batched', 'loop'"),
        ({"task_chunk": 0}, "`task_chunk` is 0; stack at least one task"),
        ({"engine": "loop", "task_chunk": 2}, "engine='loop' takes tasks one by one"),
    ],
)
def test_what_is_no_engine_is_refused(how, message):
    example = Quadratic.example(tasks=2)
    with pytest.raises(ValueError, match=message):
        hypergradient(
            example.problem,
            example.outer,
            example.task,
            inner_solver=example.inner_solver,
            method=ImplicitCG(),
            **how,
        )


def test_a_part_of_stacked_tasks_shares_their_memory():
    batch = TaskBatch(torch.arange(6.0).view(3, 2), None, keys=("a", "b", "c"))
    part = batch.part(1, 3)
    assert part.keys == ("b", "c")
    assert part.inner_batch.data_ptr() == batch.inner_batch[1:].data_ptr()
    assert [task.key for task in part.unstack()] == ["b", "c"]


def test_what_is_remembered_is_not_computed_again():
    calls = []

    def start(x, batch):
        calls.append(None)
        return torch.zeros_like(x)

    problem = problem_from(
        lambda z, x, batch: 0.5 * ((z - batch * x) ** 2).sum(),
        lambda z, x, batch: ((z - 1.0) ** 2).sum(),
        initial_inner=start,
    )
    data = torch.ones(3, 2, dtype=F64)
    settings = {"inner_solver": GradientDescent(0.5, 3), "method": ImplicitCG()}

    def count(engine):
        calls.clear()
        hypergradient(
            problem, torch.ones(2, dtype=F64), TaskBatch(data, data), engine=engine, **settings
        )
        return len(calls)

    count("auto")
    (key,) = problem._stacking.one_by_one
    problem._stacking.one_by_one[key] = False
    assert count("auto") == count("batched")
