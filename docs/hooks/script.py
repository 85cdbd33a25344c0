"""Tutorials: scripts in cells, and the record of what they printed and drew.

A tutorial is a script that runs as it is, and opens as a notebook in most editors:
``# %% [markdown]`` begins a cell of text in comments, ``# %%`` a cell of code. The record beside it
holds what each cell printed; a picture that the text shows is one that the script wrote under that
name.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DOCS", "Cell", "Tutorial", "scripts"]

DOCS = Path(__file__).parent.parent

_CELL = re.compile(r"^# %%(.*)\n", flags=re.MULTILINE)
_PICTURE = re.compile(r"!\[[^\]]+\]\((?P<name>[\w-]+\.png)\)")
_NEEDS_DATA = "BILEVEL_DATA"


def scripts() -> list[Path]:
    """All scripts that are pages."""
    return sorted(p for p in DOCS.glob("*/*.py") if p.parent.name != "hooks")


@dataclass(frozen=True)
class Cell:
    """A cell of a script.

    Attributes:
        code: Python, or Markdown where ``is_text``.
        is_text: Whether it is to be read, not run.
        line: The line of the script on which ``code`` begins, from 0.
    """

    code: str
    is_text: bool
    line: int


class Tutorial:
    """A script of the documentation, with its record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = path.read_text("utf-8")

    @property
    def cells(self) -> list[Cell]:
        """The cells in order.

        Raises:
            ValueError: There is something in front of the first cell, or a line of a text cell
                is no comment.
        """
        first, *parts = _CELL.split(self.source)
        if first.strip():
            raise ValueError(f"{self.path.name} must begin with `# %% [markdown]`")
        cells, line = [], 0
        for kind, code in zip(parts[::2], parts[1::2], strict=True):
            line += 1
            is_text = kind.strip() == "[markdown]"
            text = self._text(code, line) if is_text else code.strip("\n")
            blank = 0 if is_text else len(code) - len(code.lstrip("\n"))
            cells.append(Cell(text, is_text, line + blank))
            line += code.count("\n")
        return cells

    def _text(self, code: str, line: int) -> str:
        lines = code.strip("\n").split("\n")
        for offset, one in enumerate(lines, line + 1):
            if one != "#" and not one.startswith("# "):
                raise ValueError(f"{self.path.name}, line {offset}: no comment in a text cell")
        return "\n".join(one[2:] for one in lines)

    @property
    def needs_data(self) -> bool:
        """Whether it reads real data from the folder that the environment names."""
        return _NEEDS_DATA in self.source

    @property
    def pictures(self) -> list[str]:
        """Files that the text shows."""
        return [m["name"] for c in self.cells if c.is_text for m in _PICTURE.finditer(c.code)]

    @property
    def record(self) -> list[dict[str, str]]:
        """What each code cell was and printed, when it was recorded.

        Raises:
            ValueError: It was recorded from another script.
        """
        path = self.path.with_suffix(".json")
        record: list[dict[str, str]] = json.loads(path.read_text("utf-8")) if path.exists() else []
        if [one["code"] for one in record] != [c.code for c in self.cells if not c.is_text]:
            raise ValueError(f"{self.path.name} changed; run `make tutorials`")
        return record

    def run(self) -> Iterator[str]:
        """What each code cell prints; pictures go into the current folder."""
        names = {"__name__": "__main__"}
        for cell in self.cells:
            if cell.is_text:
                continue
            # Blank lines in front, so that a traceback names the line of the script.
            code = compile("\n" * cell.line + cell.code, str(self.path), "exec", dont_inherit=True)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, names)
            yield printed.getvalue()

    def write_record(self, printed: list[str]) -> None:
        """Keep what a run printed."""
        codes = [cell.code for cell in self.cells if not cell.is_text]
        record = [{"code": c, "printed": p} for c, p in zip(codes, printed, strict=True)]
        text = json.dumps(record, indent=1, ensure_ascii=False)
        self.path.with_suffix(".json").write_text(text + "\n", "utf-8")

    def markdown(self) -> str:
        """The page: text, code, and under it what it printed."""
        outputs = iter(self.record)
        parts = []
        for cell in self.cells:
            if cell.is_text:
                parts.append(cell.code)
                continue
            printed = next(outputs)["printed"]
            if cell.code:
                parts.append(f"```python\n{cell.code}\n```")
            if printed:
                parts.append(f'```text title="Output"\n{printed.rstrip()}\n```')
        return "\n\n".join(parts) + "\n"
