"""The siblings of the core, loaded at run time, and options as a user types them."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from bilevel.registry import (
    INNER_SOLVERS,
    LINEAR_SOLVERS,
    METHODS,
    PRECONDITIONERS,
    PROBLEMS,
    Registry,
)

__all__ = ["load", "parse_options", "registries", "split_options"]


def load(name: str) -> Any:
    """Import a module of the siblings, such as ``"problems.data"``."""
    return importlib.import_module(f"bilevel.{name}")


def registries() -> tuple[Registry[Any], ...]:
    """All registries, filled."""
    load("solvers")
    load("problems")
    return PROBLEMS, INNER_SOLVERS, METHODS, LINEAR_SOLVERS, PRECONDITIONERS


def parse_options(texts: Iterable[str], flag: str) -> dict[str, Any]:
    """Options from texts ``key=value``; numbers, true, false and none become what they say.

    Raises:
        ValueError: A text is not of this form.
    """
    return {key: _value(value) for key, value in split_options(texts, flag).items()}


def split_options(texts: Iterable[str], flag: str) -> dict[str, str]:
    """Texts ``key=value`` by key.

    Raises:
        ValueError: A text is not of this form.
    """
    options = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (equals and key.strip().isidentifier()):
            raise ValueError(f"`{flag}` is '{text}'; write key=value, such as max_steps=10")
        options[key.strip()] = value.strip()
    return options


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
