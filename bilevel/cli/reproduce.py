"""``bilevel reproduce``: a published table or figure, run again."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bilevel.build import find

from .display import Display
from .siblings import load, split_options

__all__ = ["reproduce"]

_experiments: Any = load("experiments")
_few_shot: Any = load("experiments.few_shot")
_NAMES = ", ".join(_experiments.REPRODUCTIONS)


def reproduce(
    name: Annotated[str, typer.Argument(help=f"What to reproduce: {_NAMES}.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Minutes on two cores, to see the trends.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for runs and results; default: runs/NAME or runs/NAME-quick."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them.")] = "0",
    columns: Annotated[
        str | None, typer.Option(help="Columns of a table, with commas; default: all.")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="Rows of a table, with commas; default: all.")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A setting of every run, such as tasks=8; repeat it."
        ),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(envvar="BILEVEL_DATA", help="Folder with the data sets.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show the result only.")] = False,
) -> None:
    """Run a published table or figure again, and put it beside the published numbers.

    The folder keeps what is finished: after Ctrl-C or a crash the same command goes on from there.
    """
    reproduction = find("reproduction", name, _experiments.REPRODUCTIONS)
    folder = out or Path("runs") / (f"{name}-quick" if quick else name)
    options = _experiments.Options(
        out=folder,
        quick=quick,
        seeds=_seeds(seeds),
        columns=_words(columns),
        rows=_words(rows),
        changes={
            key: _few_shot.Settings.read(key, text)
            for key, text in split_options(change or [], "--set").items()
        },
        root=None if root is None else str(root),
        device=device,
        threads=threads,
        command=_command(),
    )
    console = Console(highlight=False)
    outcome = reproduction.run(options, _CellDisplay(console, quiet=quiet))
    show(console, reproduction, outcome)
    for ending in ("md", "json", "png"):
        path = folder / f"{name}.{ending}"
        if path.exists():
            console.print(f"  {path}", soft_wrap=True, markup=False)
    if not outcome.finished:
        console.print("[yellow]Interrupted.[/yellow] The same command goes on from here.")
        raise typer.Exit(130)
    if not all(check.ok for check in outcome.checks):
        raise typer.Exit(1)


class _CellDisplay(Display):
    """Of each run of a table, its title, how it goes, and one line of result."""

    def start(self, title: str, choices: Mapping[str, str], folder: str) -> None:
        """What is about to run."""
        if not self.quiet:
            self.console.print(f"[bold]{title}[/bold]  [dim]{folder}[/dim]", soft_wrap=True)

    def finish(
        self,
        accuracies: Mapping[str, tuple[float, str]],
        note: str,
        cost: str,
        files: Sequence[Path],
        *,
        interrupted: bool,
    ) -> None:
        """The accuracy and the cost."""
        if not self.quiet:
            for _, text in accuracies.values():
                self.console.print(f"{text}, {cost}\n", soft_wrap=True, markup=False)


def show(console: Console, reproduction: Any, outcome: Any) -> None:
    """The table beside the published numbers, and the claims that were checked."""
    console.print(f"\n[bold]{reproduction.title}[/bold]")
    console.print(f"[dim]{reproduction.source}[/dim]\n")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, head in enumerate(outcome.table.head):
        table.add_column(head, justify="left" if i == 0 else "right")
    for line in outcome.table.body:
        table.add_row(*line)
    console.print(table)
    for check in outcome.checks:
        mark = "[green]yes[/green]" if check.ok else "[bold red]no[/bold red] "
        console.print(f"{mark} {check.claim} [dim]({check.found})[/dim]")
    if outcome.checks:
        console.print()


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(word) for word in _words(text))
    except ValueError:
        seeds = ()
    if not seeds:
        raise ValueError(f"`--seeds` is '{text}'; write whole numbers, such as 0,1,2")
    return seeds


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def _command() -> str:
    """The command line as typed, without the folders of this machine."""
    words, hidden = ["bilevel"], False
    for word in sys.argv[1:]:
        flag = word.partition("=")[0]
        place = flag in ("--root", "--out")
        words.append("DIR" if hidden else f"{flag}=DIR" if place and flag != word else word)
        hidden = place and flag == word
    return " ".join(words)
