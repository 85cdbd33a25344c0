"""``bilevel list``: what is registered, by name."""

from __future__ import annotations

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from .siblings import registries

__all__ = ["list_registered"]


def list_registered() -> None:
    """List problems, inner solvers, hypergradient methods, linear solvers and preconditioners."""
    console = Console(highlight=False)
    for registry in registries():
        table = Table(
            title=f"{registry.kind.capitalize()}s",
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("name", style="cyan", no_wrap=True)
        table.add_column("class", no_wrap=True)
        table.add_column("what it is")
        for name in registry:
            table.add_row(name, registry[name].__name__, registry.summary(name))
        console.print(table)
    typer.echo("Names go into: bilevel check PROBLEM --method NAME, bilevel train imaml --help")
