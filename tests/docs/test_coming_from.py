"""The programs for other libraries print what the page says, where those libraries are installed.

None of them is a dependency, so that each is skipped where it is missing, or has another version.
"""

import contextlib
import importlib.metadata
import io
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "coming_from.md"
TEXT = PAGE.read_text("utf-8")
DATA = re.search(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL).group(1)
BLOCK = re.compile(
    r'^```python title="(?P<name>[\w-]+) (?P<version>[\d.]+)[^"]*"\n(?P<code>.*?)^```'
    r'\n\n```text title="[^"]+"\n(?P<printed>.*?)^```',
    re.MULTILINE | re.DOTALL,
)
PACKAGES = {"higher": "higher", "TorchOpt": "torchopt", "Betty": "betty-ml", "jaxopt": "jaxopt"}
PROGRAMS = [pytest.param(block, id=block["name"]) for block in BLOCK.finditer(TEXT)]


def test_every_packaged_library_is_shown():
    assert {one.values[0]["name"] for one in PROGRAMS} == set(PACKAGES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", PROGRAMS)
def test_program_of_another_library(block):
    package = PACKAGES[block["name"]]
    here = [one.version for one in importlib.metadata.distributions(name=package)]
    if block["version"] not in here:
        pytest.skip(f"{package} {block['version']} is not installed")
    names = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(DATA, names)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(block["code"], names)
    assert without_log(printed.getvalue()) == without_log(block["printed"])


def without_log(printed):
    """The lines that are no log entries, which one of them prints."""
    return [line for line in printed.splitlines() if line and not re.match(r"\[\d{4}-", line)]
