"""The benchmark of time to a given error: others reach the library's truth by their own way."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from bilevel.experiments.few_shot import Accuracy, Settings, make_job
from bilevel.solvers import LBFGS, HessianFree, ImplicitCG


@pytest.fixture(scope="module")
def benchmark(script):
    return script("time_to_accuracy")


@pytest.fixture(scope="module")
def search(benchmark):
    return sys.modules["accuracy_search"]


def tiny():
    choices = {"activation": "softplus", "norm": "none", "strength": 2.0, "tasks": 2}
    return Settings.of("imaml", **choices, channels=2, ways=3, queries=2, steps=1)


@pytest.fixture(scope="module")
def setting(search):
    return search.Setting(make_job(tiny()), 1, 2)


@pytest.fixture
def grid(search):
    return search.Grid(
        rates=(0.2,),
        momenta=(0.9,),
        adam=(1e-3,),
        histories=(10,),
        first_order_steps=(10, 40),
        quasi_newton_steps=(2, 12),
        products=(1, 8),
        tolerances=(1.0, 1e-3),
        cg_rtols=(0.1,),
        rtols=(1e-1, 1e-4),
    )


@pytest.fixture
def tried(search):
    """Makes a setting that only says what it would take."""

    def make(family="bilevel", line="a", seconds=1.0, error=0.001, most=False, run=None):
        choice = f"{line}, {seconds:g}"
        return search.Tried(family, line, choice, seconds, error, most, run or (lambda: None))

    return make


# Ways to the gradient


@pytest.mark.parametrize(
    ("optimizer", "options", "steps"),
    [
        ("SGD", {"lr": 0.02, "momentum": 0.9, "nesterov": True}, 300),
        ("LBFGS", {"line_search_fn": "strong_wolfe", "tolerance_grad": 0.0}, 30),
    ],
)
def test_a_loop_by_hand_agrees_with_the_truth(search, setting, optimizer, options, steps):
    enough = search.Choice(optimizer, options, steps, 15)
    early = replace(enough, steps=1, products=1)
    assert setting.error(setting.by_hand(enough)()) < 1e-3
    assert setting.error(setting.by_hand(early)()) > 1e-3


@pytest.mark.parametrize("engine", ["batched", "loop"])
def test_the_library_agrees_with_the_truth(setting, engine):
    run = setting.ours(LBFGS(tol=1e-4), ImplicitCG(1000, 1e-4), engine)
    assert setting.error(run()) < 1e-3
    z = setting.solved_by_us(HessianFree(tol=1e-4), engine)
    assert setting.error(setting.ours(None, ImplicitCG(1000, 1e-4), engine, z)()) < 1e-3
    assert setting.residual <= 1e-10


@pytest.mark.parametrize("optimizer", ["LBFGS", "Adam"])
def test_a_run_that_is_looked_at_on_the_way_goes_the_same_way(setting, optimizer):
    more = {"line_search_fn": "strong_wolfe"} if optimizer == "LBFGS" else {"lr": 1e-3}
    x, data = tuple(setting.theta.values()), setting.tasks[0].inner_batch
    *_, looked_at = setting.iterates(x, data, optimizer, more, (1, 2, 4))
    (whole,) = setting.iterates(x, data, optimizer, more, (4,))
    before = next(setting.iterates(x, data, optimizer, more, (3,)))
    for one, other, other_step in zip(looked_at, whole, before, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
        assert not torch.equal(other, other_step)


# The search


def test_what_the_search_saw_is_what_a_whole_run_gives(setting, grid):
    found = setting.search_ours(grid, "batched") + setting.search_by_hand(grid)
    lines = {one.line.split("(")[0] for one in found}
    assert lines == {"HessianFree", "LBFGS", "SGD", "Adam"}
    # One run each: the cheapest, the dearest, and those between that differ in kind.
    for one in {one.line: one for one in found}.values():
        assert setting.error(one.run()) == pytest.approx(one.error, rel=0.05, abs=1e-5)
    assert any("corrected" in one.choice for one in found)
    assert {one.family for one in found if one.reached} >= {"bilevel", "hand-lbfgs"}


def test_the_search_leaves_off_where_all_is_dearer(search, setting, grid, monkeypatch):
    """Every part takes a second; L-BFGS needs 2 steps and is within any error."""
    monkeypatch.setattr(search, "clocked", lambda run: (run(), 1.0))
    monkeypatch.setattr(search, "TARGET", 1e9)
    longer = replace(grid, quasi_newton_steps=(2, 3, 4, 5), rates=(), adam=(), momenta=())
    assert {one.seconds for one in setting.search_by_hand(longer)} == {2.0, 3.0, 4.0}
    monkeypatch.setattr(search, "TARGET", 0.0)
    assert max(one.seconds for one in setting.search_by_hand(longer)) == 6.0


def test_an_optimizer_that_diverges_is_left(setting, grid):
    wild = replace(grid, rates=(1e9,), adam=(), histories=())
    assert all(one.error < float("inf") for one in setting.search_by_hand(wild))


# What is timed


def test_finalists_are_the_cheapest_that_reach_the_target(benchmark, tried):
    few = [tried(seconds=s, error=e) for s, e in ((1, 0.02), (5, 0.01), (3, 0.009), (4, 1e-3))]
    assert [one.seconds for one in benchmark.finalists([*few, tried(seconds=6)])] == [3, 4, 5]


def test_where_none_reaches_it_the_largest_budget_is_timed(benchmark, tried):
    few = [tried(seconds=2, error=0.02), tried(seconds=8, error=0.05, most=True)]
    best = tried(seconds=9, error=0.04, most=True)
    assert benchmark.finalists([*few, best]) == [best]
    assert benchmark.finalists(few[:1]) == few[:1]  # all else diverged


def test_a_finalist_that_misses_the_target_as_a_whole_is_out(benchmark, setting, tried):
    def off(share):
        return lambda: [(1 + share) * setting.exact]

    lucky, sound = tried(seconds=1, run=off(0.02)), tried(seconds=2, run=off(0.005))
    kept = benchmark.decided(setting, [lucky, sound])
    assert kept.choice == sound.choice
    assert kept.error == pytest.approx(0.005)
    assert benchmark.decided(setting, [lucky]).error == pytest.approx(0.02)


def test_the_best_peer_is_the_fastest_that_gets_there(benchmark, tried):
    times = benchmark.Times
    ours = (tried(), times((1.0, 1.0)))
    bound = (tried("hand-first-order", error=0.1), times((2.0, 2.0)))
    slower = (tried("hand-lbfgs"), times((4.0, 4.0)))
    assert benchmark.best_peer([ours, bound, slower]) == slower
    assert benchmark.best_peer([ours, bound]) == bound


def test_a_bound_is_called_one(benchmark, tried, capsys):
    ours, bound = tried(), tried("hand-first-order", error=0.1)
    found = [(ours, benchmark.Times((1.0, 1.0))), (bound, benchmark.Times((2.0, 2.0)))]
    benchmark.report(found)
    said = capsys.readouterr().out
    assert "bilevel takes at most 0.50 of the best peer's time" in said
    assert said.count("NOT reached") == 1
    rows = {
        (row.setting.get("variant"), row.metric): row.value for row in benchmark.rows_of([], found)
    }
    assert rows["hand-first-order", "reached"] == 0.0
    assert rows["bilevel", "reached"] == 1.0


def test_the_file_keeps_what_no_setting_of_the_same_curve_beats(benchmark, tried):
    ours = [tried(line="a", seconds=s, error=e) for s, e in ((1, 0.5), (2, 0.7), (3, 0.1))]
    other = tried(line="b", seconds=4, error=0.9)
    rows = benchmark.rows_of([*ours, other], _timed(benchmark, tried))
    kept = [row.setting["seconds"] for row in rows if row.metric == "tried_error"]
    assert kept == [1, 3, 4]
    counts = {row.setting["family"]: row.value for row in rows if row.metric == "settings_tried"}
    assert counts == {"bilevel": 4}


def _timed(benchmark, tried):
    names = ("bilevel", "hand-lbfgs")
    return [(tried(name), benchmark.Times((1.0, 2.0))) for name in names]


# The whole


@pytest.mark.slow
def test_the_whole_writes_a_file_that_gives_the_same_picture(
    benchmark, search, grid, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(benchmark, "settings", lambda full, root: tiny())
    monkeypatch.setattr(benchmark, "QUICK", grid)
    monkeypatch.setattr(search.Setting, "accuracy", lambda self: Accuracy(0.9, 0.1, 20))
    argv = ["time_to_accuracy.py", "--out", str(tmp_path), "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", [*argv, "--threads", str(torch.get_num_threads())])
    benchmark.main()
    assert "of the best peer's time" in capsys.readouterr().out
    content = json.loads((tmp_path / "time-to-accuracy.json").read_text())
    assert str(tmp_path) not in content["command"]
    rows = [benchmark.Row(**row) for row in content["rows"]]
    variants = [row.setting["variant"] for row in rows if row.metric == "seconds"]
    assert set(variants) - {"torchopt"} == {"bilevel", "hand-lbfgs", "hand-first-order"}
    (ratio,) = [row.value for row in rows if row.metric == "bilevel_over_best_peer"]
    assert ratio > 0
    benchmark.draw(rows, tmp_path / "again.png")
    picture = (tmp_path / "time-to-accuracy.png").read_bytes()
    assert (tmp_path / "again.png").read_bytes() == picture
    assert len(picture) > 10_000
    benchmark.draw(rows[:-1], tmp_path / "other.png")
    assert (tmp_path / "other.png").read_bytes() != picture


def test_an_untrained_start_is_refused(benchmark, search, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "settings", lambda full, root: tiny())
    monkeypatch.setattr(search.Setting, "accuracy", lambda self: Accuracy(0.35, 0.1, 20))
    threads = str(torch.get_num_threads())
    monkeypatch.setattr(
        sys, "argv", ["time_to_accuracy.py", "--out", str(tmp_path), "--threads", threads]
    )
    with pytest.raises(SystemExit, match="not clearly above chance"):
        benchmark.main()


def test_accuracy_is_that_of_held_out_tasks_that_are_not_timed(setting):
    found = setting.accuracy()
    assert found.tasks == setting.others.count == 33 - 2
    assert 0.0 < found.mean < 1.0
