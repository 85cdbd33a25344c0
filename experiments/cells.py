"""The cells of a table of accuracies: finished runs, read from their folders."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel.run_folder import CONFIG, RESULT, RunFolderError, read_json

from .few_shot import Settings
from .reproduction import Origin, percent

__all__ = ["Cell", "Entry", "cell_folder", "origin", "read_cell"]

_EVALUATION = ("eval_tasks", "eval_queries")


@dataclass(frozen=True)
class Cell:
    """A finished run of the table."""

    row: str
    column: str
    seed: int
    folder: Path
    config: dict[str, Any]
    result: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings."""
        found: dict[str, Any] = self.config["settings"]
        return found

    @property
    def accuracy(self) -> tuple[float, float, int]:
        """Mean, 95 % interval and number of test tasks."""
        one = self.result["accuracy"]["trained"]
        return one["mean"], one["interval"], one["tasks"]

    @property
    def unusable(self) -> int:
        """Test tasks that could not be adapted to."""
        found: int = self.result["accuracy"]["trained"].get("unusable", 0)
        return found

    def differs_from(self, settings: Settings) -> str | None:
        """The first setting in which it is not what is asked for, evaluation included."""
        name = settings.differs_from(self.settings)
        others = (one for one in _EVALUATION if self.settings[one] != getattr(settings, one))
        return name or next(others, None)


@dataclass(frozen=True)
class Entry:
    """The cells of one row and column, over their seeds.

    Raises:
        RunFolderError: They differ in more than the seed.
    """

    cells: tuple[Cell, ...]

    def __post_init__(self) -> None:
        first = self.cells[0]
        for cell in self.cells[1:]:
            name = cell.differs_from(Settings(**{**first.settings, "seed": cell.seed}))
            if name is not None:
                raise RunFolderError(
                    f"'{cell.folder}' has {name} = {cell.settings.get(name)!r}, but "
                    f"'{first.folder}' has {first.settings.get(name)!r}, so that they are no seeds "
                    "of one another; remove one of the folders, or run both alike"
                )

    @property
    def mean(self) -> float:
        """Mean accuracy over seeds."""
        return sum(cell.accuracy[0] for cell in self.cells) / len(self.cells)

    @property
    def interval(self) -> float:
        """95 % interval over all test tasks of all seeds."""
        return math.sqrt(sum(cell.accuracy[1] ** 2 for cell in self.cells)) / len(self.cells)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the first seed; the others differ in the seed alone."""
        return self.cells[0].settings

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds."""
        return tuple(cell.seed for cell in self.cells)

    @property
    def text(self) -> str:
        """For people: with how far the seeds lie apart."""
        means = [cell.accuracy[0] for cell in self.cells]
        more = f" ({len(means)} seeds, {percent(min(means))} to {percent(max(means))})"
        return percent(self.mean, self.interval) + (more if len(means) > 1 else "")


def cell_folder(out: Path, row: str, column: str, seed: int) -> Path:
    """Where a cell's run is, or will be."""
    return out / "cells" / f"{row}-{column}-seed{seed}"


def read_cell(out: Path, row: str, column: str, seed: int) -> Cell | None:
    """A cell; None where its run is not finished.

    Raises:
        RunFolderError: A file of the run is damaged.
    """
    path = cell_folder(out, row, column, seed)
    if not (path / RESULT).is_file():
        return None
    result = read_json(path / RESULT)
    if "finished" not in result:
        raise RunFolderError(f"'{path / RESULT}' is no result of a run; remove the folder '{path}'")
    if not result["finished"]:
        return None
    return Cell(row, column, seed, path, read_json(path / CONFIG), result)


def origin(cells: Sequence[Cell]) -> Origin:
    """What made the numbers, whichever process shows them."""

    def listed(texts: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(texts))

    return Origin(
        tuple(sorted({cell.seed for cell in cells})),
        listed(cell.settings["device"] for cell in cells),
        listed(cell.result["commit"] for cell in cells),
        listed(
            "{processor}, {cores} cores, torch {torch}, {threads} threads".format(
                **cell.result["machine"], torch=cell.result["torch"]
            )
            for cell in cells
        ),
    )
