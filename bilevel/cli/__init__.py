"""The command line: ``bilevel train``, ``bilevel list``, ``bilevel check``."""

from __future__ import annotations

import importlib
import sys

__all__ = ["main"]

_EXTRA = ("matplotlib", "rich", "typer")


def main() -> None:
    """Run the command line; what the script ``bilevel`` calls."""
    try:
        for name in _EXTRA:
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        sys.stderr.write(
            f"bilevel: the command line needs {error.name}: pip install 'bilevel[cli]'\n"
        )
        raise SystemExit(1) from None
    from .app import app

    app()
