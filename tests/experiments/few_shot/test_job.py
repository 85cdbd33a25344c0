"""What a run is put together from: its data above all, and that each setting is heeded."""

import math

import pytest
import torch

import bilevel.problems.data as data
from bilevel.experiments.few_shot import Accuracy, held_out_accuracy, make_job, run
from bilevel.problems import ImageClasses
from bilevel.problems.data import DataError
from bilevel.pytree import tree_leaves


@pytest.fixture
def characters(monkeypatch):
    """As many characters as Omniglot has, with two blank drawings of each."""
    images = torch.zeros(1623, 2, 1, 28, 28)
    pool = ImageClasses(images, tuple(f"character {i}" for i in range(1623)))
    monkeypatch.setattr(data, "omniglot", lambda root: pool)


def names(job):
    return set(job.training.pool.names), set(job.held_out.pool.names)


@pytest.mark.usefixtures("characters")
def test_no_character_of_omniglot_is_both_trained_on_and_held_out(settings):
    chosen = {"data": "omniglot", "queries": 1}
    training, test = names(make_job(settings(**chosen)))
    assert (len(training), len(test)) == (1200, 423)
    assert not training & test
    rest, validation = names(make_job(settings(**chosen, split="validation")))
    assert (len(rest), len(validation)) == (1028, 172)
    assert not rest & validation
    # Settings are chosen without a look at the test characters, in training or out of it.
    assert rest | validation == training
    # The characters are parted alike for every seed.
    assert names(make_job(settings(**chosen, seed=5))) == (training, test)


@pytest.mark.usefixtures("characters")
def test_two_permutations_are_a_leak_and_refused(settings, tmp_path, watcher, monkeypatch):
    split = data.omniglot_split
    parts = iter((split(data.omniglot(None), 0), split(data.omniglot(None), 1)))
    monkeypatch.setattr(data, "omniglot_split", lambda *_, **__: (next(parts)[0], next(parts)[1]))
    with pytest.raises(DataError, match=r"\d{3} held-out classes are trained on, 'character"):
        run(settings(data="omniglot", queries=1), tmp_path / "run", watcher)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("split", "part"), [("test", "test"), ("validation", "val")])
def test_mini_imagenet_is_evaluated_on_its_own_parts(settings, monkeypatch, split, part):
    def pool(root, name):
        return ImageClasses(torch.zeros(6, 4, 3, 28, 28), tuple(f"{name} {i}" for i in range(6)))

    monkeypatch.setattr(data, "mini_imagenet", pool)
    job = make_job(settings(data="mini-imagenet", split=split))
    assert all(name.startswith("train ") for name in job.training.pool.names)
    assert all(name.startswith(f"{part} ") for name in job.held_out.pool.names)


def test_rates_clipping_and_averages_are_those_of_the_settings(settings):
    job = make_job(settings(lr=0.25, eps=0.5, clip=0.125, average=0.75, steps=4))
    trainer = job.trainer()
    assert (trainer.clip, trainer.average) == (0.125, 0.75)
    training = trainer.begin(job.outer)
    (group,) = training.optimizer.param_groups
    assert group["eps"] == 0.5
    for step in range(4):
        assert group["lr"] == pytest.approx(0.125 * (1 + math.cos(math.pi * step / 4)))
        training.advance(job.training(step))
    flat = make_job(settings(lr=0.25, lr_schedule="constant", clip=0.0, average=0.0))
    trainer = flat.trainer()
    assert (trainer.clip, trainer.average, trainer.schedule) == (None, None, None)


def test_initial_values_are_those_of_the_rule(settings):
    spread = {
        init: torch.cat([x.flatten() for x in tree_leaves(make_job(settings(init=init)).outer)])
        for init in ("torch", "imaml")
    }
    assert spread["imaml"].std() > 1.5 * spread["torch"].std()


def test_tasks_that_cannot_be_adapted_to_are_counted_and_score_nothing(settings):
    wild = make_job(settings("scratch", inner_lr=1e20, inner_steps=5))
    found = Accuracy.of(held_out_accuracy(wild, wild.outer, lambda count: None))
    assert found.unusable == found.tasks == 5
    assert found.mean == 0.0
    tame = make_job(settings())
    assert Accuracy.of(held_out_accuracy(tame, tame.outer, lambda count: None)).unusable == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": float("nan")}, "`minutes` is nan; pass a number or none"),
        ({"steps": -3}, "`steps` is -3; it is at least 0"),
        ({"eval_tasks": 0}, "`eval_tasks` is 0; it is at least 1"),
        ({"inner_steps": 2.5}, "`inner_steps` is 2.5; pass a whole number"),
        ({"transductive": "no"}, "`transductive` is 'no'; pass true or false"),
        ({"tasks": True}, "`tasks` is True; pass a whole number"),
    ],
)
def test_values_of_another_type_or_range_are_refused(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "released", "strength": 0.0}, None),
        ({"method": "reptile", "method_options": {"foo": 1}}, "'reptile' has no option 'foo'"),
        ({"method": "released", "method_options": {"max_step": 3}}, "has no option 'max_step'"),
        ({"method": "magic"}, "no hypergradient method 'magic'; known: .*released, reptile"),
        ({"inner_solver": "magic"}, "no inner solver 'magic'; known: .*nesterov.*pull-back"),
        (
            {"inner_solver": "pull-back", "inner_options": {"foo": 1}},
            "'pull-back' has no option 'foo'",
        ),
    ],
)
def test_names_and_options_that_are_not_known_are_refused(
    settings, changes, message, tmp_path, watcher
):
    # What the released code does at λ = 0 it does by a division.
    error, message = (ValueError, message) if message else (Exception, "divides by λ, which is 0")
    with pytest.raises(error, match=message):
        run(settings(**changes), tmp_path / "run", watcher)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"queries": 12}, r"`train_shots` \+ `queries` is 13, but each class of glyphs has 12"),
        ({"train_shots": 11}, r"`train_shots` \+ `queries` is 13, but each class of glyphs has 12"),
        ({"eval_queries": 12}, r"`shots` \+ `eval_queries` is 13, but each class of glyphs has 12"),
        ({"device": "meta"}, "`device` is 'meta', which cannot be used"),
    ],
)
def test_what_does_not_fit_is_named_by_its_setting(settings, given, message):
    with pytest.raises(ValueError, match=message):
        make_job(settings(**given))
