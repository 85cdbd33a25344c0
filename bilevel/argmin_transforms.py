"""What PyTorch's transforms would answer wrongly around `argmin`, noticed and refused.

The only module of `argmin` that asks PyTorch's private functions; they are the same from 2.6 on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from .errors import DependenceError, NotDifferentiableError
from .pytree import tree_leaves

__all__ = ["check_forward_mode", "check_not_batched", "depth", "has_tangent", "refuse_captured"]

_functorch: Any = torch._C._functorch


def depth() -> int:
    """How many function transforms stand around this call."""
    stack = _functorch.get_interpreter_stack()
    return 0 if stack is None else len(stack)


def has_tangent(tensors: Sequence[Any]) -> bool:
    """Whether a tensor carries a forward-mode tangent."""
    return any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    )


def check_forward_mode(tensors: Sequence[Any]) -> None:
    """Refuse forward mode over forward mode, in which a Function loses the inner tangent.

    Raises:
        NotDifferentiableError: Two `torch.func.jvp` stand around this call.
    """
    stack = _functorch.get_interpreter_stack() or []
    levels = sum(one.key() == _functorch.TransformType.Jvp for one in stack)
    if levels > 1 and any(
        isinstance(x, Tensor) and _functorch.is_functorch_wrapped_tensor(x) for x in tensors
    ):
        raise NotDifferentiableError(
            "argmin stands inside forward mode twice (`jvp` of `jvp`, or `jacfwd` of `jacfwd`), "
            "where PyTorch loses the tangents of a custom function; take one of the two in "
            "reverse: torch.func.hessian, or `jacfwd(grad(...))`"
        )


def check_not_batched(tensors: Sequence[Any]) -> None:
    """Refuse what PyTorch's old vmap hands to a backward pass.

    Raises:
        NotDifferentiableError: A tensor is batched by it.
    """
    if any(isinstance(x, Tensor) and _functorch.is_legacy_batchedtensor(x) for x in tensors):
        raise NotDifferentiableError(
            "argmin cannot be differentiated under `is_grads_batched=True` or `vectorize=True` of "
            "torch.autograd (an older vmap, which knows no rule of a custom function); use "
            "torch.func.jacrev or torch.func.hessian, or leave the flag out"
        )


def refuse_captured(evaluate: Callable[[], object], levels: int) -> None:
    """Evaluate, and refuse a tensor of a transform that was not passed in.

    The solvers run below all transforms, where a tensor of one has lost its meaning: PyTorch would
    take it for a constant, or its batch for tasks.

    Args:
        evaluate: Calls the problem's functions on one task.
        levels: How many transforms stood around `argmin`.

    Raises:
        DependenceError: There is one.
    """
    if not levels and forward_ad._current_level < 0:
        return
    found = _Captured(levels)
    # What else goes wrong here goes wrong again, and is told better, in the evaluation proper.
    with contextlib.suppress(RuntimeError, ValueError), _own_levels(levels), found:
        evaluate()
    if found.shape is not None:
        raise DependenceError(
            f"a function of the problem uses a tensor of shape {found.shape} that a transform "
            "(vmap, grad, jvp, ...) around argmin acts on, but that was not passed in; put it "
            "into `outer` if it is differentiated, and into the task's batch if it is only mapped"
        )


class _Captured(TorchFunctionMode):
    """Notices tensors of the outermost ``levels`` transforms."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.shape: tuple[int, ...] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves([args, kwargs]):
            if isinstance(x, Tensor) and self._is_captured(x):
                with torch._C.DisableTorchFunction():
                    self.shape = tuple(x.shape)
                raise DependenceError
        return func(*args, **(kwargs or {}))

    def _is_captured(self, x: Tensor) -> bool:
        if _functorch.is_functorch_wrapped_tensor(x):
            return bool(1 <= _functorch.maybe_get_level(x) <= self.levels)
        # A Function switches forward mode off inside, where tangents would not be seen.
        with forward_ad._set_fwd_grad_enabled(True):
            return not self.levels and has_tangent([x])


@contextlib.contextmanager
def _own_levels(count: int) -> Iterator[None]:
    """Number the transforms inside from ``count + 1`` up, so that they can be told apart."""
    for _ in range(count):
        _functorch._vmap_increment_nesting(1, "same")
    try:
        yield
    finally:
        for _ in range(count):
            _functorch._vmap_decrement_nesting()
