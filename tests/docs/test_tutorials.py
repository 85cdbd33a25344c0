"""Every tutorial runs, prints what its page says, and draws what its page shows."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from bilevel.registry import INNER_SOLVERS, LINEAR_SOLVERS, METHODS, PRECONDITIONERS, PROBLEMS

ROOT = Path(__file__).resolve().parents[2]

spec = importlib.util.spec_from_file_location("script", ROOT / "docs" / "hooks" / "script.py")
script = importlib.util.module_from_spec(spec)
sys.modules["script"] = script
spec.loader.exec_module(script)
SCRIPTS = script.scripts()
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def differences(printed: str, recorded: str, rtol: float = 2e-2) -> list[str]:
    """Lines that differ in a word, or in a number by more than ``rtol`` and its last digit.

    Rounding differs from one machine to the next, and the last digits of an iteration with it.
    """
    ours, theirs = printed.splitlines(), recorded.splitlines()
    if len(ours) != len(theirs):
        return [f"{len(ours)} lines, recorded were {len(theirs)}:\n{printed}"]
    return [
        f"printed   {a!r}\nrecorded  {b!r}"
        for a, b in zip(ours, theirs, strict=True)
        if not alike(a, b, rtol)
    ]


def alike(printed: str, recorded: str, rtol: float) -> bool:
    words = [" ".join(NUMBER.sub(" # ", line).split()) for line in (printed, recorded)]
    if words[0] != words[1]:
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(recorded), strict=True)
    return all(abs(float(a) - float(b)) <= rtol * abs(float(b)) + last_digit(b) for a, b in pairs)


def last_digit(number: str) -> float:
    """One unit of the last digit that was printed."""
    mantissa, _, exponent = number.partition("e")
    digits = len(mantissa.partition(".")[2])
    return float(10 ** (int(exponent or 0) - digits)) if digits or exponent else 0.0


def test_there_are_tutorials():
    assert len(SCRIPTS) >= 9


@pytest.fixture
def _as_it_was(monkeypatch):
    """A script may set, or register, what holds for the whole process."""
    for registry in (INNER_SOLVERS, LINEAR_SOLVERS, METHODS, PRECONDITIONERS, PROBLEMS):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.mark.usefixtures("_as_it_was")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_tutorial(path, tmp_path, monkeypatch):
    tutorial = script.Tutorial(path)
    if tutorial.needs_data and not os.environ.get("BILEVEL_DATA"):
        pytest.skip("reads real data; set BILEVEL_DATA to their folder")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    found = []
    for printed, recorded in zip(tutorial.run(), tutorial.record, strict=True):
        found += differences(printed, recorded["printed"])
    assert not found, "\n".join(found)
    for picture in tutorial.pictures:
        written, shown = tmp_path / picture, path.parent / picture
        assert written.stat().st_size == pytest.approx(shown.stat().st_size, rel=0.2), picture


@pytest.mark.parametrize(
    ("printed", "same"),
    [
        ("error 1.01e-03 after 7 steps", True),
        ("error 1.20e-03 after 7 steps", False),
        ("error 1.00e-03 after 8 steps", False),
        ("error 1.00e-03 after 7 step", False),
        ("error  1.00e-03 after 7 steps", True),
        ("error 1.00e-03 after 7 steps\n", True),
        ("error 1.00e-03 after 7 steps\nmore", False),
    ],
)
def test_what_counts_as_the_same(printed, same):
    assert (not differences(printed, "error 1.00e-03 after 7 steps\n")) == same


def test_a_record_of_another_script_is_refused(tmp_path):
    path = tmp_path / "one.py"
    path.write_text("# %% [markdown]\n# # Title\n\n# %%\nprint(1)\n")
    tutorial = script.Tutorial(path)
    tutorial.write_record(list(tutorial.run()))
    assert [one["printed"] for one in script.Tutorial(path).record] == ["1\n"]
    path.write_text(path.read_text().replace("1", "2"))
    with pytest.raises(ValueError, match="make tutorials"):
        script.Tutorial(path).markdown()


def test_a_script_must_begin_with_text(tmp_path):
    path = tmp_path / "one.py"
    path.write_text("import torch\n# %%\n")
    with pytest.raises(ValueError, match="must begin"):
        _ = script.Tutorial(path).cells
