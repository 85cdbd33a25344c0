"""``bilevel train tolls`` and ``bilevel train network-design``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bilevel import OuterStep

from .display import Display
from .siblings import load

__all__ = ["RoadDisplay", "network_design", "tolls"]

Root = Annotated[
    Path | None, typer.Option(envvar="BILEVEL_DATA", help="Folder with the data sets.")
]
Steps = Annotated[int, typer.Option(min=1, help="The most outer steps in each stage.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Run folder; default: runs/…, with the time in its name."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show the result only.")]


class RoadDisplay:
    """Shows the search and its result on the console.

    Args:
        console: Where to; default: standard output.
        quiet: Show the result only.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.display = Display(console, quiet=quiet)
        self.console, self.quiet = self.display.console, quiet
        self.live: Live | None = None
        self.stage = -1

    def start(self, title: str, choices: Mapping[str, str], folder: str) -> None:
        """What is about to run."""
        self.display.start(title, choices, folder)
        if not self.quiet and self.console.is_terminal:
            self.live = Live(Text(""), console=self.console, refresh_per_second=8)
            self.live.start()

    def step(self, stage: int, stages: int, record: OuterStep) -> None:
        """An outer step was taken: a line that changes, or in a log one for each ten."""
        text = (
            f"stage {stage + 1}/{stages} · step {record.step} · value {record.value:.8g} · "
            f"slope {record.gradient_norm:.1e} · {record.seconds:.1f} s"
        )
        if self.live is not None:
            self.live.update(Text(text))
        elif not self.quiet and (stage != self.stage or record.step % 10 == 0):
            self.console.print(text, soft_wrap=True, markup=False)
        self.stage = stage

    def stop(self) -> None:
        """The search is over, or broken off."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def finish(self, result: Any) -> None:
        """The result, before and after."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column(f"at the exact equilibrium ({result.unit})")
        table.add_column("value", justify="right", no_wrap=True)
        table.add_column("saved", justify="right", style="dim", no_wrap=True)
        table.add_row("before", f"{result.before:,.4f}", "")
        table.add_row("after", f"{result.after:,.4f}", _saved(result, result.after), style="bold")
        if result.optimum is not None:
            saved = _saved(result, result.optimum)
            table.add_row("least possible", f"{result.optimum:,.4f}", saved)
        for name, value in result.more.items():
            table.add_row(name, f"{value:,.4f}", "", style="dim")
        self.console.print("", table, sep="\n")
        counts = ", ".join(f"{count:,} {name}" for name, count in result.evaluations.items())
        ends = ", ".join(result.statuses)
        for line in (f"stages: {ends}", f"{result.seconds:.1f} s; {counts}"):
            self.console.print(line, soft_wrap=True, markup=False)
        for path in result.files:
            self.console.print(f"  {path}", soft_wrap=True, markup=False)


def _saved(result: Any, value: float) -> str:
    return f"{100 * (result.before - value) / result.before:.2f} %"


def tolls(
    network: Annotated[
        str,
        typer.Option(
            help="braess or hearn-ramana, which are made here; sioux-falls, anaheim or another "
            "TNTP network under --root; or a path of TNTP files.",
        ),
    ] = "braess",
    links: Annotated[
        str, typer.Option(help="The links that can be tolled: all, or such as 3-4,5-7.")
    ] = "all",
    root: Root = None,
    steps: Steps = 250,
    out: Out = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Find tolls that make selfish drivers share the roads, and draw maps of before and after."""
    roads = load("experiments.roads")
    settings = roads.TollSettings(network=network, root=_text(root), links=links, steps=steps)
    name = Path(network).stem if "/" in network or "." in network else network
    _run(roads.toll, settings, out or _folder(f"tolls-{name}"), overwrite=overwrite, quiet=quiet)


def network_design(
    variant: Annotated[
        str, typer.Option(help="A, B or C: the versions of Sioux Falls that circulate.")
    ] = "A",
    start: Annotated[
        float, typer.Option(min=0.0, help="Added capacity to start from, on each link.")
    ] = 0.0,
    root: Root = None,
    steps: Steps = 100,
    out: Out = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Find what capacity to add to ten links of Sioux Falls, and draw maps of before and after."""
    roads = load("experiments.roads")
    settings = roads.NetworkDesignSettings(
        variant=variant, root=_text(root), start=start, steps=steps
    )
    folder = out or _folder(f"network-design-{variant}")
    _run(roads.design, settings, folder, overwrite=overwrite, quiet=quiet)


def _run(solve: Any, settings: Any, out: Path, *, overwrite: bool, quiet: bool) -> None:
    display = RoadDisplay(quiet=quiet)
    try:
        result = solve(settings, out, display, overwrite=overwrite)
    except KeyboardInterrupt:
        display.stop()
        display.console.print(f"\n[yellow]Interrupted.[/yellow] The steps so far are in {out}.")
        raise typer.Exit(130) from None
    finally:
        display.stop()
    display.finish(result)


def _text(root: Path | None) -> str | None:
    return None if root is None else str(root)


def _folder(name: str) -> Path:
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
