"""The outer loop."""

from __future__ import annotations

import itertools

import pytest
import torch

from bilevel import Proximal, SolveError, Task, TaskBatch, Trainer, problem_from
from bilevel.solvers import GradientDescent, ImplicitCG

F64 = torch.float64


def half_distance(z, x, batch):
    return 0.5 * ((z - batch) ** 2).sum()


def trainer(**changes):
    settings = {
        "problem": problem_from(half_distance, half_distance, Proximal(1.0)),
        "inner_solver": GradientDescent(lr=0.5, max_steps=1),
        "method": ImplicitCG(),
        "optimizer": lambda params: torch.optim.SGD(params, lr=2.0),
    }
    settings.update(changes)
    return Trainer(settings.pop("problem"), **settings)


def task(inner=0.0, outer=1.0):
    return Task(torch.full((2,), inner, dtype=F64), torch.full((2,), outer, dtype=F64))


def test_finds_the_outer_solution_in_place():
    # z = (x + 0) / 2, f = ½ (z − 1)²: the best x is 2.
    x = torch.zeros(2, dtype=F64)
    records = trainer().fit(x, task(), 40)
    torch.testing.assert_close(x, torch.full((2,), 2.0, dtype=F64), rtol=0, atol=1e-5)
    assert [record.step for record in records] == list(range(40))
    assert records[-1].outer_value < 1e-9 < records[0].outer_value
    assert records[0].tasks == 1
    assert records[0].failed == 0
    assert records[0].gradient_norm == pytest.approx(0.5 * 2**0.5)


@pytest.mark.parametrize("kind", ["function", "iterator", "fixed"])
def test_tasks_come_from_a_function_an_iterator_or_stay(kind):
    tasks = {
        "function": lambda step: task(outer=float(step)),
        "iterator": (task(outer=float(step)) for step in itertools.count()),
        "fixed": TaskBatch(torch.zeros(3, 2, dtype=F64), torch.ones(3, 2, dtype=F64)),
    }[kind]
    records = trainer().fit(torch.zeros(2, dtype=F64), tasks, 3)
    assert len(records) == 3
    if kind != "fixed":
        assert records[0].outer_value == 0.0
        assert records[1].outer_value == pytest.approx(1.0)


def test_an_iterator_that_ends_is_named():
    with pytest.raises(ValueError, match="`tasks` ended before step 1"):
        trainer().fit(torch.zeros(2, dtype=F64), iter([task()]), 2)


def test_projection_holds_bounds():
    x = torch.zeros(2, dtype=F64)
    trainer(project=lambda outer: outer.clamp_(max=0.5)).fit(x, task(), 20)
    assert (x == 0.5).all()


def test_leaves_that_the_optimizer_leaves_alone_do_not_count_when_clipping():
    problem = problem_from(
        lambda z, x, batch: 0.5 * (z**2).sum(),
        lambda z, x, batch: ((z - 1.0) ** 2).sum() + 100.0 * x["fixed"].sum(),
        Proximal(1.0, center=lambda x: x["moved"]),
    )
    ends = []
    for clip in (1e6, 10.0, 0.1):
        outer = {"fixed": torch.zeros(2, dtype=F64), "moved": torch.zeros(2, dtype=F64)}
        one = trainer(
            problem=problem,
            clip=clip,
            optimizer=lambda leaves: torch.optim.SGD(leaves[1:], lr=1.0),
        )
        one.fit(outer, task(), 1)
        assert (outer["fixed"] == 0.0).all()
        assert all(leaf.grad is None for leaf in outer.values())
        ends.append(outer["moved"].norm().item())
    assert ends[0] == ends[1] > 0.1
    assert ends[2] == pytest.approx(0.1, rel=1e-5)


def test_a_large_hypergradient_is_clipped():
    x = torch.zeros(2, dtype=F64)
    records = trainer(clip=0.1).fit(x, task(), 1)
    assert x.norm() == pytest.approx(0.2, rel=1e-5)
    assert records[0].gradient_norm == pytest.approx(0.5 * 2**0.5)


def failing(step):
    return TaskBatch(
        torch.tensor([[0.0, 0.0], [float("nan") if step == 1 else 0.0, 0.0]], dtype=F64),
        torch.ones(2, 2, dtype=F64),
    )


def test_a_failed_task_stops_training_with_outer_as_it_was():
    x, seen = torch.zeros(2, dtype=F64), []
    with pytest.raises(SolveError, match="task 1: NON_FINITE"):
        trainer().fit(x, failing, 3, callback=lambda record, result: seen.append(x.clone()))
    assert torch.equal(x, seen[-1])
    assert len(seen) == 1


def test_a_failed_step_is_skipped():
    x, seen = torch.zeros(2, dtype=F64), []
    trainer(on_failure="skip").fit(
        x, failing, 3, callback=lambda record, result: seen.append(x.clone())
    )
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_a_failed_task_is_left_out_of_the_mean():
    x = torch.zeros(2, dtype=F64)
    records = trainer(on_failure="mean").fit(x, failing, 3)
    assert [record.failed for record in records] == [0, 1, 0]
    assert records[1].status == {"CONVERGED": 1, "NON_FINITE": 1} or records[1].status == {
        "BUDGET": 1,
        "NON_FINITE": 1,
    }
    assert x.isfinite().all()


def test_no_usable_task_is_an_error_whatever_was_chosen():
    bad = Task(torch.full((2,), float("nan"), dtype=F64), torch.ones(2, dtype=F64))
    x = torch.ones(2, dtype=F64)
    with pytest.raises(SolveError, match="no task has a usable hypergradient"):
        trainer(on_failure="mean").fit(x, bad, 1)
    assert (x == 1).all()


def test_an_exception_in_the_callback_keeps_finished_steps():
    x = torch.zeros(2, dtype=F64)

    def stop(record, result):
        if record.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer().fit(x, task(), 10, callback=stop)
    expected = torch.zeros(2, dtype=F64)
    trainer().fit(expected, task(), 3)
    assert torch.equal(x, expected)


def test_same_seed_same_bits():
    runs = []
    for _ in range(2):
        x = torch.zeros(2, dtype=F64)
        trainer().fit(x, lambda step: task(outer=float(step)), 5)
        runs.append(x)
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": 0.0}, "`clip` is 0.0"),
        ({"on_failure": "ignore"}, "`on_failure` is 'ignore'"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)], lr=1.0)}, "`optimizer` is a SGD"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(**changes)


def test_an_outer_variable_inside_a_graph_is_named():
    x = torch.zeros(2, dtype=F64, requires_grad=True) * 2
    with pytest.raises(ValueError, match="`outer` is no leaf"):
        trainer().fit(x, task(), 1)


# Schedules, averages, resumption


def test_a_schedule_lowers_the_rate_after_each_step():
    x = torch.zeros(2, dtype=F64)
    halve = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # noqa: E731
    trainer(schedule=halve).fit(x, task(), 2)
    # z = x / 2, f = ½ (z − 1)², so dF/dx = (x / 2 − 1) / 2; rates 2 and 1.
    torch.testing.assert_close(x, torch.full((2,), 1.0 + 0.25, dtype=F64))


def test_the_average_follows_its_formula():
    x = torch.zeros(2, dtype=F64)
    training = trainer(average=0.5).begin(x)
    expected = x.clone()
    for k in range(12):
        training.advance(task(outer=float(k)))
        decay = min(0.5, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * x
        torch.testing.assert_close(training.average, expected)
    assert trainer().begin(x).average is None


STATEFUL = {
    "optimizer": lambda params: torch.optim.Adam(params, lr=0.3),
    "schedule": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8),
    "average": 0.9,
    "warm_start": "both",
    # Budgets only, so that a warm start makes another hypergradient.
    "method": ImplicitCG(max_steps=1, rtol=0.0),
}


def keyed(step):
    """Two tasks that come and go, so that warm starts have something to remember."""
    tasks = [Task(torch.full((2,), float(k), dtype=F64), task().outer_batch, key=k) for k in (1, 2)]
    return tasks if step % 2 else tasks[:1]


def test_a_resumed_training_has_the_same_bits(tmp_path):
    straight, stopped, resumed = (torch.zeros(2, dtype=F64) for _ in range(3))
    whole = trainer(**STATEFUL).begin(straight)
    records = [whole.advance(keyed(step))[0] for step in range(8)]

    first = trainer(**STATEFUL).begin(stopped)
    for step in range(5):
        first.advance(keyed(step))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = trainer(**STATEFUL).begin(resumed)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.steps == 5
    again = [second.advance(keyed(step))[0] for step in range(5, 8)]

    assert resumed.equal(straight)
    assert second.average.equal(whole.average)
    assert [r.outer_value for r in again] == [r.outer_value for r in records[5:]]
    assert [r.step for r in again] == [5, 6, 7]


def test_a_saved_state_does_not_move_with_the_training():
    training = trainer(**STATEFUL).begin(torch.zeros(2, dtype=F64))
    training.advance(keyed(0))
    saved = training.state_dict()
    expected = training.outer.clone(), training.average.clone()
    for _ in range(2):
        training.advance(keyed(1))
        after = training.outer.clone(), training.average.clone()
        training.load_state_dict(saved)
        assert training.outer.equal(expected[0])
        assert training.average.equal(expected[1])
        training.advance(keyed(1))
        assert training.outer.equal(after[0])
        assert training.average.equal(after[1])
        training.load_state_dict(saved)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 2, "was made with `average`"),
        ({"average": 0.5, "schedule": STATEFUL["schedule"]}, 2, "was made without `schedule`"),
        ({"average": 0.5}, 3, r"has shapes \[\(2,\)\] but this one has \[\(3,\)\]"),
    ],
)
def test_a_state_of_another_training_is_refused(changes, size, message):
    saved = trainer(average=0.5).begin(torch.zeros(2, dtype=F64)).state_dict()
    other = torch.ones(size, dtype=F64)
    with pytest.raises(ValueError, match=message):
        trainer(**changes).begin(other).load_state_dict(saved)
    assert other.eq(1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"average": 1.0}, "`average` is 1.0"),
        ({"schedule": 0.5}, "`schedule` is a float"),
    ],
)
def test_wrong_schedules_and_averages_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(**changes)


def test_a_record_holds_the_curvature_that_was_met():
    records = trainer().fit(torch.zeros(2, dtype=F64), task(), 1)
    assert records[0].curvature == pytest.approx((2.0, 2.0))
    from bilevel.solvers import FirstOrder

    records = trainer(method=FirstOrder()).fit(torch.zeros(2, dtype=F64), task(), 1)
    assert records[0].curvature is None


def test_a_record_holds_the_error_that_was_estimated():
    records = trainer().fit(torch.zeros(2, dtype=F64), task(), 1)
    assert records[0].error_estimate is None
    # One slow inner step ends at z = 0.1 with z* = 0.5: the gradient is −0.45, and exact −0.25.
    slow = trainer(
        inner_solver=GradientDescent(0.1, 1), method=ImplicitCG(max_steps=9, error_estimate=True)
    )
    (record,) = slow.fit(torch.zeros(2, dtype=F64), task(inner=1.0), 1)
    assert record.error_estimate == pytest.approx(0.4 / 0.9, rel=1e-3)
    assert record.curvature == pytest.approx((2.0, 2.0))
