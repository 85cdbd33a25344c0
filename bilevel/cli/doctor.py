"""``bilevel doctor``: what is wrong with a problem, its inner solver and its method."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

from bilevel.build import build, find
from bilevel.doctor import doctor as examine
from bilevel.registry import INNER_SOLVERS, METHODS, PROBLEMS

from .siblings import parse_options, registries

__all__ = ["doctor"]

_DTYPES = {"float64": torch.float64, "float32": torch.float32}


def doctor(
    problem: Annotated[str, typer.Argument(help="Name of the problem; `bilevel list` shows all.")],
    method: Annotated[str, typer.Option(help="Name of the hypergradient method.")] = "cg",
    method_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the method; may be repeated."),
    ] = None,
    inner_solver: Annotated[
        str | None, typer.Option(help="Name of the inner solver; default: one that solves it.")
    ] = None,
    inner_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the inner solver; may be repeated."),
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, help="Number of stacked tasks.")] = 1,
    dtype: Annotated[str, typer.Option(help="float64 or float32.")] = "float64",
    rtol: Annotated[float, typer.Option(help="Relative error that is fine.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Seed of the instance.")] = 0,
) -> None:
    """Look for what is wrong with a problem and its solvers; exit code 1 if anything is."""
    registries()
    number = find("dtype", dtype, _DTYPES)
    chosen = build(METHODS, method, parse_options(method_option or [], "--method-option"))
    options: dict[str, Any] = parse_options(inner_option or [], "--inner-option")
    if options and inner_solver is None:
        raise ValueError("`--inner-option` is given without `--inner-solver`; name the solver, too")
    count = None if tasks == 1 else tasks
    example = PROBLEMS[problem].example(tasks=count, dtype=number, seed=seed)
    solver = example.inner_solver
    if inner_solver is not None:
        solver = build(INNER_SOLVERS, inner_solver, options)
    diagnosis = examine(
        example.problem,
        example.outer,
        example.task,
        inner_solver=solver,
        method=chosen,
        rtol=rtol,
        seed=seed,
    )
    typer.echo(f"{problem}: {example.note}\n\n{diagnosis}")
    if not diagnosis.ok:
        raise typer.Exit(1)
