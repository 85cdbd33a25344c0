"""Objects built from names and options, as a command line or a settings file states them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from .registry import LINEAR_SOLVERS, PRECONDITIONERS, Registry

__all__ = ["build", "find"]


def find(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """What ``name`` stands for.

    Raises:
        ValueError: There is no such name; those that are known are listed.
    """
    if name not in known:
        raise ValueError(f"there is no {kind} '{name}'; known: {', '.join(known)}")
    return known[name]


def build(registry: Registry[Any], name: str, options: Mapping[str, Any]) -> Any:
    """Build what is registered under ``name``.

    Args:
        registry: Where the name is registered.
        name: The name.
        options: Arguments by name; ``linear_solver`` and ``preconditioner`` are names, too, and get
            their defaults.

    Raises:
        ValueError: There is no such name, an option is unknown, or one is missing or out of range.
    """
    parameters = inspect.signature(registry[name]).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = [key for key, p in parameters.items() if p.kind is not p.VAR_KEYWORD]
    unknown = [key for key in options if key not in known and not free]
    if unknown:
        raise ValueError(
            f"the {registry.kind} '{name}' has no option '{unknown[0]}'; "
            f"known: {', '.join(known) or 'none'}"
        )
    given = dict(options)
    for key, kinds in (("linear_solver", LINEAR_SOLVERS), ("preconditioner", PRECONDITIONERS)):
        if isinstance(given.get(key), str):
            given[key] = build(kinds, given[key], {})
    return registry.build(name, **given)
