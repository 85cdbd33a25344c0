"""``bilevel train imaml`` leaves what it promises, repeats, and fails in one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import bilevel
from bilevel.experiments.few_shot import Accuracy, Settings, held_out_accuracy, make_job
from bilevel.run_folder import read_metrics

FILES = [
    "checkpoint.pt",
    "config.json",
    "learning-curve.png",
    "metrics.jsonl",
    "result.json",
    "weights.pt",
]
NAMES = {
    "trained": "iMAML",
    "untrained": "untrained network, adapted alike",
    "nearest_neighbour": "pixel nearest neighbour",
}


def records(path):
    """The metrics without what the clock says."""
    found = read_metrics(path / "metrics.jsonl")
    for record in found:
        assert record.pop("seconds") > 0
        assert record.pop("cpu_seconds") > 0
    return found


def test_a_run_leaves_its_files_and_its_table(train, tmp_path):
    done = train("--out", "run")
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == FILES
    for name in NAMES.values():
        assert re.search(rf"{name} +\d+\.\d ± \d+\.\d %", done.output), done.output
    assert "step 3/3" in done.output
    assert "transductive" in done.output

    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == [0, 1, 2]
    assert found[0]["tasks"] == 2
    assert 0 <= found[0]["metrics"]["accuracy"] <= 1

    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["finished"]
    assert result["steps"] == 3
    assert list(result["accuracy"]) == list(NAMES)
    assert all(one["tasks"] == 5 for one in result["accuracy"].values())
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["settings"]["channels"] == 4
    assert config["settings"]["rotations"] is False
    assert config["versions"]["bilevel"] == bilevel.__version__
    assert config["choices"]["method"].startswith("ImplicitCG(")
    assert (tmp_path / "run/learning-curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_weights_are_those_that_were_evaluated(train, tmp_path):
    assert train("--out", "run").exit_code == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    weights = torch.load(tmp_path / "run/weights.pt", weights_only=True)
    job = make_job(
        Settings(ways=3, queries=2, tasks=2, channels=4, inner_steps=2, steps=3, eval_tasks=5)
    )
    trained = Accuracy.of(held_out_accuracy(job, weights, lambda count: None))
    before = Accuracy.of(held_out_accuracy(job, job.outer, lambda count: None))
    assert trained.mean == pytest.approx(result["accuracy"]["trained"]["mean"], abs=1e-12)
    assert before.mean == pytest.approx(result["accuracy"]["untrained"]["mean"], abs=1e-12)


def test_a_seed_repeats_a_run_and_another_does_not(train, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train("--out", name, "--seed", seed).exit_code == 0
    assert records(tmp_path / "a") == records(tmp_path / "b")
    assert records(tmp_path / "a") != records(tmp_path / "c")
    a, b = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in "ab")
    assert all(a[key].equal(b[key]) for key in a)


def test_accuracy_has_its_interval():
    values = torch.tensor([0.5, 0.7, 0.9])
    assert str(Accuracy.of(values)) == f"70.0 ± {196 * 0.2 / 3**0.5:.1f} %"
    assert Accuracy.of(values[:1]).interval == 0.0


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "neumann", "--method-option", "terms=2"],
        ["--method", "unrolled"],
        ["--method", "first-order"],
        ["--method", "implicit", "--method-option", "linear_solver=dense"],
        ["--inner-solver", "torch-optimizer", "--inner-option", "cls=SGD"],
        ["--inner-solver", "lbfgs"],
        ["--network", "pool", "--learn-strength", "scalar"],
        ["--no-transductive", "--eval-queries", "1"],
        ["--precision", "bf16", "--inner-solver", "gradient-descent"],
    ],
    ids=" ".join,
)
def test_every_choice_runs(invoke, options):
    # A strong pull makes the inner problem convex, so that no method can diverge.
    small = "--ways=2 --queries=1 --tasks=1 --channels=2 --inner-steps=1 --strength=8 --steps=1"
    done = invoke("train", "imaml", *small.split(), "--eval-tasks=2", *options, "--out", "run")
    assert done.exit_code == 0, done.output


def test_the_default_folder_says_what_ran(train, tmp_path):
    assert train("--quiet").exit_code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"imaml-glyphs-3w1s-\d{8}-\d{6}", folder.name)


def test_quiet_shows_the_result_only(train):
    done = train("--out", "run", "--quiet")
    assert "pixel nearest neighbour" in done.output
    assert "step 3/3" not in done.output
    assert "inner solver" not in done.output


def test_a_budget_of_cpu_minutes_ends_training(train, tmp_path):
    done = train("--out", "run", "--minutes", 1e-9)
    assert done.exit_code == 0, done.output
    assert len(records(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--data", "mnist"],
            "there is no data set 'mnist'; known: glyphs, omniglot, mini-imagenet",
        ),
        (["--network", "resnet"], "there is no network 'resnet'; known: strided, pool"),
        (["--method", "magic"], "there is no hypergradient method 'magic'; known: .*cg.*unrolled"),
        (["--inner-solver", "x"], "there is no inner solver 'x'; known: .*gradient-descent"),
        (["--method-option", "steps=3"], "'cg' has no option 'steps'; known: .*max_steps"),
        (["--method-option", "rtol"], "`--method-option` is 'rtol'; write key=value"),
        (["--inner-option", "momentum=two"], "inner solver 'gradient-descent'|momentum"),
        (["--device", "abacus"], "`device` is 'abacus', which cannot be used"),
        (["--shots", "9"], "`train_shots` . `queries` is 11"),
        (["--ways", "90"], "`ways` is 90, but the pool has"),
        (["--data", "omniglot"], "BILEVEL_DATA"),
        (["--precision", "half"], "`precision` is 'half'; pass one of 'full', 'tf32', 'bf16'"),
        (["--precision", "bf16"], "but BacktrackingDescent compares values .*GradientDescent"),
        (
            ["--inner-solver", "gradient-descent", "--precision", "tf32"],
            "`precision` is 'tf32', which cpu does not have",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_is_told_in_one_line(train, tmp_path, options, message):
    done = train("--out", "run", *options)
    assert done.exit_code == 2, done.output
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_debug_shows_where_an_error_came_from(invoke):
    done = invoke("--debug", "train", "imaml", "--data", "mnist")
    assert isinstance(done.exception, ValueError)


def test_a_folder_in_use_is_refused_unless_overwritten(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").write_text("x")
    done = train("--out", "run")
    assert done.exit_code == 1
    assert "is not empty" in done.stderr
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]
    assert train("--out", "run", "--overwrite").exit_code == 0


def test_a_folder_that_cannot_be_written_is_told_in_one_line(train, tmp_path):
    (tmp_path / "file").write_text("x")
    done = train("--out", "file/run")
    assert done.exit_code == 1
    assert re.search(r"cannot be made: Not a directory; .*choose a folder", done.stderr)
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_ctrl_c_keeps_what_was_reached(tmp_path):
    command = [sys.executable, "-c", "from bilevel.cli import main; main()", "train", "imaml"]
    command += ["--channels=4", "--tasks=1", "--inner-steps=1", "--steps=100000", "--out=run"]
    log = tmp_path / "log"
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output)
        metrics = tmp_path / "run/metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130, log.read_text()
    assert "Interrupted" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == FILES
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert not result["finished"]
    assert result["steps"] == len(records(tmp_path / "run"))
    assert torch.load(tmp_path / "run/weights.pt", weights_only=True)


@pytest.mark.slow
def test_the_defaults_reach_their_promise(tmp_path, monkeypatch):
    """The default job: above 90 %, and 20 points above both baselines."""
    from typer.testing import CliRunner

    from bilevel.cli.app import app

    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["train", "imaml", "--out", "run"])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "run/result.json").read_text())
    trained, *baselines = (one["mean"] for one in result["accuracy"].values())
    assert trained >= 0.90
    assert trained >= 0.20 + max(baselines)
