"""Row-wise algebra on ``[tasks, n]``: scalars are ``[tasks]``, sums accumulate in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from .kernels import Precision

__all__ = ["Choice", "all_between", "all_finite", "check_interval", "choose", "column", "dot"]
__all__ += ["finite_rows", "full_precision", "norm", "ones_for", "plus", "step_precision"]

_SHORTEST, _LONGEST = 1e-140, 1e140


def dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ for each row, float64 ``[tasks]``."""
    if a.dtype.itemsize < 4:
        a, b = a.float(), b.float()  # the squares of half numbers leave their range
    return (a * b).sum(-1, dtype=torch.float64)


def norm(a: Tensor) -> Tensor:
    """‖a‖ for each row, float64 ``[tasks]``; neither underflows nor overflows."""
    plain: Tensor = torch.linalg.vector_norm(a, dim=-1, dtype=torch.float64)
    # Squares of smaller numbers stay in the range of float64, and so do most of its own.
    if a.dtype != torch.float64 or a.shape[-1] == 0:
        return plain
    if all_between(_SHORTEST, plain, _LONGEST):
        return plain
    sound = (plain > _SHORTEST) & (plain < _LONGEST)
    largest = a.abs().amax(-1, keepdim=True)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    scaled: Tensor = torch.linalg.vector_norm(a / scale, dim=-1) * scale.squeeze(-1)
    return torch.where(sound, plain, scaled)


def ones_for(values: Tensor) -> Tensor | None:
    """Gradients of a sum ask for ones; of a single number PyTorch makes them itself, faster."""
    return None if values.numel() == 1 else torch.ones_like(values)


def all_between(low: float, scalars: Tensor, high: float) -> bool:
    """Whether all scalars are known to lie strictly between: asked only where that is free.

    On a CPU one look at the numbers costs less than three operations on tensors so small.
    """
    if check_interval(scalars.device) > 1:
        return False
    return all(low < one < high for one in scalars.tolist())


def finite_rows(a: Tensor) -> bool:
    """Whether all rows are known to be finite: asked only where that is free, by their sums.

    A sum passes on what is not finite, and costs a third of a maximum.
    """
    if check_interval(a.device) > 1:
        return False
    return all(map(math.isfinite, a.sum(-1).tolist()))


def all_finite(a: Tensor) -> Tensor:
    """Whether each row is free of NaN and infinities, bool ``[tasks]``; a fifth of the work."""
    if a.shape[-1] == 0:
        return torch.ones(a.shape[:-1], dtype=torch.bool, device=a.device)
    return a.abs().amax(-1).isfinite()


def column(scalars: Tensor, like: Tensor) -> Tensor:
    """``[tasks]`` as ``[tasks, 1]`` in the dtype of ``like``, to scale rows by."""
    return scalars.to(like.dtype).unsqueeze(-1)


def plus(a: Tensor, scalars: Tensor, b: Tensor, sign: float = 1.0) -> Tensor:
    """``a + sign · scalars · b``, row by row, in one pass."""
    if len(scalars) == 1 and check_interval(scalars.device) == 1 and b.itemsize >= 4:
        number = scalars.item()
        if abs(number) <= torch.finfo(b.dtype).max:
            # The same bits: a number is read faster than a column of one is made.
            return torch.add(a, b, alpha=sign * number)
    return torch.addcmul(a, column(scalars, b), b, value=sign)


class Choice:
    """Takes rows or scalars of some tasks from one tensor, and those of the others from another.

    It never multiplies by a mask: 0 · NaN is NaN. Where asking is free it asks once, and a choice
    of all tasks costs nothing.

    Attributes:
        tasks: The chosen ones, bool ``[tasks]``.
        everyone: All tasks are chosen, as far as was asked or is known.
    """

    def __init__(self, tasks: Tensor, *, everyone: bool = False) -> None:
        self.tasks = tasks
        self.everyone = everyone or (check_interval(tasks.device) == 1 and bool(tasks.all()))

    def __call__(self, yes: Tensor, no: Tensor | float) -> Tensor:
        """``yes`` for the chosen tasks, ``no`` for the others; ``[tasks, n]`` or ``[tasks]``."""
        if self.everyone:
            return yes
        tasks = self.tasks.unsqueeze(-1) if yes.ndim > self.tasks.ndim else self.tasks
        return torch.where(tasks, yes, no)


def choose(tasks: Tensor, yes: Tensor, no: Tensor | float) -> Tensor:
    """A single choice."""
    return Choice(tasks)(yes, no)


_NOTHING = nullcontext()


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Switch TF32 off for curvature products, and restore it afterwards."""
    return _tf32(allowed=False) if device.type == "cuda" else _NOTHING


def step_precision(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Evaluate as the inner solver's steps may, and restore what was set afterwards."""
    if precision == "full":
        return _NOTHING
    if precision == "tf32":
        return _tf32(allowed=True)
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextmanager
def _tf32(*, allowed: bool) -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (matmul.allow_tf32, cudnn.allow_tf32)
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def check_interval(device: torch.device) -> int:
    """How many iterations pass between questions to the device; on a CPU asking is free."""
    return 1 if device.type == "cpu" else 8
