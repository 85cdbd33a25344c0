"""Every public name is explained where it is defined, and has its place on an API page."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "bilevel",
    "bilevel.solvers",
    "bilevel.problems",
    "bilevel.experiments",
    "bilevel.experiments.few_shot",
)
NAMES = [
    (package, name)
    for package in PACKAGES
    for name in getattr(importlib.import_module(package), "__all__", ())
]
DOCUMENTED = {
    entry
    for page in (ROOT / "docs" / "api").glob("*.md")
    for entry in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), flags=re.MULTILINE)
}


def own_docstring(thing: object) -> str | None:
    """Docstring that was written for ``thing``: neither inherited nor made by `dataclass`."""
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    made = inspect.isclass(thing) and text and text.startswith(f"{thing.__name__}(")
    return None if made else text


def identifier(package: str, name: str) -> str:
    """How an API page names it; a module of the same name would be documented in its place."""
    module = getattr(getattr(importlib.import_module(package), name), "__module__", None) or ""
    return f"{module if module.endswith(f'.{name}') else package}.{name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_package_says_what_is_public(package):
    names = importlib.import_module(package).__all__
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_public_name_has_a_docstring(package, name):
    thing = getattr(importlib.import_module(package), name)
    if inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing):
        assert own_docstring(thing)


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_public_name_has_an_api_entry(package, name):
    if not name.startswith("__"):
        entry = identifier(package, name)
        assert entry in DOCUMENTED, f"add `::: {entry}` to docs/api"


def test_api_pages_name_nothing_else():
    assert not DOCUMENTED - {identifier(package, name) for package, name in NAMES}
