"""``bilevel train``: train a ready-made job."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .display import Display
from .imaml import Settings, run
from .siblings import parse_options

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Train a ready-made job; `imaml` is one.")

_DEFAULT = Settings()


@app.callback()
def _train() -> None:
    pass


@app.command()
def imaml(
    data: Annotated[
        str, typer.Option(help="glyphs (made here) or omniglot.", rich_help_panel="Tasks")
    ] = _DEFAULT.data,
    root: Annotated[
        Path | None,
        typer.Option(
            envvar="BILEVEL_DATA", help="Folder with the data sets.", rich_help_panel="Tasks"
        ),
    ] = None,
    ways: Annotated[
        int, typer.Option(min=2, help="Classes per task.", rich_help_panel="Tasks")
    ] = _DEFAULT.ways,
    shots: Annotated[
        int, typer.Option(min=1, help="Support images per class.", rich_help_panel="Tasks")
    ] = _DEFAULT.shots,
    queries: Annotated[
        int, typer.Option(min=1, help="Query images per class.", rich_help_panel="Tasks")
    ] = _DEFAULT.queries,
    tasks: Annotated[
        int, typer.Option(min=1, help="Tasks per meta-step.", rich_help_panel="Tasks")
    ] = _DEFAULT.tasks,
    rotations: Annotated[
        bool | None,
        typer.Option(
            help="Turn classes by multiples of 90°; default: for Omniglot, as is usual.",
            rich_help_panel="Tasks",
        ),
    ] = _DEFAULT.rotations,
    network: Annotated[
        str, typer.Option(help="strided or pool.", rich_help_panel="Problem")
    ] = _DEFAULT.network,
    channels: Annotated[
        int, typer.Option(min=1, help="Channels of each block.", rich_help_panel="Problem")
    ] = _DEFAULT.channels,
    strength: Annotated[
        float, typer.Option(min=0.0, help="λ, the pull to θ.", rich_help_panel="Problem")
    ] = _DEFAULT.strength,
    learn_strength: Annotated[
        bool, typer.Option("--learn-strength", help="Learn λ too.", rich_help_panel="Problem")
    ] = _DEFAULT.learn_strength,
    inner_solver: Annotated[
        str,
        typer.Option(
            help="gradient-descent, torch-optimizer, lbfgs; see `bilevel list`.",
            rich_help_panel="Solvers",
        ),
    ] = _DEFAULT.inner_solver,
    inner_steps: Annotated[
        int, typer.Option(min=0, help="Inner steps.", rich_help_panel="Solvers")
    ] = _DEFAULT.inner_steps,
    inner_lr: Annotated[
        float, typer.Option(help="Inner learning rate.", rich_help_panel="Solvers")
    ] = _DEFAULT.inner_lr,
    inner_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="An option of the inner solver; may be repeated.",
            rich_help_panel="Solvers",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="cg, neumann, unrolled, first-order, …; see `bilevel list`.",
            rich_help_panel="Solvers",
        ),
    ] = _DEFAULT.method,
    method_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="An option of the method; may be repeated.",
            rich_help_panel="Solvers",
        ),
    ] = None,
    lr: Annotated[
        float, typer.Option(help="Learning rate of Adam on θ.", rich_help_panel="Training")
    ] = _DEFAULT.lr,
    clip: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Clip the hypergradient to this norm; 0: never.",
            rich_help_panel="Training",
        ),
    ] = _DEFAULT.clip,
    steps: Annotated[
        int, typer.Option(min=1, help="Meta-steps.", rich_help_panel="Training")
    ] = _DEFAULT.steps,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="CPU minutes of training; what ends first counts.",
            rich_help_panel="Training",
        ),
    ] = _DEFAULT.minutes,
    eval_tasks: Annotated[
        int, typer.Option(min=1, help="Held-out tasks.", rich_help_panel="Training")
    ] = _DEFAULT.eval_tasks,
    seed: Annotated[
        int, typer.Option(help="Seed of all that is random.", rich_help_panel="Training")
    ] = _DEFAULT.seed,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, …", rich_help_panel="Machine")
    ] = _DEFAULT.device,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", rich_help_panel="Machine")
    ] = _DEFAULT.threads,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run folder; default: runs/imaml-…, with the time in its name.",
            rich_help_panel="Output",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the run in --out.", rich_help_panel="Output"),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show the result only.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Meta-learn few-shot classification by iMAML, and compare on held-out classes.

    The defaults need minutes on two CPU cores. Ctrl-C stops after the step at hand and keeps the
    weights, the metrics and the learning curve.
    """
    settings = Settings(
        data=data,
        root=None if root is None else str(root),
        ways=ways,
        shots=shots,
        queries=queries,
        tasks=tasks,
        rotations=rotations,
        network=network,
        channels=channels,
        strength=strength,
        learn_strength=learn_strength,
        inner_solver=inner_solver,
        inner_steps=inner_steps,
        inner_lr=inner_lr,
        inner_options=parse_options(inner_option or [], "--inner-option"),
        method=method,
        method_options=parse_options(method_option or [], "--method-option"),
        lr=lr,
        clip=clip,
        steps=steps,
        minutes=minutes,
        eval_tasks=eval_tasks,
        seed=seed,
        device=device,
        threads=threads,
    )
    if out is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        out = Path("runs") / f"imaml-{data}-{ways}w{shots}s-{stamp}"
    if not run(settings, out, Display(quiet=quiet), overwrite=overwrite):
        raise typer.Exit(130)
