"""Whatever is shown is run: examples in docstrings, in the README and in the documentation."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
from pathlib import Path

import pytest

from tests.printed import differences

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("bilevel", "bilevel.solvers", "bilevel.problems")
BLOCK = re.compile(
    r"^```python\n(.*?)^```"
    r"(?:\n\n```text title=\"Output(, times of one machine)?\"\n(.*?)^```)?",
    flags=re.MULTILINE | re.DOTALL,
)
PAGES = [
    pytest.param(page, id=page.relative_to(ROOT).as_posix())
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if BLOCK.search(page.read_text("utf-8"))
]


def modules() -> list[str]:
    """Names of all modules in the three packages."""
    found = set(PACKAGES)
    for package in PACKAGES:
        path = importlib.import_module(package).__path__
        found |= {module.name for module in pkgutil.walk_packages(path, f"{package}.")}
    return sorted(found)


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.usefixtures("as_it_was")
@pytest.mark.parametrize("page", PAGES)
def test_page_examples(page, tmp_path, monkeypatch):
    """The blocks of a page run in order, share their names, and print what the page says."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text("utf-8")
    names = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        # Blank lines in front, so that a traceback names the line of the page.
        lines = "\n" * text.count("\n", 0, block.start(1))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(lines + block.group(1), str(page), "exec"), names)
        measured, shown = block.group(2, 3)
        if measured:
            found = differences(printed.getvalue(), shown, measured=True)
            assert not found, "\n".join(found)
        elif shown is not None:
            assert printed.getvalue() == shown
