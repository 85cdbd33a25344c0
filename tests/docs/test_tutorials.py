"""Every tutorial runs, prints what its page says, and draws what its page shows."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from tests.printed import differences

ROOT = Path(__file__).resolve().parents[2]

spec = importlib.util.spec_from_file_location("script", ROOT / "docs" / "hooks" / "script.py")
script = importlib.util.module_from_spec(spec)
sys.modules["script"] = script
spec.loader.exec_module(script)
SCRIPTS = script.scripts()


def test_there_are_tutorials():
    assert len(SCRIPTS) >= 9


@pytest.mark.usefixtures("as_it_was")
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
        ("error 1.00e-02 after 7 steps", False),
        ("error 1.00e-03 after 7 steps\n", True),
        ("error 1.00e-03 after 7 steps\nmore", False),
    ],
)
def test_what_counts_as_the_same(printed, same):
    assert (not differences(printed, "error 1.00e-03 after 7 steps\n")) == same


@pytest.mark.parametrize(
    ("printed", "same"),
    [
        ("cost 9 ms; 7 gradients\n----", True),
        ("cost 9 ms;\n7 gradients\n--------", True),
        ("cost 9 ms; 8 gradients\n----", False),
        ("cost 9 ms; 7 products\n----", False),
    ],
)
def test_what_counts_as_the_same_where_times_are_measured(printed, same):
    shown = "cost 1.5 s; 7 gradients\n------"
    assert (not differences(printed, shown, measured=True)) == same
    assert differences(printed, shown)


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
