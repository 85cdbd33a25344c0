"""``bilevel compare``: hypergradient methods on a small instance, by error, cost and memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from bilevel.build import build, find
from bilevel.compare import compare as run_comparison
from bilevel.registry import METHODS, PROBLEMS

from .siblings import load, parse_options, registries

__all__ = ["compare"]

_DTYPES = {"float64": torch.float64, "float32": torch.float32}
_REFERENCES: dict[str, Literal["auto", "dense", "estimate"]] = {
    "auto": "auto",
    "dense": "dense",
    "estimate": "estimate",
}


def compare(
    problem: Annotated[str, typer.Argument(help="Name of the problem; `bilevel list` shows all.")],
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,…]",
            help="A method and its options, such as cg:rtol=1e-2; may be repeated. "
            "Default: a choice of all.",
        ),
    ] = None,
    accuracy: Annotated[float, typer.Option(help="Relative error allowed.")] = 1e-3,
    budget: Annotated[
        float | None, typer.Option(help="The most gradients + products to be recommended.")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help="The longest time to be recommended.")
    ] = None,
    inner_steps: Annotated[
        int, typer.Option(min=1, help="Steps of gradient descent on the inner problem.")
    ] = 50,
    reference: Annotated[
        str, typer.Option(help="What errors are taken against: auto, dense or estimate.")
    ] = "auto",
    tasks: Annotated[int, typer.Option(min=1, help="Number of stacked tasks.")] = 1,
    dtype: Annotated[str, typer.Option(help="float64 or float32.")] = "float64",
    seed: Annotated[int, typer.Option(help="Seed of the instance.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each method.")] = 3,
    plot: Annotated[
        Path | None, typer.Option(help="Write a picture to this file, such as methods.png.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers to this file.")
    ] = None,
) -> None:
    """Compare methods on a small instance; exit code 1 if none is accurate enough."""
    registries()
    number = find("dtype", dtype, _DTYPES)
    chosen = None if not method else {text: _method(text) for text in method}
    count = None if tasks == 1 else tasks
    example = PROBLEMS[problem].example(tasks=count, dtype=number, seed=seed)
    descent = load("solvers").GradientDescent(
        lr=2 / (example.lipschitz + example.mu), max_steps=inner_steps
    )
    found = run_comparison(
        example.problem,
        example.outer,
        example.task,
        chosen,
        inner_solver=descent,
        accuracy=accuracy,
        budget=budget,
        max_seconds=max_seconds,
        reference=find("reference", reference, _REFERENCES),
        repeats=repeats,
    )
    typer.echo(f"{problem}: {example.note}\n\n{found}")
    if json_file is not None:
        json_file.write_text(json.dumps(found.as_dict(), indent=2) + "\n", "utf-8")
        typer.echo(f"\n  {json_file}")
    if plot is not None:
        found.plot(plot)
        typer.echo(f"\n  {plot}")
    if not found.ok:
        raise typer.Exit(1)


def _method(text: str) -> Any:
    name, _, options = text.partition(":")
    given = parse_options(filter(None, options.split(",")), "--method")
    return build(METHODS, name, given)
