"""``bilevel --import``: a user's own classes, registered by the file or module that holds them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

from .siblings import registries

__all__ = ["import_all"]


def import_all(names: list[str] | None) -> None:
    """Import files and modules, which register what they define.

    Args:
        names: Paths that end in ``.py``, or names of modules that can be imported.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no such module.
    """
    if names:
        registries()  # a name of the library's own stays its own
    for name in names or []:
        if name.endswith(".py"):
            _import_file(Path(name))
            continue
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ValueError(
                f"`--import` is '{name}', and there is no such module; pass one that is "
                "installed, or the path of a file that ends in .py"
            ) from error


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"`--import` is '{path}', and there is no such file")
    # A name of its own: a file may be called as a module is.
    spec = importlib.util.spec_from_file_location(f"_imported_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their names
    spec.loader.exec_module(module)
