r"""Maps of tensors, their derivatives of any order, and the one Function that puts them in a graph.

`Stationarity` is F(z, x); `Steps` is the point that unrolled steps reach; the `Pull` of a map takes
its inputs and a cotangent for each output, and gives the gradients

$$\mathrm{Pull}[m](a, c) = \partial_a \langle m(a), c \rangle .$$

It is a map itself, so every order is a pull of a pull. `call` evaluates a map below all transforms,
on plain tensors, by reverse mode alone; its rules are maps again:

* backward: the pull;
* forward mode: a pull is linear in c, so that $m'(a)\,t$ is its own pull, in c, of the cotangent t;
* vmap: the new dimension joins the tasks, and every task has its own outer variable.

Nothing but the inputs is kept between the passes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .argmin_problem import InnerProblem
from .argmin_transforms import check_forward_mode, check_not_batched
from .errors import DependenceError, NotDifferentiableError
from .rows import full_precision

__all__ = ["DATA", "LEAF", "ROW", "Map", "Pull", "Stationarity", "Steps", "call", "fold", "unfold"]

# What a tensor of a map is: data of the tasks, one row per task, or an outer leaf (shared by all
# tasks, or one per task).
DATA, ROW, LEAF = "data", "row", "leaf"


class Map(ABC):
    """A function of tensors: the tasks' data, then the point, outer leaves and cotangents.

    Attributes:
        inner: The inner problem.
        inputs: What each input is.
        outputs: What each output is.
        base: Number of inputs that are no cotangents.
        order: How many pulls it is made of.
        needed: Inputs whose graph an evaluation needs.
    """

    inner: InnerProblem
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    base: int
    order: int = 0
    needed: frozenset[int] = frozenset()

    @abstractmethod
    def __call__(self, tensors: Sequence[Tensor], *, keep_graph: bool) -> list[Tensor]:
        """Evaluate on plain tensors."""

    @abstractmethod
    def folded(self, size: int) -> Map:
        """The map of ``size`` times as many tasks."""

    @abstractmethod
    def zeros(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Zeros like the outputs."""

    def pull(self, wanted: Sequence[int]) -> Pull:
        """The gradients in the ``wanted`` inputs.

        Raises:
            DependenceError: One of them is data.
            NotDifferentiableError: It takes a third derivative of a native norm.
        """
        if any(self.inputs[i] == DATA for i in wanted):
            raise DependenceError(
                "a tensor in the task's batch is differentiated, but argmin has derivatives in "
                "`outer` only: pass it in `outer`, or `.detach()` it"
            )
        if self.order and any(i < self.base for i in wanted):
            refuse_norms(self.inner.layout.native_norms)
        return Pull(self, tuple(wanted))


class Stationarity(Map):
    """F(z, x) ``[tasks, n]`` of the data, the point and the outer leaves."""

    def __init__(self, inner: InnerProblem) -> None:
        self.inner = inner
        self.inputs = (DATA,) * inner.data.count + (ROW,) + (LEAF,) * inner.leaf_count
        self.outputs = (ROW,)
        self.base = len(self.inputs)

    def __call__(self, tensors: Sequence[Tensor], *, keep_graph: bool) -> list[Tensor]:
        """Evaluate on plain tensors."""
        data, (z, *leaves) = self.inner.split(tensors)
        return [self.inner.flat(data, z, leaves).gradient(z)]

    def folded(self, size: int) -> Stationarity:
        """The map of ``size`` times as many tasks."""
        return Stationarity(self.inner.folded(size))

    def zeros(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Zeros like the outputs."""
        return [torch.zeros_like(tensors[self.inner.data.count])]


class Steps(Map):
    """The point ``[tasks, n]`` that unrolled steps reach, of the data and the outer leaves."""

    def __init__(self, inner: InnerProblem) -> None:
        self.inner = inner
        self.inputs = (DATA,) * inner.data.count + (LEAF,) * inner.leaf_count
        self.outputs = (ROW,)
        self.base = len(self.inputs)

    def __call__(self, tensors: Sequence[Tensor], *, keep_graph: bool) -> list[Tensor]:
        """Evaluate on plain tensors."""
        data, leaves = self.inner.split(tensors)
        return [self.inner.unroll(data, leaves, keep_graph=keep_graph)]

    def folded(self, size: int) -> Steps:
        """The map of ``size`` times as many tasks."""
        return Steps(self.inner.folded(size))

    def zeros(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Zeros like the outputs."""
        vector = self.inner.layout.vector
        return [torch.zeros(self.inner.count, vector.n, dtype=vector.dtype, device=vector.device)]


class Pull(Map):
    """The gradients of ⟨outputs, cotangents⟩ of ``parent`` in its ``wanted`` inputs."""

    def __init__(self, parent: Map, wanted: tuple[int, ...]) -> None:
        self.parent, self.wanted = parent, wanted
        self.inner, self.base = parent.inner, parent.base
        self.inputs = parent.inputs + parent.outputs
        self.outputs = tuple(parent.inputs[i] for i in wanted)
        self.order = parent.order + 1
        self.needed = parent.needed | frozenset(wanted)

    def __call__(self, tensors: Sequence[Tensor], *, keep_graph: bool) -> list[Tensor]:
        """Evaluate on plain tensors."""
        count = len(self.parent.inputs)
        outputs = self.parent(tensors[:count], keep_graph=True)
        pairs = [(o, c) for o, c in zip(outputs, tensors[count:], strict=True) if o.requires_grad]
        wanted = [tensors[i] for i in self.wanted]
        if not pairs:
            return [torch.zeros_like(x) for x in wanted]
        return list(
            torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [c for _, c in pairs],
                create_graph=keep_graph,
                materialize_grads=True,
            )
        )

    def folded(self, size: int) -> Pull:
        """The map of ``size`` times as many tasks."""
        return Pull(self.parent.folded(size), self.wanted)

    def zeros(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Zeros like the outputs."""
        return [torch.zeros_like(tensors[i]) for i in self.wanted]


def refuse_norms(names: set[str]) -> None:
    """Raise where functions contain a native norm layer, whose third derivative is asked for.

    Raises:
        NotDifferentiableError: ``names`` of functions is not empty.
    """
    if names:
        raise NotDifferentiableError(
            f"a second derivative through argmin needs the third derivative of "
            f"`{', '.join(sorted(names))}`, and PyTorch's is 3-20 % wrong for its batch, instance "
            "and layer norm; pass the network through bilevel.exact_norms first, or use GroupNorm "
            "or RMSNorm, which are exact"
        )


# In the graph


def call(mapping: Map, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The map's outputs, differentiable in its inputs to any order, under any transform."""
    check_forward_mode(tensors)
    outputs: tuple[Tensor, ...] = _Call.apply(mapping, *tensors)
    return outputs


def push(
    mapping: Map, tensors: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """The derivative of the outputs along ``tangents`` of the inputs, None standing for zero."""
    active = [i for i, t in enumerate(tangents) if t is not None]
    count, outputs = len(mapping.inputs), len(mapping.outputs)
    along = [t for t in tangents if t is not None]
    linear = mapping.pull(active).pull(range(count, count + outputs))
    return call(linear, [*tensors, *mapping.zeros(tensors), *along])


class _Call(Function):
    """A map on plain tensors; its derivatives are maps."""

    @staticmethod
    def forward(mapping: Map, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = [x.detach() for x in tensors]
        with torch.enable_grad(), full_precision(inputs[-1].device):
            for i in mapping.needed:
                inputs[i].requires_grad_()
            outputs = mapping(inputs, keep_graph=False)
        # A gradient may be a cotangent itself: it must not share its memory.
        return tuple(x.detach().clone() for x in outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mapping, *tensors = inputs
        save(ctx, tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        check_not_batched(cotangents)
        mapping: Map = ctx.mapping
        tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        wanted = [i for i, need in enumerate(needs) if need]
        filled = [
            zero if c is None else c
            for c, zero in zip(cotangents, mapping.zeros(tensors), strict=True)
        ]
        found = iter(call(mapping.pull(wanted), [*tensors, *filled]))
        return (None, *(next(found) if need else None for need in needs))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        check_not_batched(tangents)
        return push(ctx.mapping, ctx.saved_tensors, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], mapping: Map, *tensors: Tensor) -> Any:
        size = info.batch_size
        inputs = fold(mapping.inner, mapping.inputs, tensors, in_dims[1:], size)
        outputs = call(mapping.folded(size), inputs)
        return unfold(mapping.inner, mapping.outputs, outputs, size), (0,) * len(outputs)


def save(ctx: Any, tensors: Sequence[Tensor]) -> None:
    """Keep tensors for backward and forward mode, and missing derivatives as None."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.set_materialize_grads(False)


# vmap


def fold(
    inner: InnerProblem,
    kinds: Sequence[str],
    tensors: Sequence[Tensor],
    dims: Sequence[int | None],
    size: int,
) -> list[Tensor]:
    """Join a new dimension of ``size`` with the tasks: ``[size, tasks]`` becomes one dimension."""

    def one(kind: str, x: Tensor, dim: int | None) -> Tensor:
        shared = kind == LEAF and not inner.outer.per_task
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        if shared:
            x = x.unsqueeze(1).expand(size, inner.count, *x.shape[1:])
        return x.reshape(size * inner.count, *x.shape[2:])

    return [one(*row) for row in zip(kinds, tensors, dims, strict=True)]


def unfold(
    inner: InnerProblem, kinds: Sequence[str], tensors: Sequence[Tensor], size: int
) -> tuple[Tensor, ...]:
    """Separate them again; what the tasks of an entry share is summed over them."""

    def one(kind: str, x: Tensor) -> Tensor:
        x = x.reshape(size, inner.count, *x.shape[1:])
        return x.sum(1) if kind == LEAF and not inner.outer.per_task else x

    return tuple(one(*row) for row in zip(kinds, tensors, strict=True))
