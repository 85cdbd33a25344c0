"""What stands behind a tensor in the autograd graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

__all__ = ["fresh_leaf", "is_fresh_leaf", "nodes", "reaches"]

_MARK = "_bilevel_fresh"


def fresh_leaf(value: Tensor) -> Tensor:
    """The value as a leaf of its own, which is no variable whose gradient could be lost."""
    leaf = value.detach().requires_grad_()
    setattr(leaf, _MARK, True)
    return leaf


def is_fresh_leaf(leaf: Tensor) -> bool:
    """Whether a leaf was made by `fresh_leaf`."""
    return hasattr(leaf, _MARK)


def nodes(value: Tensor | None) -> Iterator[Any]:
    """Every node of the graph behind ``value``."""
    stack: list[Any] = [] if value is None or value.grad_fn is None else [value.grad_fn]
    if value is not None and value.grad_fn is None and value.requires_grad:
        # A leaf returned as it is: its accumulator stands behind any view of it.
        stack = [value.view_as(value).grad_fn]
    seen = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(parent for parent, _ in node.next_functions)


def reaches(value: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether the graph behind ``value`` contains one of the leaves."""
    wanted = {id(leaf) for leaf in leaves}
    return any(id(getattr(node, "variable", None)) in wanted for node in nodes(value))
