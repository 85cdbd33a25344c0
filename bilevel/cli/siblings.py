"""The siblings of the core, loaded at run time, and objects built from what a user types."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from bilevel.registry import (
    INNER_SOLVERS,
    LINEAR_SOLVERS,
    METHODS,
    PRECONDITIONERS,
    PROBLEMS,
    Registry,
)

__all__ = ["build", "find", "load", "parse_options", "registries"]


def load(name: str) -> Any:
    """Import a module of the siblings, such as ``"problems.data"``."""
    return importlib.import_module(f"bilevel.{name}")


def registries() -> tuple[Registry[Any], ...]:
    """All registries, filled."""
    load("solvers")
    load("problems")
    return PROBLEMS, INNER_SOLVERS, METHODS, LINEAR_SOLVERS, PRECONDITIONERS


def find(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """What ``name`` stands for.

    Raises:
        ValueError: There is no such name; those that are known are listed.
    """
    if name not in known:
        raise ValueError(f"there is no {kind} '{name}'; known: {', '.join(known)}")
    return known[name]


def parse_options(texts: Iterable[str], flag: str) -> dict[str, Any]:
    """Options from texts ``key=value``; numbers, true, false and none become what they say.

    Raises:
        ValueError: A text is not of this form.
    """
    options = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (equals and key.strip().isidentifier()):
            raise ValueError(f"`{flag}` is '{text}'; write key=value, such as max_steps=10")
        options[key.strip()] = _value(value.strip())
    return options


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


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
