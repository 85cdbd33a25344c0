"""Tensors that a problem's functions hold themselves: modules with buffers, data in closures."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from .problem import BilevelProblem

__all__ = ["Captured"]

_DEPTH = 5
_HOOKS = ("inner_objective", "outer_objective", "initial_inner", "stationarity", "predict", "loss")


class Captured:
    """What a problem's functions hold, with copies of how it was."""

    def __init__(self, problem: BilevelProblem) -> None:
        hooks = {hook: getattr(problem, hook) for hook in _HOOKS}
        self._held = dict(_walk(hooks, "", set(), _DEPTH))
        self._copies = {name: tensor.detach().clone() for name, tensor in self._held.items()}

    def restore(self) -> tuple[str, ...]:
        """Put everything back; return the names of what had changed."""
        changed = [n for n, tensor in self._held.items() if not _same(tensor, self._copies[n])]
        with torch.no_grad():
            for name in changed:
                self._held[name].copy_(self._copies[name])
        return tuple(changed)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().nan_to_num(), b.nan_to_num())


def _walk(thing: object, name: str, seen: set[int], depth: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors reachable from ``thing``, with the names by which its author knows them."""
    if id(thing) in seen or depth < 0:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield name, thing
    elif isinstance(thing, nn.Module):
        for key, tensor in chain(thing.named_parameters(), thing.named_buffers()):
            yield f"{name}.{key}", tensor
    else:
        for key, child in _children(thing, name):
            yield from _walk(child, key, seen, depth - 1)


def _children(thing: object, name: str) -> Iterator[tuple[str, object]]:
    if isinstance(thing, types.MethodType):
        yield name, thing.__self__
        yield name, thing.__func__
    elif isinstance(thing, functools.partial):
        yield name, thing.func
        yield from _children((thing.args, thing.keywords), name)
    elif isinstance(thing, types.FunctionType):
        try:
            found = inspect.getclosurevars(thing)
        except ValueError:  # a cell that is still empty
            return
        yield from {**found.globals, **found.nonlocals}.items()
    elif isinstance(thing, dict):
        yield from ((f"{name}.{key}".lstrip("."), value) for key, value in thing.items())
    elif isinstance(thing, list | tuple):
        yield from ((f"{name}[{i}]", value) for i, value in enumerate(thing))
    elif isinstance(thing, BilevelProblem):
        yield from ((f"{key}", value) for key, value in vars(thing).items())
