"""Functions written for one task, applied to stacked tasks: by `torch.vmap` or by a loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .compiled import Compiled
from .errors import BilevelWarning, ObjectiveError, RandomnessError
from .pytree import PyTree, matched, tree_flatten, tree_map, tree_unflatten
from .task import without_tasks

__all__ = ["Stacking"]


@dataclass
class Stacking:
    """How one problem's functions are applied to stacked tasks; remembers what it met."""

    mode: str = "auto"
    looped: set[str] = field(default_factory=set)
    attention: set[str] = field(default_factory=set)
    native_norms: set[str] = field(default_factory=set)
    probed: set[Any] = field(default_factory=set)
    one_by_one: dict[Any, bool] = field(default_factory=dict)
    pulls_blocks: bool = True
    compiled: Compiled = field(default_factory=Compiled)

    def __call__(
        self,
        function: Callable[..., PyTree],
        arguments: tuple[PyTree, ...],
        stacked: tuple[bool, ...],
        count: int,
        name: str,
    ) -> PyTree:
        """Apply ``function`` to each task and stack the results.

        Args:
            function: Takes one pytree per argument, for one task.
            arguments: Pytrees; tensors of a stacked one have a leading dimension ``[tasks]``.
            stacked: Which arguments are stacked; the others are shared by all tasks.
            count: Number of tasks.
            name: What the function is called in messages.

        Raises:
            RandomnessError: The function draws random numbers.
        """
        if name in self.attention:
            # Fused attention kernels have no second derivative; the math kernel has every order.
            with sdpa_kernel(SDPBackend.MATH):
                return self._apply(function, arguments, stacked, count, name)
        return self._apply(function, arguments, stacked, count, name)

    def _apply(
        self,
        function: Callable[..., PyTree],
        arguments: tuple[PyTree, ...],
        stacked: tuple[bool, ...],
        count: int,
        name: str,
    ) -> PyTree:
        if count == 1:
            given = zip(arguments, stacked, strict=True)
            return _lift(function(*(without_tasks(x) if flag else x for x, flag in given)), name)
        if self.mode == "loop" or name in self.looped:
            return _loop(function, arguments, stacked, count, name)
        try:
            return _vmap(function, arguments, stacked, count, name)
        except RuntimeError as error:
            if "random operation" in str(error):
                raise RandomnessError(randomness_message(name)) from error
            if self.mode == "vmap":
                raise
            # What fails here too is the function's own error, told without vmap's words.
            result = _loop(function, arguments, stacked, count, name)
            self.looped.add(name)
            reason = str(error).strip().splitlines()[0][:160]
            warnings.warn(
                f"`{name}` cannot be stacked by torch.vmap ({reason}); its tasks run in a loop. "
                "Set `stacking = 'loop'` on the problem to say so yourself.",
                BilevelWarning,
                stacklevel=2,
            )
            return result


def randomness_message(name: str) -> str:
    """What to tell an author whose function draws random numbers."""
    return (
        f"`{name}` draws random numbers, so that each evaluation is another objective; draw them "
        "beforehand and pass them in the batch, and set dropout to 0 or the module to `eval()`"
    )


def _vmap(
    function: Callable[..., PyTree],
    arguments: tuple[PyTree, ...],
    stacked: tuple[bool, ...],
    count: int,
    name: str,
) -> PyTree:
    leaves, spec = tree_flatten(arguments)
    owner = [
        flag
        for argument, flag in zip(arguments, stacked, strict=True)
        for _ in tree_flatten(argument)[0]
    ]
    mapped = [flag and isinstance(x, Tensor) for flag, x in zip(owner, leaves, strict=True)]
    if not any(mapped):
        # Nothing differs between tasks: one evaluation serves all.
        out, result_spec = tree_flatten(function(*arguments))
        _check_tensors(out, name)
        return tree_unflatten([x.expand(count, *x.shape) for x in out], result_spec)
    result_spec = None

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        nonlocal result_spec
        rest = iter(tensors)
        full = [next(rest) if m else x for m, x in zip(mapped, leaves, strict=True)]
        out, result_spec = tree_flatten(function(*tree_unflatten(full, spec)))
        _check_tensors(out, name)
        return tuple(out)

    with _no_slow_fallback():
        results = torch.vmap(flat)(*(x for m, x in zip(mapped, leaves, strict=True) if m))
    return tree_unflatten(results, result_spec)


@contextmanager
def _no_slow_fallback() -> Iterator[None]:
    """Let vmap refuse what it would only loop over inside, with a warning of its own."""
    functorch: Any = torch._C._functorch  # private, but the same from 2.6 on
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)


def _loop(
    function: Callable[..., PyTree],
    arguments: tuple[PyTree, ...],
    stacked: tuple[bool, ...],
    count: int,
    name: str,
) -> PyTree:
    # Unbind once: its derivative is one stack, where indexing would add up `count` full tensors.
    leaves, spec = tree_flatten(arguments)
    owner = [
        flag
        for argument, flag in zip(arguments, stacked, strict=True)
        for _ in tree_flatten(argument)[0]
    ]
    columns = [
        x.unbind(0) if flag and isinstance(x, Tensor) else (x,) * count
        for flag, x in zip(owner, leaves, strict=True)
    ]
    rows: list[list[Any]] = []
    first: PyTree = None
    for row in zip(*columns, strict=True):
        tree = function(*tree_unflatten(row, spec))
        first = first if rows else tree
        out, out_spec = tree_flatten(matched(tree, first))
        _check_tensors(out, name)
        rows.append(out)
    return tree_unflatten([torch.stack(column) for column in zip(*rows, strict=True)], out_spec)


def _check_tensors(leaves: list[Any], name: str) -> None:
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise ObjectiveError(
                f"`{name}` returned a {type(leaf).__name__}; return tensors only, such as "
                "torch.as_tensor of it"
            )


def _lift(tree: PyTree, name: str) -> PyTree:
    def lifted(leaf: Any) -> Tensor:
        _check_tensors([leaf], name)
        tensor: Tensor = leaf.unsqueeze(0)
        return tensor

    return tree_map(lifted, tree)
