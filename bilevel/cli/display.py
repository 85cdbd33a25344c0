"""What a user sees of a run: a live bar in a terminal, plain lines in a log, or nothing."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from bilevel import Record, Status

__all__ = ["Display", "TrainingBar"]

_WINDOW = 50
_LINES = 20
_LINE_SECONDS = 15.0
_FINE = {status.name for status in Status if status.ok}


class Display:
    """Shows a run on the console.

    Args:
        console: Where to; default: standard output.
        quiet: Show the result only.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(highlight=False)
        self.quiet = quiet

    def start(self, title: str, choices: Mapping[str, str], folder: str) -> None:
        """What is about to run."""
        if self.quiet:
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column()
        for name, text in {**choices, "run folder": folder}.items():
            grid.add_row(name, text)
        self.console.print(f"\n[bold]{title}[/bold]", grid, "", sep="\n")

    @contextlib.contextmanager
    def training(self, steps: int, minutes: float | None, done: int = 0) -> Iterator[TrainingBar]:
        """Show training while the context lasts; ``done`` steps were taken earlier."""
        bar: TrainingBar
        if self.quiet:
            yield _NoBar(steps, minutes, done)
        elif not self.console.is_terminal:
            yield _Lines(steps, minutes, done, self.console)
        else:
            bar = _LiveBar(steps, minutes, done)
            with Live(bar.render(), console=self.console, refresh_per_second=4) as live:
                bar.live = live
                yield bar

    @contextlib.contextmanager
    def evaluating(self, tasks: int) -> Iterator[EvaluationBar]:
        """Show the evaluation while the context lasts."""
        progress = Progress(
            TextColumn("evaluating"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("tasks"),
            console=self.console,
            transient=True,
            disable=self.quiet or not self.console.is_terminal,
        )
        if not self.quiet and not self.console.is_terminal:
            self._line("evaluating on held-out classes")
        with progress:
            yield EvaluationBar(progress, tasks)

    def finish(
        self,
        accuracies: Mapping[str, tuple[float, str]],
        note: str,
        cost: str,
        files: Sequence[Path],
        *,
        interrupted: bool,
    ) -> None:
        """The result: the first accuracy, and how far it is above each of the others."""
        if interrupted:
            self.console.print("\n[yellow]Interrupted.[/yellow] What was reached is kept.")
        else:
            first = next(iter(accuracies.values()))[0]
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
            table.add_column("held-out classes")
            table.add_column("accuracy", justify="right")
            table.add_column("below, in points", justify="right", style="dim")
            for i, (name, (mean, text)) in enumerate(accuracies.items()):
                gap = "" if i == 0 else f"{100 * (first - mean):.1f}"
                table.add_row(name, text, gap, style="bold" if i == 0 else None)
            self.console.print("", table, sep="\n")
            self.console.print(f"[dim]{note}[/dim]\n")
        self._line(cost)
        for path in files:
            if path.exists():
                self._line(f"  {path}")

    def _line(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)


class EvaluationBar:
    """Counts evaluated tasks."""

    def __init__(self, progress: Progress, tasks: int) -> None:
        self._progress = progress
        self._task = progress.add_task("evaluating", total=tasks)

    def advance(self, count: int) -> None:
        """So many more tasks are done."""
        self._progress.advance(self._task, count)


class TrainingBar(ABC):
    """Moving means over the last steps, counts over all, and the time that is left."""

    def __init__(self, steps: int, minutes: float | None, done: int) -> None:
        self.steps = steps
        self.budget = None if minutes is None else 60 * minutes
        self.recent: deque[Record] = deque(maxlen=_WINDOW)
        self.done = done
        self.flagged = 0
        self.before = self.fraction = done / max(1, steps)
        self.started = time.perf_counter()

    def update(self, record: Record, cpu_seconds: float) -> None:
        """Take in one more step."""
        self.recent.append(record)
        self.done += 1
        self.flagged += sum(n for name, n in record.status.items() if name not in _FINE)
        self.fraction = self.done / self.steps
        if self.budget is not None:
            self.fraction = min(1.0, max(self.fraction, cpu_seconds / self.budget))
        self.show()

    @abstractmethod
    def show(self) -> None:
        """Show the state after a step."""

    def fields(self) -> dict[str, str]:
        """What is shown, by its name."""
        if not self.recent:
            return {}
        seconds = sum(record.seconds for record in self.recent)
        tasks = sum(record.tasks for record in self.recent)
        accuracy = self._mean([record.metrics["accuracy"] for record in self.recent])
        elapsed = time.perf_counter() - self.started
        return {
            "loss": f"{self._mean([r.outer_value for r in self.recent]):.3f}",
            "query accuracy": f"{100 * accuracy:.1f} %",
            "inner residual": f"{self._mean([r.inner_residual for r in self.recent]):.1e}",
            "linear residual": self._linear(),
            "tasks/s": f"{tasks / seconds:.1f}",
            "flagged": str(self.flagged),
            "left": _clock(elapsed * (1 - self.fraction) / max(self.fraction - self.before, 1e-9)),
        }

    def _linear(self) -> str:
        values = [r.linear_residual for r in self.recent if r.linear_residual is not None]
        return f"{self._mean(values):.1e}" if values else "–"

    @staticmethod
    def _mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)


class _NoBar(TrainingBar):
    """Shows nothing."""

    def show(self) -> None:
        pass


class _Lines(TrainingBar):
    """A plain line now and then, for logs."""

    def __init__(self, steps: int, minutes: float | None, done: int, console: Console) -> None:
        super().__init__(steps, minutes, done)
        self.console = console
        self.every = max(1, steps // _LINES)
        self.last = time.perf_counter()

    def show(self) -> None:
        now = time.perf_counter()
        due = self.done % self.every == 0 or now - self.last >= _LINE_SECONDS
        if not (due or self.fraction >= 1.0):
            return
        self.last = now
        text = " · ".join(f"{name} {value}" for name, value in self.fields().items())
        self.console.print(f"step {self.done}/{self.steps} · {text}", soft_wrap=True, markup=False)


class _LiveBar(TrainingBar):
    """A bar with a row of figures below it."""

    def __init__(self, steps: int, minutes: float | None, done: int) -> None:
        super().__init__(steps, minutes, done)
        self.live: Live | None = None
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), TaskProgressColumn()
        )
        self.row = self.progress.add_task(self._label(), total=1.0)

    def show(self) -> None:
        self.progress.update(self.row, completed=self.fraction, description=self._label())
        if self.live is not None:
            self.live.update(self.render())

    def render(self) -> RenderableType:
        """The bar and the figures."""
        figures = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        fields = self.fields()
        for name in fields:
            figures.add_column(name, justify="right", no_wrap=True)
        if fields:
            figures.add_row(*fields.values())
        return Group(self.progress, figures)

    def _label(self) -> str:
        return f"training  step {self.done}/{self.steps}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
