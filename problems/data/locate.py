"""Where the data sets lie: an argument, or the environment variable ``BILEVEL_DATA``."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import DataError

__all__ = ["data_root"]


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds the data sets.

    Args:
        root: The folder, or None for the one that the environment variable ``BILEVEL_DATA`` names.

    Returns:
        An existing folder.

    Raises:
        DataError: Neither names a folder, or it does not exist.
    """
    name = "`root`"
    if root is None:
        root = os.environ.get("BILEVEL_DATA", "")
        name = "the environment variable BILEVEL_DATA"
        if not root:
            raise DataError(
                "`root` is None and the environment variable BILEVEL_DATA is not set; point one "
                "of them at the folder that holds the data sets"
            )
    path = Path(root).expanduser()
    if not path.is_dir():
        raise DataError(f"{name} = '{path}' is not a folder; point it at the one with the data")
    return path
