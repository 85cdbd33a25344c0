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
        ValueError: There is no such file or module, or a name is taken.
    """
    if names:
        registries()  # a name of the library's own stays its own
    for name in names or []:
        if name.endswith(".py"):
            _import_file(Path(name))
            continue
        if not all(part.isidentifier() for part in name.split(".")):
            raise _not_found(name, "module")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise  # a module that it needs itself
            raise _not_found(name, "module") from error


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise _not_found(str(path), "file")
    path = path.resolve()
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # its neighbours are found, as by `python FILE.py`
    # A name of its own: files may be called alike, and as a module is.
    name = "_imported" + "_".join(path.with_suffix("").parts)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their names
    spec.loader.exec_module(module)


def _not_found(name: str, what: str) -> ValueError:
    return ValueError(
        f"`--import` is '{name}', and there is no such {what}; pass a module that is installed, or "
        "the path of a file that ends in .py"
    )
