"""What a reproduction is: a published table or figure, run again beside its numbers."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bilevel.run_folder import RunFolder

from .few_shot.run import Watcher
from .results import Row, write_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Check", "Options", "Origin", "Outcome", "Reproduction", "Table"]


@dataclass(frozen=True)
class Options:
    """How to run a reproduction.

    Attributes:
        out: Folder for runs and results; what is finished in it is not run again.
        quick: Minutes on two cores, to see the trends; otherwise the published size.
        seeds: Seeds.
        columns: Which columns of a table; empty: all.
        rows: Which rows of a table; empty: all.
        changes: Settings that replace those of every run.
        root: Folder with the data sets.
        device: Where to run.
        threads: CPU threads.
        command: The command line, for the record.
    """

    out: Path
    quick: bool = False
    seeds: tuple[int, ...] = (0,)
    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)
    root: str | None = None
    device: str = "cpu"
    threads: int | None = None
    command: str = ""


@dataclass(frozen=True)
class Check:
    """A claim that the run confirms or not."""

    claim: str
    ok: bool
    found: str

    def __str__(self) -> str:
        return f"{'yes' if self.ok else 'NO'} · {self.claim}: {self.found}"


@dataclass(frozen=True)
class Table:
    """Text in rows and columns; the first column names the rows."""

    head: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As Markdown."""
        lines = [self.head, tuple("---" for _ in self.head), *self.body]
        return "".join("| " + " | ".join(line) + " |\n" for line in lines)


@dataclass(frozen=True)
class Origin:
    """Where numbers come from that an earlier process measured.

    Attributes:
        seeds: Seeds.
        device: Devices, with commas between them.
        commit: Commits that ran, likewise.
        machine: Machines, likewise.
    """

    seeds: tuple[int, ...]
    device: str
    commit: str
    machine: str


@dataclass(frozen=True)
class Outcome:
    """What a reproduction found.

    Attributes:
        rows: The numbers.
        table: The table beside the paper's.
        figure: The picture in the paper's layout; None where nothing was measured.
        checks: Claims, confirmed or not.
        finished: False where it was interrupted; the same command goes on.
        origin: Where the numbers come from; None: from this process.
    """

    rows: list[Row]
    table: Table
    figure: Figure | None
    checks: tuple[Check, ...] = ()
    finished: bool = True
    origin: Origin | None = None


class Reproduction(ABC):
    """One published table or figure; authors write `_run`.

    Attributes:
        name: What the command line calls it.
        title: What people call it.
        source: The paper, and where in it.
        columns: Names of the columns that can be chosen.
        rows: Names of the rows that can be chosen.
        takes: Which of the options ``seeds`` and ``device`` it heeds; others are refused.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    columns: ClassVar[tuple[str, ...]] = ()
    rows: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ()

    def run(self, options: Options, watcher: Watcher) -> Outcome:
        """Run it, and write a table, JSON and a picture into ``options.out``.

        Raises:
            ValueError: An option names nothing that is known.
            BilevelError: A run fails, or the folder cannot be written.
        """
        for kind in ("columns", "rows"):
            known, asked = getattr(self, kind), getattr(options, kind)
            for name in asked:
                if name not in known:
                    listed = ", ".join(known) or "none"
                    raise ValueError(f"`{kind}` of {self.name} has no '{name}'; known: {listed}")
        if options.changes and not self.rows:
            raise ValueError(f"{self.name} runs no learners, so there are no settings to change")
        for kind, usual in (("seeds", (0,)), ("device", "cpu")):
            if kind not in self.takes and getattr(options, kind) != usual:
                raise ValueError(f"{self.name} does not depend on `{kind}`; leave it out")
        folder = RunFolder(options.out, resume=True)
        outcome = self._run(options, watcher)
        self._write(folder, options, outcome)
        return outcome

    @abstractmethod
    def _run(self, options: Options, watcher: Watcher) -> Outcome:
        """Measure; resume what an earlier call left in ``options.out``."""

    def _write(self, folder: RunFolder, options: Options, outcome: Outcome) -> None:
        if outcome.rows:
            origin = outcome.origin
            path = write_results(
                folder.path,
                self.name,
                [],
                outcome.rows,
                list(origin.seeds) if origin else [],
                device=origin.device if origin else options.device,
                command=options.command,
                measured_at=origin.commit if origin else None,
                machine=origin.machine if origin else None,
            )
            text = path.read_text()
            content = {
                **json.loads(text),
                "title": self.title,
                "source": self.source,
                "table": vars(outcome.table),
                "checks": [vars(check) for check in outcome.checks],
            }
            folder.write_json(path.name, content)
        text = f"# {self.title}\n\n{self.source}.\n\n{outcome.table.markdown()}\n"
        text += "".join(f"- {check}\n" for check in outcome.checks)
        folder.write(f"{self.name}.md", lambda file: file.write(text.encode()))
        if outcome.figure is not None:
            figure = outcome.figure
            folder.write(f"{self.name}.png", lambda file: figure.savefig(file, format="png"))


def within(value: float, expected: float, share: float, rounding: float = 0.0) -> bool:
    """Whether ``value`` is ``expected`` within a share of it, and what its rounding hides."""
    return abs(value - expected) <= share * abs(expected) + rounding


def percent(mean: float, interval: float | None = None) -> str:
    """A share of 1 in percent, with its interval."""
    return f"{100 * mean:.2f}" + ("" if interval is None else f" ± {100 * interval:.2f}")


def spread(values: Sequence[float]) -> float:
    """Largest less smallest."""
    return max(values) - min(values)
