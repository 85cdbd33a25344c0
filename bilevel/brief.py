"""Solvers and methods as a reader wants them: their name, and what was set."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass

from torch import Tensor

__all__ = ["brief"]


def brief(thing: object) -> str:
    """The name of a frozen dataclass with those settings that are not the default.

    What its author gave a ``repr`` of its own is shown by that.

    Example:
        >>> from bilevel import Proximal
        >>> brief(Proximal(2.0))
        'Proximal(strength=2.0)'
    """
    if isinstance(thing, type) or not is_dataclass(thing):
        return getattr(thing, "__qualname__", None) or repr(thing)
    # What `dataclass` writes is wrapped against recursion; what an author writes is not.
    if not hasattr(type(thing).__repr__, "__wrapped__"):
        return repr(thing)
    parts = []
    for one in fields(thing):
        value = getattr(thing, one.name)
        default = one.default if one.default_factory is MISSING else one.default_factory()
        # Tensors compare entry by entry.
        if one.repr and (isinstance(value, Tensor) or value != default):
            parts.append(f"{one.name}={brief(value)}")
    return f"{type(thing).__name__}({', '.join(parts)})"
