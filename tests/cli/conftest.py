"""A small data set and small settings, so that a run takes a second."""

import functools

import pytest
from typer.testing import CliRunner

import bilevel.problems.data as data

SMALL = [
    "--ways=3",
    "--queries=2",
    "--tasks=2",
    "--channels=4",
    "--inner-steps=2",
    "--method-option=max_steps=1",
    "--steps=3",
    "--eval-tasks=5",
]


@functools.cache
def small_glyphs():
    return data.glyphs(classes=24, examples=5, alphabets=4)


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    """Run the command line in an empty folder; on a small data set."""
    from bilevel.cli.app import app

    pool = small_glyphs()
    monkeypatch.setattr(data, "glyphs", lambda **settings: pool)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BILEVEL_DATA", raising=False)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture
def train(invoke):
    """``bilevel train imaml`` with small settings; later arguments win."""
    return lambda *arguments: invoke("train", "imaml", *SMALL, *arguments)
