"""``bilevel train``: train a ready-made job."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .display import Display
from .siblings import load, parse_options

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Train a ready-made job.")

_few_shot: Any = load("experiments.few_shot")
_DEFAULT = _few_shot.Settings()


@app.callback()
def _train() -> None:
    pass


def _option(panel: str, name: str, text: str, **more: Any) -> Any:
    """An option that is left to the learner where it is not given; its help shows iMAML's."""
    usual = getattr(_DEFAULT, name)
    shown = str(usual) if isinstance(usual, int | float | str) and usual is not False else False
    return typer.Option(rich_help_panel=panel, help=text, show_default=shown, **more)


@app.command()
def imaml(
    learner: Annotated[
        str,
        typer.Option(
            help="A set of settings, changed by what is given below: "
            f"{', '.join(_few_shot.LEARNERS)}.",
        ),
    ] = _DEFAULT.learner,
    data: Annotated[
        str | None, _option("Tasks", "data", "glyphs (made here), omniglot or mini-imagenet.")
    ] = None,
    root: Annotated[
        Path | None, _option("Tasks", "root", "Folder with the data sets.", envvar="BILEVEL_DATA")
    ] = None,
    split: Annotated[
        str | None,
        _option("Tasks", "split", "Evaluate on test classes, or on validation classes."),
    ] = None,
    ways: Annotated[int | None, _option("Tasks", "ways", "Classes per task.", min=2)] = None,
    shots: Annotated[
        int | None, _option("Tasks", "shots", "Support images per class.", min=1)
    ] = None,
    queries: Annotated[
        int | None, _option("Tasks", "queries", "Query images per class.", min=1)
    ] = None,
    eval_queries: Annotated[
        int | None,
        _option("Tasks", "eval_queries", "The same in evaluation; default: as many.", min=1),
    ] = None,
    tasks: Annotated[int | None, _option("Tasks", "tasks", "Tasks per meta-step.", min=1)] = None,
    rotations: Annotated[
        bool | None,
        _option(
            "Tasks", "rotations", "Turn classes by multiples of 90°; default: for Omniglot only."
        ),
    ] = None,
    transductive: Annotated[
        bool | None,
        _option(
            "Tasks",
            "transductive",
            "Batch norm on query images sees all of them, as in the paper; or the support only.",
        ),
    ] = None,
    network: Annotated[str | None, _option("Problem", "network", "strided or pool.")] = None,
    channels: Annotated[
        int | None, _option("Problem", "channels", "Channels of each block.", min=1)
    ] = None,
    activation: Annotated[
        str | None, _option("Problem", "activation", "relu, softplus, silu or tanh.")
    ] = None,
    norm: Annotated[
        str | None, _option("Problem", "norm", "batch, group, layer, instance or none.")
    ] = None,
    strength: Annotated[
        float | None, _option("Problem", "strength", "λ, the pull to θ.", min=0.0)
    ] = None,
    strength_end: Annotated[
        float | None,
        _option("Problem", "strength_end", "λ at the last meta-step, by equal factors.", min=0.0),
    ] = None,
    learn_strength: Annotated[
        str | None,
        _option("Problem", "learn_strength", "Learn λ: scalar, layer or parameter."),
    ] = None,
    strength_lr: Annotated[
        float | None, _option("Problem", "strength_lr", "Learning rate of log λ.")
    ] = None,
    strength_min: Annotated[
        float | None, _option("Problem", "strength_min", "The least λ that is learned.")
    ] = None,
    adapted: Annotated[
        str | None, _option("Problem", "adapted", "Adapt all parameters, or the head alone.")
    ] = None,
    inner_solver: Annotated[
        str | None,
        _option(
            "Solvers",
            "inner_solver",
            "gradient-descent, nesterov, adam, hessian-free, …; see `bilevel list`.",
        ),
    ] = None,
    inner_steps: Annotated[
        int | None, _option("Solvers", "inner_steps", "Inner steps.", min=0)
    ] = None,
    inner_lr: Annotated[
        float | None, _option("Solvers", "inner_lr", "Inner learning rate.")
    ] = None,
    inner_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="An option of the inner solver; may be repeated.",
            rich_help_panel="Solvers",
        ),
    ] = None,
    method: Annotated[
        str | None,
        _option("Solvers", "method", "cg, neumann, unrolled, first-order, …; see `bilevel list`."),
    ] = None,
    method_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="An option of the method; may be repeated.",
            rich_help_panel="Solvers",
        ),
    ] = None,
    lr: Annotated[float | None, _option("Training", "lr", "Learning rate of Adam on θ.")] = None,
    lr_schedule: Annotated[
        str | None, _option("Training", "lr_schedule", "constant, or cosine, which ends at zero.")
    ] = None,
    clip: Annotated[
        float | None,
        _option("Training", "clip", "Clip the hypergradient to this norm; 0: never.", min=0.0),
    ] = None,
    average: Annotated[
        float | None,
        _option("Training", "average", "Decay of the moving average of θ; 0: none.", min=0.0),
    ] = None,
    steps: Annotated[int | None, _option("Training", "steps", "Meta-steps.", min=0)] = None,
    minutes: Annotated[
        float | None,
        _option("Training", "minutes", "CPU minutes of training; what ends first counts.", min=0.0),
    ] = None,
    eval_tasks: Annotated[
        int | None, _option("Training", "eval_tasks", "Held-out tasks.", min=1)
    ] = None,
    probe_every: Annotated[
        int | None,
        _option(
            "Training",
            "probe_every",
            "Look at curvature and exactness every so many steps; 0: never.",
            min=0,
        ),
    ] = None,
    seed: Annotated[int | None, _option("Training", "seed", "Seed of all that is random.")] = None,
    device: Annotated[str | None, _option("Machine", "device", "cpu, cuda, …")] = None,
    threads: Annotated[int | None, _option("Machine", "threads", "CPU threads.", min=1)] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run folder; default: runs/imaml-…, with the time in its name.",
            rich_help_panel="Output",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        _option("Machine", "engine", "Tasks at once (batched), one by one (loop), or auto."),
    ] = None,
    task_chunk: Annotated[
        int | None, _option("Machine", "task_chunk", "The most tasks at once; default: all.", min=1)
    ] = None,
    precision: Annotated[
        str | None, _option("Machine", "precision", "Of inner steps in training: full, tf32, bf16.")
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the run in --out.", rich_help_panel="Output"),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out.", rich_help_panel="Output"),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show the result only.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Meta-learn few-shot classification by iMAML, and compare on held-out classes.

    The defaults need minutes on two CPU cores. Ctrl-C stops after the step at hand and keeps the
    weights, the metrics and the learning curve; --resume goes on from there.
    """
    given = {
        "data": data,
        "root": None if root is None else str(root),
        "split": split,
        "ways": ways,
        "shots": shots,
        "queries": queries,
        "eval_queries": eval_queries,
        "tasks": tasks,
        "rotations": rotations,
        "transductive": transductive,
        "network": network,
        "channels": channels,
        "activation": activation,
        "norm": norm,
        "strength": strength,
        "strength_end": strength_end,
        "learn_strength": learn_strength,
        "strength_lr": strength_lr,
        "strength_min": strength_min,
        "adapted": adapted,
        "inner_solver": inner_solver,
        "inner_steps": inner_steps,
        "inner_lr": inner_lr,
        "inner_options": parse_options(inner_option or [], "--inner-option") or None,
        "method": method,
        "method_options": parse_options(method_option, "--method-option")
        if method_option
        else None,
        "lr": lr,
        "lr_schedule": lr_schedule,
        "clip": clip,
        "average": average,
        "steps": steps,
        "minutes": minutes,
        "eval_tasks": eval_tasks,
        "probe_every": probe_every,
        "seed": seed,
        "device": device,
        "threads": threads,
        "engine": engine,
        "task_chunk": task_chunk,
        "precision": precision,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = _few_shot.Settings.of(learner, **chosen)
    if out is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        out = Path("runs") / f"{learner}-{settings.data}-{settings.ways}w{settings.shots}s-{stamp}"
    watcher = Display(quiet=quiet)
    if not _few_shot.run(settings, out, watcher, overwrite=overwrite, resume=resume):
        raise typer.Exit(130)
