"""A small data set and small settings, so that a run takes a second."""

import functools

import pytest

import bilevel.problems.data as data


@functools.cache
def small_glyphs():
    return data.glyphs(classes=48, examples=12, alphabets=4)


@pytest.fixture(autouse=True)
def glyphs(monkeypatch):
    """Glyphs are few and quickly drawn."""
    pool = small_glyphs()
    monkeypatch.setattr(data, "glyphs", lambda **settings: pool)
    monkeypatch.delenv("BILEVEL_DATA", raising=False)


@pytest.fixture
def settings():
    """Makes small settings of a learner."""
    from bilevel.experiments.few_shot import Settings

    small = {
        "ways": 3,
        "queries": 2,
        "tasks": 2,
        "channels": 4,
        "inner_steps": 2,
        "steps": 3,
        "eval_tasks": 5,
        "threads": 1,
    }
    return lambda learner="imaml", **given: Settings.of(learner, **{**small, **given})


class Silent:
    """A watcher that keeps what it is told."""

    def __init__(self):
        self.records, self.results, self.stop_after = [], [], None

    def start(self, title, choices, folder):
        self.title = title

    def training(self, steps, minutes, done=0):
        return self

    def evaluating(self, tasks):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def update(self, record, cpu_seconds):
        self.records.append(record)
        if self.stop_after is not None and len(self.records) >= self.stop_after:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)

    def advance(self, count):
        pass

    def finish(self, accuracies, note, cost, files, *, interrupted):
        self.results.append((accuracies, note, interrupted))


@pytest.fixture
def watcher():
    """A watcher that shows nothing."""
    return Silent()


@pytest.fixture
def watchers():
    """Makes watchers that show nothing."""
    return Silent
