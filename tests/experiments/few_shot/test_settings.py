"""Settings and learners."""

import pytest
import torch

from bilevel import Kernels
from bilevel.experiments.few_shot import LEARNERS, Settings, make_job, run
from bilevel.experiments.few_shot.released import PullBack, ReleasedCG
from bilevel.experiments.few_shot.reptile import Reptile
from bilevel.pytree import tree_leaves
from bilevel.solvers import (
    LBFGS,
    BacktrackingDescent,
    FirstOrder,
    GradientDescent,
    HessianFree,
    ImplicitCG,
    TorchOptimizer,
    Unrolled,
)


@pytest.mark.parametrize("learner", LEARNERS)
def test_every_learner_runs_and_says_where_it_comes_from(learner, settings, tmp_path, watcher):
    own = LEARNERS[learner].settings
    kept = {name: own[name] for name in ("inner_steps", "steps", "queries") if name in own}
    assert run(settings(learner, **kept), tmp_path / "run", watcher, baselines=False)
    accuracies, note, interrupted = watcher.results[0]
    assert list(accuracies) == [LEARNERS[learner].title]
    assert "3-way 1-shot" in note
    assert not interrupted
    assert LEARNERS[learner].note.endswith(".")


def test_learners_are_what_they_are_called(settings):
    def job(learner):
        return make_job(settings(learner))

    assert job("imaml").method == ImplicitCG(max_steps=5, rtol=0.0)
    assert job("imaml").problem.strength == 0.2
    assert settings("imaml", ways=20).strength == 0.1
    assert settings("imaml", ways=20, strength=0.2).strength == 0.2
    assert job("imaml-paper").problem.strength == 2.0
    assert job("imaml").inner_solver == BacktrackingDescent(0.1, 2)
    assert isinstance(job("imaml-hessian-free").inner_solver, HessianFree)
    assert job("maml").method == Unrolled()
    assert job("maml").problem.strength == 0.0
    assert job("maml").inner_solver == GradientDescent(0.1, 2)
    assert job("fomaml").method == FirstOrder()
    assert job("reptile").method == Reptile()
    assert job("reptile").training.shots == 10
    assert job("reptile").held_out.shots == 1
    assert job("anil").problem.adapted == ("14.weight", "14.bias")
    released = job("imaml-released")
    assert released.inner_solver == PullBack(0.1, 2)
    assert released.method == ReleasedCG()
    assert released.test_problem.strength == 0.0
    assert released.test_solver == GradientDescent(0.1, 2)
    assert job("imaml-damped").method.indefinite == "damp"
    assert job("imaml-gauss-newton").method.indefinite == "ggn"
    assert job("imaml-layers").problem.learn_strength == "layer"


def test_inner_steps_in_training_can_be_rounded(settings, tmp_path, watchers):
    found = {}
    for precision in ("full", "bf16"):
        chosen = settings(precision=precision, inner_solver="gradient-descent")
        job = make_job(chosen)
        assert job.trainer().kernels == Kernels(precision=precision)
        assert job.choices["inner solver"].endswith("in bf16") == (precision == "bf16")
        watcher = watchers()
        assert run(chosen, tmp_path / precision, watcher, baselines=False)
        found[precision] = watcher.records[0].inner_residual
    assert found["bf16"] != found["full"]
    assert found["bf16"] == pytest.approx(found["full"], rel=0.05)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, BacktrackingDescent(0.1, 2)),
        ("gradient-descent", GradientDescent(0.1, 2)),
        ("nesterov", GradientDescent(0.1, 2, momentum=0.9, nesterov=True)),
        ("adam", TorchOptimizer("Adam", 2, lr=0.1)),
        ("lbfgs", LBFGS(2, tol=None)),
        ("hessian-free", HessianFree(2, tol=None, cg_steps=5, cg_rtol=0.0)),
    ],
)
def test_every_inner_solver_has_a_name_and_trains(name, expected, settings, tmp_path, watcher):
    chosen = settings(inner_solver=name)
    assert make_job(chosen).inner_solver == expected
    assert run(chosen, tmp_path / "run", watcher, baselines=False)
    assert len(watcher.records) == 3


def test_given_settings_win_over_those_of_the_learner(settings):
    assert settings("maml", strength=0.25).strength == 0.25
    assert settings("maml").strength == 0.0


def test_what_is_left_open_is_filled_in():
    omniglot, glyphs = Settings.of(data="omniglot"), Settings.of(shots=3)
    assert (omniglot.rotations, omniglot.invert) == (True, True)
    assert (glyphs.rotations, glyphs.invert) == (False, False)
    assert (glyphs.train_shots, glyphs.eval_queries) == (3, glyphs.queries)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps_": 3}, "there is no setting 'steps_'; known: learner, data"),
        ({"split": "val"}, "`split` is 'val'; known: test, validation"),
        ({"adapted": "body"}, "`adapted` is 'body'"),
        ({"learn_strength": "layers"}, "`learn_strength` is 'layers'; known: None, scalar"),
        ({"learn_strength": "scalar", "strength_end": 1.0}, "λ is learned or scheduled"),
        ({"strength": 0.0, "strength_end": 1.0}, "both ends must be > 0"),
        ({"average": 1.0}, "`average` is 1.0"),
        ({"precision": "fp8"}, "`precision` is 'fp8'; pass one of 'full'"),
        ({"strength_min": 0.0}, "`strength_min` is 0.0"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        Settings.of("imaml", **given)


def test_an_unknown_learner_is_named():
    with pytest.raises(ValueError, match="there is no learner 'mamal'; known: imaml"):
        Settings.of("mamal")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"activation": "gelu"}, "there is no activation 'gelu'; known: relu"),
        ({"norm": "weight"}, "`norm` is 'weight'"),
        ({"data": "mnist"}, "there is no data set 'mnist'"),
        ({"precision": "bf16"}, "but BacktrackingDescent compares values"),
        ({"precision": "bf16", "method": "unrolled"}, "Unrolled differentiates the steps"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_named(given, message, settings):
    with pytest.raises(ValueError, match=message):
        make_job(settings(**given))


def test_test_classes_are_never_trained_on(settings):
    test, validation = make_job(settings()), make_job(settings(split="validation"))
    held_out = set(test.held_out.pool.names)
    for job in (test, validation):
        assert not set(job.training.pool.names) & set(job.held_out.pool.names)
        assert not set(job.training.pool.names) & held_out
    assert not set(validation.held_out.pool.names) & held_out
    # Another seed makes other tasks of the same classes.
    other = make_job(settings(seed=1))
    assert other.training.pool.names == test.training.pool.names
    assert not other.training(0).inner_batch[0].equal(test.training(0).inner_batch[0])


def test_ink_is_bright_where_asked(settings):
    dark, bright = make_job(settings()), make_job(settings(invert=True))
    total = dark.training(0).inner_batch[0] + bright.training(0).inner_batch[0]
    torch.testing.assert_close(total, torch.ones_like(total))


def test_a_scheduled_strength_goes_from_end_to_end(settings, tmp_path, watcher):
    chosen = settings(strength=8.0, strength_end=0.5, steps=5, inner_lr=0.01)
    assert run(chosen, tmp_path / "run", watcher, baselines=False)
    from bilevel.run_folder import read_metrics

    found = [one["strength"] for one in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert found == pytest.approx([8.0, 4.0, 2.0, 1.0, 0.5], rel=1e-5)
    weights = torch.load(tmp_path / "run" / "weights.pt", weights_only=True)
    assert weights["log_strength"].exp() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("kind", ["scalar", "layer", "parameter"])
def test_a_learned_strength_has_its_own_rate(kind, settings):
    job = make_job(settings(learn_strength=kind, strength_lr=0.25, lr=1e-3))
    training = job.trainer().begin(job.outer)
    before = [leaf.clone() for leaf in tree_leaves(job.outer["log_strength"])]
    training.advance(job.training(0))
    moved = [
        (a - b).abs().max().item()
        for a, b in zip(before, tree_leaves(job.outer["log_strength"]), strict=True)
    ]
    # Adam's first step is as long as its rate, wherever there is a gradient.
    assert max(moved) == pytest.approx(0.25, rel=1e-3)
    rates = [group["lr"] for group in training.optimizer.param_groups]
    assert rates[1] > 100 * rates[0]


def test_predictions_depend_on_other_queries_only_where_transductive(settings):
    for transductive in (True, False):
        job = make_job(settings(transductive=transductive))
        task = job.held_out(0).unstack()[0]
        images, labels, *rest = task.outer_batch
        whole = job.problem.predict(job.outer, job.outer, (images, labels, *rest))
        part = job.problem.predict(job.outer, job.outer, (images[:2], labels[:2], *rest))
        assert torch.allclose(whole[:2], part, atol=1e-5) != transductive


def test_a_learned_strength_keeps_its_bound(settings):
    job = make_job(settings(learn_strength="layer", strength=0.31, strength_min=0.3))
    training = job.trainer().begin(job.outer)
    for step in range(2):
        training.advance(job.training(step))
        for leaf in tree_leaves(job.outer["log_strength"]):
            assert leaf.exp() >= 0.3 - 1e-6
    with pytest.raises(ValueError, match=r"`strength` is 0.02, below `strength_min` = 0.3"):
        settings(learn_strength="layer", strength=0.02, strength_min=0.3)
