"""``bilevel check``: one hypergradient compared with dense algebra and finite differences."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

from bilevel.build import build, find
from bilevel.check import check_hypergradient
from bilevel.registry import METHODS, PROBLEMS

from .siblings import parse_options, registries

__all__ = ["check"]

_DTYPES = {"float64": torch.float64, "float32": torch.float32}
# Tight enough for what is checked: the method itself.
_DEFAULTS: dict[torch.dtype, dict[str, dict[str, Any]]] = {
    torch.float64: {"cg": {"max_steps": 1000, "rtol": 1e-10}, "neumann": {"terms": 10000}},
    torch.float32: {"cg": {"max_steps": 1000, "rtol": 1e-5}, "neumann": {"terms": 2000}},
}


def check(
    problem: Annotated[str, typer.Argument(help="Name of the problem; `bilevel list` shows all.")],
    method: Annotated[str, typer.Option(help="Name of the hypergradient method.")] = "cg",
    method_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the method; may be repeated."),
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, help="Number of stacked tasks.")] = 1,
    dtype: Annotated[str, typer.Option(help="float64 or float32.")] = "float64",
    rtol: Annotated[
        float | None, typer.Option(help="Relative error allowed; default 1e-6, or 1e-3 in float32.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the instance.")] = 0,
) -> None:
    """Check a hypergradient on a small instance of a problem; exit code 1 if it is wrong."""
    registries()
    number = find("dtype", dtype, _DTYPES)
    given = parse_options(method_option or [], "--method-option")
    chosen = build(METHODS, method, {**_DEFAULTS[number].get(method, {}), **given})
    count = None if tasks == 1 else tasks
    example = PROBLEMS[problem].example(tasks=count, dtype=number, seed=seed)
    report = check_hypergradient(
        example.problem,
        example.outer,
        example.task,
        inner_solver=example.inner_solver,
        method=chosen,
        rtol=rtol,
    )
    typer.echo(f"{problem}: {example.note}\n\n{report}")
    if not report.ok:
        raise typer.Exit(1)
