"""A table of accuracies: learners in rows, tasks in columns, one run for each cell and seed.

A cell is a run folder of its own. What is finished is not run again, and what was interrupted goes
on from its checkpoint, so that a table may be filled in several sittings, or by several processes
with different rows, columns or seeds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bilevel import SolveError

from .cells import Cell, Entry, cell_folder, origin, read_cell
from .few_shot import LEARNERS, Settings, run
from .few_shot.run import Watcher
from .reproduction import Check, Options, Outcome, Reproduction, Table, percent
from .results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AccuracyTable", "published_cells"]

# Options of the command, or what names a column: no setting to change.
_ELSEWHERE = {
    "learner": "rows",
    "ways": "columns",
    "shots": "columns",
    "seed": "seeds",
    "root": "root",
    "device": "device",
    "threads": "threads",
}

Published = Mapping[tuple[str, str], tuple[float, float]]


class AccuracyTable(Reproduction):
    """A table of accuracies; authors say what its columns, rows and published numbers are.

    Attributes:
        tasks: Settings of each column, by its name.
        learners: Names of the learners, in the order of the rows.
        published: Accuracy and interval as shares of 1, by row and column.
        data: What the published numbers were measured on.
        defining: Settings that name a column, and can be changed in none.
    """

    takes = ("seeds", "device")

    tasks: ClassVar[Mapping[str, dict[str, Any]]] = {}
    learners: ClassVar[tuple[str, ...]] = ()
    published: ClassVar[Published] = {}
    data: ClassVar[str]
    defining: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.columns, cls.rows = tuple(cls.tasks), cls.learners

    @abstractmethod
    def base(self, options: Options) -> dict[str, Any]:
        """Settings of every cell, quick or not."""

    @abstractmethod
    def checks(self, entries: Mapping[tuple[str, str], Entry], options: Options) -> list[Check]:
        """The claims of the published table, as far as there are cells to judge them by."""

    def has(self, row: str, column: str) -> bool:
        """Whether there is such a cell in the table."""
        return True

    def selected(self, options: Options) -> list[tuple[str, str, int]]:
        """Row, column and seed of the cells that are asked for."""
        rows = options.rows or self.rows
        columns = options.columns or self.columns
        return [
            (row, column, seed)
            for seed in options.seeds
            for column in columns
            for row in rows
            if self.has(row, column)
        ]

    def settings(self, row: str, column: str, seed: int, options: Options) -> Settings:
        """The settings of a cell: of its learner, of its column, and what the user changes."""
        usual = {**self.tasks[column], **self.base(options), **options.changes}
        # What makes a learner what it is, is not up for change.
        own = LEARNERS[row].settings
        usual = {name: value for name, value in usual.items() if name not in own}
        place = {"seed": seed, "device": options.device, "threads": options.threads}
        return Settings.of(row, **{**usual, **place, "root": options.root})

    def _run(self, options: Options, watcher: Watcher) -> Outcome:
        self._check_changes(options)
        finished, failed = True, []
        for row, column, seed in self.selected(options):
            settings = self.settings(row, column, seed, options)
            cell = read_cell(options.out, row, column, seed)
            if cell is not None and cell.differs_from(settings) is None:
                continue
            path = cell_folder(options.out, row, column, seed)
            try:
                finished = run(settings, path, watcher, resume=True, baselines=False)
            except SolveError as error:
                # The other cells may fare better; the same command tries this one again.
                claim = f"{row} {column}, seed {seed}: training comes to its end"
                failed.append(Check(claim, ok=False, found=str(error)))
            if not finished:
                break
        entries = self.entries(options.out)
        cells = [cell for entry in entries.values() for cell in entry.cells]
        return Outcome(
            list(self._rows(entries)),
            self._table(entries, self._shown(entries, options)),
            self.draw(entries) if entries else None,
            (*failed, *_no_leak(cells), *_usable(cells), *self.checks(entries, options)),
            finished,
            origin(cells) if cells else None,
        )

    def _check_changes(self, options: Options) -> None:
        """Refuse changes that would be without effect, or make another column of one.

        Raises:
            ValueError: There is such a change, or no cell is selected.
        """
        rows = {row for row, _, _ in self.selected(options)}
        if not rows:
            raise ValueError(
                f"{self.name} has no cell in columns {', '.join(options.columns)} of rows "
                f"{', '.join(options.rows)}; leave one of the two out"
            )
        for name in options.changes:
            if name in _ELSEWHERE:
                raise ValueError(f"`{name}` cannot be set; choose by `{_ELSEWHERE[name]}`")
            if name in self.defining:
                raise ValueError(f"`{name}` names the columns of {self.name}; choose by `columns`")
            if all(name in LEARNERS[row].settings for row in rows):
                listed = ", ".join(sorted(rows))
                raise ValueError(f"`{name}` is what makes {listed}, and cannot be set")

    def entries(self, out: Path) -> dict[tuple[str, str], Entry]:
        """What is finished in a folder, whichever call it was asked for by."""
        found: dict[tuple[str, str], list[Cell]] = {}
        for row in self.rows:
            for column in self.columns:
                for path in sorted(out.glob(f"cells/{row}-{column}-seed*")):
                    seed = path.name.rpartition("seed")[2]
                    cell = read_cell(out, row, column, int(seed)) if seed.isdecimal() else None
                    if cell is not None:
                        found.setdefault((row, column), []).append(cell)
        return {key: Entry(tuple(cells)) for key, cells in found.items()}

    def _comparable(self, entries: Mapping[tuple[str, str], Entry]) -> Published:
        """The published numbers: none beside other data, nor beside another evaluation."""
        if any(entry.settings["data"] != self.data for entry in entries.values()):
            return {}
        other = {
            (row, column)
            for (row, column), entry in entries.items()
            if entry.settings["eval_queries"] != self.tasks[column].get("eval_queries")
        }
        return {key: value for key, value in self.published.items() if key not in other}

    def _rows(self, entries: Mapping[tuple[str, str], Entry]) -> Iterator[Row]:
        for (row, column), entry in entries.items():
            where = {"learner": row, "task": column, **_common(entry)}
            reference = {}
            if (row, column) in self._comparable(entries):
                value, interval = self.published[row, column]
                text = f"{self.source.split(',')[0]}, ±{100 * interval:.2g} points"
                reference = {"source": text, "value": value}
            yield Row(
                where,
                "test_accuracy",
                round(entry.mean, 5),
                ci95=round(entry.interval, 5),
                reference=reference,
            )
            for cell in entry.cells:
                here = {**where, "seed": cell.seed, "commit": cell.result["commit"]}
                mean, interval, _ = cell.accuracy
                yield Row(here, "test_accuracy", round(mean, 5), ci95=round(interval, 5))
                minutes = round(cell.result["train_cpu_minutes"], 1)
                yield Row(here, "training_cpu_minutes", minutes)
                yield Row(here, "indefinite_share", round(_share(cell.result, "INDEFINITE"), 5))

    def _shown(self, entries: Mapping[tuple[str, str], Entry], options: Options) -> tuple[str, ...]:
        """The columns of the table: all of the published one, or those that a quick run has."""
        if not options.quick:
            return self.columns
        return tuple(c for c in self.columns if any((r, c) in entries for r in self.rows))

    def _table(self, entries: Mapping[tuple[str, str], Entry], columns: tuple[str, ...]) -> Table:
        published, body = self._comparable(entries), []
        for row in self.rows:
            known = any((row, column) in entries for column in columns)
            printed = any((row, column) in published for column in columns)
            if not (known or printed):
                continue
            missing = {
                column: "not measured" if self.has(row, column) else "–" for column in columns
            }
            texts = [
                entries[row, column].text if (row, column) in entries else missing[column]
                for column in columns
            ]
            body.append((LEARNERS[row].title, *texts))
            if printed:
                values = [
                    percent(*published[row, column]) if (row, column) in published else ""
                    for column in columns
                ]
                body.append(("  published", *values))
        found = dict.fromkeys(entry.settings["data"] for entry in entries.values())
        data = ", ".join(found) or self.data
        return Table((f"{data}, accuracy in %", *columns), tuple(body))

    def draw(self, entries: Mapping[tuple[str, str], Entry]) -> Figure:
        """Accuracies with their intervals, published ones beside them; a panel for each column."""
        from .pictures import COLORS, INK, new_figure, tidy

        published = self._comparable(entries)
        columns = [c for c in self.columns if any((r, c) in entries for r in self.rows)]
        rows = [r for r in self.rows if any((r, c) in entries for c in columns)]
        figure = new_figure(3.0 + 2.9 * len(columns), 1.4 + 0.42 * len(rows))
        panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for axes, column in zip(panels, columns, strict=True):
            for i, row in enumerate(rows):
                if (row, column) in entries:
                    entry = entries[row, column]
                    axes.errorbar(
                        100 * entry.mean, i, xerr=100 * entry.interval, fmt="o",
                        color=COLORS[2], capsize=3, label="measured" if i == 0 else None,
                    )  # fmt: skip
                if (row, column) in published:
                    value, interval = published[row, column]
                    axes.errorbar(
                        100 * value, i + 0.25, xerr=100 * interval, fmt="s", mfc="white",
                        color=COLORS[0], capsize=3,
                    )  # fmt: skip
            axes.set_title(column, fontsize=11)
            axes.set_xlabel("accuracy (%)", color=INK)
            tidy(axes)
        panels[0].set_yticks(range(len(rows)), [LEARNERS[row].title for row in rows])
        panels[0].set_ylim(len(rows) - 0.3, -0.5)
        measured = panels[0].plot([], [], "o", color=COLORS[2], label="measured")
        printed = panels[0].plot([], [], "s", color=COLORS[0], mfc="white", label="published")
        if any(key in published for key in entries):
            figure.legend(
                handles=[*measured, *printed], loc="outside lower right", frameon=False, ncols=2
            )
        figure.suptitle(self.title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
        return figure


def published_cells(
    rows: Mapping[str, Sequence[tuple[float, float]]], columns: Iterable[str]
) -> dict[tuple[str, str], tuple[float, float]]:
    """Published accuracies in percent, as shares of 1 by row and column."""
    names = tuple(columns)
    return {
        (row, column): (round(value / 100, 6), round(interval / 100, 6))
        for row, cells in rows.items()
        for column, (value, interval) in zip(names, cells, strict=True)
    }


_SHOWN = (
    "data",
    "network",
    "channels",
    "activation",
    "norm",
    "steps",
    "tasks",
    "queries",
    "eval_queries",
    "transductive",
)


def _common(entry: Entry) -> dict[str, Any]:
    """What all cells of an entry share, for the record."""
    settings = entry.settings
    out = {name: settings[name] for name in _SHOWN}
    out["seeds"] = len(entry.cells)
    return out


def _share(result: dict[str, Any], status: str) -> float:
    total = sum(result["status"].values())
    found: float = result["status"].get(status, 0) / total if total else 0.0
    return found


def _no_leak(cells: Sequence[Cell]) -> list[Check]:
    if not cells:
        return []
    shared = sum(cell.config["classes"]["shared"] for cell in cells)
    return [
        Check("no test class was trained on", shared == 0, f"{shared} shared in {len(cells)} runs")
    ]


def _usable(cells: Sequence[Cell]) -> list[Check]:
    """Named only where adaptation failed on a test task: its accuracy means little."""
    return [
        Check(
            f"{cell.row} {cell.column}, seed {cell.seed}: every test task can be adapted to",
            ok=False,
            found=f"{cell.unusable} of {cell.accuracy[2]} cannot",
        )
        for cell in cells
        if cell.unusable
    ]
