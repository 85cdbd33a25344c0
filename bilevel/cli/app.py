"""The command ``bilevel`` with all that is below it, and how its errors are told."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from bilevel import BilevelError, __version__

from . import check, compare, doctor, listing, reproduce, train, train_roads
from .importing import import_all

__all__ = ["app"]


class _Group(TyperGroup):
    """Tells a user's mistake in one line, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("bilevel: interrupted", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise
        except (BilevelError, ValueError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            message = " ".join(str(error).split()) or type(error).__name__
            typer.echo(f"bilevel: {message}", err=True)
            # A run that fails on the way is no mistake in the command.
            raise typer.Exit(1 if isinstance(error, RuntimeError | OSError) else 2) from None


app = typer.Typer(
    name="bilevel",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Bilevel optimization in PyTorch: hypergradients you can check.",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"bilevel {__version__}")
        raise typer.Exit


@app.callback()
def _bilevel(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
    imports: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            metavar="FILE.PY",
            help="A file or module that registers classes of your own; may be repeated.",
        ),
    ] = None,
) -> None:
    import_all(imports)


train.app.command("tolls")(train_roads.tolls)
train.app.command("network-design")(train_roads.network_design)
app.add_typer(train.app, name="train")
app.command("list")(listing.list_registered)
app.command("check")(check.check)
app.command("doctor")(doctor.doctor)
app.command("compare")(compare.compare)
app.command("reproduce")(reproduce.reproduce)
