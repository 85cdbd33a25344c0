"""No tracked file speaks of the machine that it was written on."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Absolute paths below somebody's own folders; the pattern does not match its own source.
OWNERS = "|".join(["work", "root", "home", "Users"])
PLACES = re.compile(rf"(?<![\w.~\])}}*>-])/({OWNERS})/\w|[.]library\b")


def tracked() -> list[Path]:
    """Files that git tracks or would track."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [ROOT / name for name in listing.split("\0") if name]


def test_the_pattern_knows_a_machine_path():
    path = "/".join(["", "home", "me", "data"])
    assert PLACES.search(f'open("{path}")')
    assert PLACES.search(path)
    assert not PLACES.search(f"docs{path} https://example.org{path} ${{TOP}}{path}")


def test_no_tracked_file_names_a_machine_path():
    found = []
    for path in tracked():
        if not path.is_file():
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if PLACES.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not found
