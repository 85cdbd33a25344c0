"""Runs leave what they promise, and go on where they were stopped."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from bilevel import SolveError
from bilevel.experiments.few_shot import held_out_accuracy, make_job, run
from bilevel.run_folder import RunFolderError, read_metrics


def records(path):
    """The metrics without what the clock says."""
    return [
        {k: v for k, v in one.items() if k not in ("seconds", "cpu_seconds")}
        for one in read_metrics(path / "metrics.jsonl")
    ]


def weights(path):
    return torch.load(path / "weights.pt", weights_only=True)


@pytest.mark.parametrize("learner", ["imaml", "imaml-learned", "maml"])
def test_a_run_that_is_stopped_and_resumed_has_the_same_bits(learner, settings, tmp_path, watchers):
    chosen = settings(learner, steps=5)
    assert run(chosen, tmp_path / "whole", watchers(), baselines=False)
    stopping = watchers()
    stopping.stop_after = 2
    assert not run(chosen, tmp_path / "parts", stopping, baselines=False)
    assert len(records(tmp_path / "parts")) == 2
    assert not json.loads((tmp_path / "parts/result.json").read_text())["finished"]
    assert run(chosen, tmp_path / "parts", watchers(), resume=True, baselines=False)

    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    assert [one["step"] for one in records(tmp_path / "parts")] == list(range(5))
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for x, y in zip(*(torch.utils._pytree.tree_leaves(one) for one in (a, b)), strict=True):
        assert x.equal(y)
    results = [
        json.loads((tmp_path / name / "result.json").read_text())["accuracy"]
        for name in ("whole", "parts")
    ]
    assert results[0] == results[1]


def test_what_was_not_saved_is_done_again(settings, tmp_path, watchers):
    """A run that died after its checkpoint: later records are dropped, not doubled."""
    chosen = settings(steps=4)
    stopping = watchers()
    stopping.stop_after = 2
    run(chosen, tmp_path / "run", stopping, baselines=False)
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lost": true}\n{"step": 3, "lo')
    assert run(chosen, tmp_path / "run", watchers(), resume=True, baselines=False)
    assert [one["step"] for one in records(tmp_path / "run")] == [0, 1, 2, 3]
    assert not any("lost" in one for one in records(tmp_path / "run"))


def test_a_budget_of_minutes_can_be_raised(settings, tmp_path, watchers):
    assert run(settings(minutes=1e-9), tmp_path / "run", watchers(), baselines=False)
    assert len(records(tmp_path / "run")) == 1
    assert run(settings(), tmp_path / "run", watchers(), resume=True, baselines=False)
    assert len(records(tmp_path / "run")) == 3


def test_another_run_is_not_resumed(settings, tmp_path, watchers):
    run(settings(), tmp_path / "run", watchers(), baselines=False)
    before = (tmp_path / "run/weights.pt").read_bytes()
    with pytest.raises(ValueError, match=r"has channels = 4, not 8; resume it with its own"):
        run(settings(channels=8), tmp_path / "run", watchers(), resume=True, baselines=False)
    rounded = settings(precision="bf16", inner_solver="gradient-descent")
    assert rounded.differs_from(asdict(replace(rounded, precision="full"))) == "precision"
    assert (tmp_path / "run/weights.pt").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_damaged_checkpoint_is_named(content, settings, tmp_path, watchers):
    run(settings(), tmp_path / "run", watchers(), baselines=False)
    path = tmp_path / "run/checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(RunFolderError, match=r"checkpoint.pt' cannot be read .*--overwrite"):
        run(settings(), tmp_path / "run", watchers(), resume=True, baselines=False)


def test_lost_records_are_named(settings, tmp_path, watchers):
    run(settings(), tmp_path / "run", watchers(), baselines=False)
    (tmp_path / "run/metrics.jsonl").write_text("")
    with pytest.raises(RunFolderError, match="holds 0 records of 3 steps"):
        run(settings(), tmp_path / "run", watchers(), resume=True, baselines=False)


def test_resuming_what_never_began_begins_it(settings, tmp_path, watchers):
    assert run(settings(), tmp_path / "run", watchers(), resume=True, baselines=False)


def test_a_run_that_fails_keeps_its_weights(settings, tmp_path, watchers):
    # At this rate the inner solver leaves the range of numbers.
    wild = settings(inner_solver="gradient-descent", inner_lr=1e20, inner_steps=5)
    with pytest.raises(SolveError, match="NON_FINITE"):
        run(wild, tmp_path / "run", watchers(), baselines=False)
    assert weights(tmp_path / "run")


def test_the_average_is_what_is_evaluated_and_saved(settings, tmp_path, watchers):
    run(settings(average=0.9), tmp_path / "averaged", watchers(), baselines=False)
    run(settings(average=0.0), tmp_path / "last", watchers(), baselines=False)
    averaged, last = weights(tmp_path / "averaged"), weights(tmp_path / "last")
    assert not averaged["0.weight"].equal(last["0.weight"])
    # Three steps: decays 1/10, 2/11, 3/12 from the initial value on.
    job = make_job(settings())
    expected, training = job.outer["0.weight"].clone(), job.trainer().begin(job.outer)
    for k in range(3):
        training.advance(job.training(k))
        decay = (1 + k) / (10 + k)
        expected = decay * expected + (1 - decay) * job.outer["0.weight"]
    torch.testing.assert_close(averaged["0.weight"], expected)


def test_plain_tests_ignore_the_regularizer(settings):
    job = make_job(settings("imaml-released", inner_steps=3))
    strong = make_job(settings("imaml", strength=50.0, inner_steps=3, inner_lr=0.001))
    accuracy = held_out_accuracy(job, job.outer, lambda count: None)
    assert accuracy.shape == (5,)
    assert strong.test_problem.strength == 50.0
    assert job.test_problem.strength == 0.0


def test_classes_and_commit_are_on_record(settings, tmp_path, watchers):
    run(settings(), tmp_path / "run", watchers(), baselines=False)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["classes"] == {"training": 36, "held_out": 12, "shared": 0}
    assert config["commit"]
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["tasks"] == 6
    assert sum(result["status"].values()) == 6
