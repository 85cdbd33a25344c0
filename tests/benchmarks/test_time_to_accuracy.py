"""The benchmark of time to a given error: others reach the library's truth by their own way."""

import pytest

from bilevel.experiments.few_shot import Settings, make_job
from bilevel.solvers import LBFGS


@pytest.fixture
def benchmark(script):
    return script("time_to_accuracy")


@pytest.fixture
def setting(benchmark):
    choices = {"activation": "softplus", "norm": "none", "strength": 2.0, "tasks": 2}
    job = make_job(Settings.of("imaml", **choices, channels=2, ways=3, queries=2, steps=1))
    return benchmark.Setting(job, 1, 2)


def test_a_loop_by_hand_and_the_library_agree_with_the_truth(benchmark, setting):
    options = {"lr": 0.2 / setting.largest, "momentum": 0.9, "nesterov": True}
    enough = benchmark.Choice("SGD", options, 300, 15)
    assert setting.error(setting.by_hand(enough)()) < 1e-3
    assert setting.error(setting.ours(LBFGS(tol=1e-4), 1e-4)().gradient) < 1e-3


def test_too_few_steps_are_seen(benchmark, setting):
    early = benchmark.Choice("SGD", {"lr": 0.2 / setting.largest}, 1, 1)
    assert setting.error(setting.by_hand(early)()) > 1e-3
    assert early.cost < benchmark.Choice("SGD", {}, 300, 15).cost
