"""What fills the pages refuses what it cannot fill, and finds the source of every public name."""

import importlib
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

HOOKS = Path(__file__).resolve().parents[2] / "docs" / "hooks"
PACKAGES = ("bilevel", "bilevel.solvers", "bilevel.problems")


@pytest.fixture
def load(monkeypatch):
    """Import a hook as MkDocs does: with its siblings beside it."""
    monkeypatch.syspath_prepend(str(HOOKS))

    def by_name(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return by_name


@pytest.fixture
def page():
    return SimpleNamespace(file=SimpleNamespace(src_uri="concepts/x.md"), url="concepts/x/")


def test_a_number_comes_from_its_file(load, page):
    results = load("results")
    filled = results.on_page_markdown("{{ value reliability cases cases=silent }}", page=page)
    assert filled == "0"


@pytest.mark.parametrize(
    ("directive", "error"),
    [
        ("{{ value reliability cases }}", ValueError),
        ("{{ value reliability nothing cases=all }}", ValueError),
        ("{{ value no-such-file cases }}", FileNotFoundError),
        ("{{ picture no-such-file A picture. }}", FileNotFoundError),
        ("{{ table no-such-file }}", FileNotFoundError),
    ],
)
def test_what_cannot_be_filled_is_refused(load, page, directive, error):
    with pytest.raises(error):
        load("results").on_page_markdown(directive, page=page)


def test_what_never_changes_is_said_once(load):
    rows = [
        {
            "setting": {"data": "glyphs", "ways": 5, "shots": shots},
            "metric": "error",
            "value": 0.5,
        }
        for shots in (1, 5)
    ]
    lines = load("results")._numbers(rows).splitlines()
    assert lines[0] == "In all rows: data glyphs, ways 5."
    assert lines[2] == "| shots | metric | value |"
    assert lines[4] == "| 1 | error | 0.5 |"


def test_a_results_file_that_is_shown_nowhere_is_refused(load, tmp_path):
    (tmp_path / "site" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results").mkdir(parents=True)
    config = {"site_dir": tmp_path / "site", "docs_dir": tmp_path / "docs"}
    with pytest.raises(ValueError, match="stands 0 times"):
        load("results").on_post_build(config)


def test_every_public_class_and_function_has_its_source(load):
    sources = load("sources")
    lost = []
    for package in map(importlib.import_module, PACKAGES):
        for name in package.__all__:
            thing = getattr(package, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                home = f"{package.__name__}.{name}"
                # A function may have the name of its module.
                places = sources._place(home), sources._place(f"{home}.{name}")
                lost += [home] * (not any(places))
    assert not lost


def test_a_link_leads_to_the_line_of_the_definition(load):
    path, line = load("sources")._place("bilevel.doctor.doctor")
    source = HOOKS.parents[1] / f"{path}.py"
    assert source.read_text("utf-8").splitlines()[line - 1].startswith("def doctor(")


def test_what_every_reader_is_sent_is_light(load):
    weight = load("weight")
    page = "<p>a\n      b</p><pre>  kept\n    as it is</pre>"
    assert weight.on_page_content(page) == "<p>a\nb</p><pre>  kept\n    as it is</pre>"


def test_a_theme_that_changed_is_noticed(load):
    with pytest.raises(ValueError, match="accessible"):
        load("accessible").on_post_page("<html></html>")
