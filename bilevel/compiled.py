"""The gradient of the inner objective, compiled by `torch.compile`.

PyTorch compiles one backward pass, not the backward of a backward. What is compiled is therefore
the gradient itself, whose own backward pass is the product with the Hessian. The objective is
stacked first and the derivative of the sum is taken around it: the other order is wrong for
normalisation layers.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from .errors import ObjectiveError
from .pytree import PyTree, tree_flatten, tree_unflatten
from .rows import ones_for

if TYPE_CHECKING:
    from .flat import FlatProblem

__all__ = ["compiled_gradient"]

Gradient: TypeAlias = Callable[[Sequence[Tensor]], tuple[Tensor, list[Tensor]]]

_TENSOR = object()
_NAME = "inner_objective"
_SAME = {torch.float64: 1e-8, torch.float32: 1e-3}


def compiled_gradient(flat: FlatProblem) -> Gradient:
    """Takes leaves of the inner variable, returns values ``[tasks]`` and the slopes, leaf by leaf.

    Compiled once for each problem and shape. The slopes have a graph in the leaves where these
    require grad; the outer variable is taken for a constant.

    Raises:
        ObjectiveError: The inner objective cannot be compiled, or means something else then.
    """
    count, per_task = flat.count, flat.outer.per_task
    outer, outer_spec = [leaf.detach() for leaf in flat.outer.leaves], flat.outer.spec
    batch, batch_spec = tree_flatten(flat.batch)
    if count == 1:
        # One task is compiled without a dimension of tasks.
        outer = [leaf.squeeze(0) for leaf in outer] if per_task else outer
        batch = [x.squeeze(0) if isinstance(x, Tensor) else x for x in batch]
    data = [x for x in batch if isinstance(x, Tensor)]
    constants = tuple(_TENSOR if isinstance(x, Tensor) else x for x in batch)
    shapes = _shapes([*flat.vector.shapes, *outer, *data])
    key = (flat.kernels.compile, count, per_task, shapes, constants)
    place = repr((key, flat.vector.spec, outer_spec, batch_spec, flat.vector.dtype, flat.device))
    known = flat.stacking.compiled
    if place not in known:
        stacked = (0, 0 if per_task else None, 0)
        known[place] = _compiled(flat, stacked, outer_spec, batch_spec, constants)
    function, others = known[place], (tuple(outer), tuple(data))

    def gradient(leaves: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        found = _called(function, tuple(leaves), *others)
        values: Tensor = found[0]
        return (values.unsqueeze(0) if count == 1 else values), list(found[1])

    if place not in flat.stacking.compared:
        _compare(flat, gradient)
        flat.stacking.compared.add(place)
    return gradient


def _compiled(
    flat: FlatProblem,
    stacked: tuple[int | None, ...],
    outer_spec: Any,
    batch_spec: Any,
    constants: tuple[Any, ...],
) -> Callable[..., Any]:
    objective, vector = flat.problem.inner_objective, flat.vector
    if flat.problem.is_equilibrium:
        raise ObjectiveError(
            "an equilibrium has no inner objective whose gradient could be compiled; pass "
            "compile=False"
        )
    if flat.count > 1 and (_NAME in flat.stacking.looped or flat.stacking.mode == "loop"):
        raise ObjectiveError(
            f"`{_NAME}` cannot be stacked by torch.vmap, which compiling stacked tasks needs; pass "
            "engine='loop', or compile=False"
        )

    def one(leaves: Sequence[Tensor], outer: Sequence[Tensor], data: Sequence[Tensor]) -> Tensor:
        rest = iter(data)
        batch = [next(rest) if x is _TENSOR else x for x in constants]
        tree: PyTree = vector.tree(leaves)
        value: Tensor = objective(
            tree, tree_unflatten(outer, outer_spec), tree_unflatten(batch, batch_spec)
        )
        return value

    def total(
        leaves: tuple[Tensor, ...], outer: tuple[Tensor, ...], data: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        if flat_count == 1:
            values = one(leaves, outer, data)
        else:
            values = torch.vmap(one, in_dims=stacked)(leaves, outer, data)
        return values.sum(), values.detach()

    flat_count = flat.count

    def gradient(
        leaves: tuple[Tensor, ...], outer: tuple[Tensor, ...], data: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        slopes, (_, values) = torch.func.grad_and_value(total, has_aux=True)(leaves, outer, data)
        return values, slopes

    # The compiler counts how often it compiled one code object, and gives up after a few: each
    # problem and shape has one of its own.
    own = types.FunctionType(
        gradient.__code__.replace(), gradient.__globals__, None, None, gradient.__closure__
    )
    backend = flat.kernels.compile
    name = backend if isinstance(backend, str) else "inductor"
    compiled: Callable[..., Any] = torch.compile(own, fullgraph=True, dynamic=False, backend=name)
    return compiled


def _called(function: Callable[..., Any], leaves: tuple[Tensor, ...], *others: Any) -> Any:
    # Imported here: the compiler takes seconds to import.
    from torch._dynamo.exc import TorchDynamoException
    from torch._functorch import config

    kept = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    try:
        # The graph of the slopes is pulled through many times.
        with config.patch(donated_buffer=False) if kept else nullcontext():
            return function(leaves, *others)
    except TorchDynamoException as error:
        reason = next(line for line in str(error).splitlines() if line.strip())
        raise ObjectiveError(
            f"`{_NAME}` cannot be compiled ({reason.strip()[:200]}); write it without what the "
            "compiler cannot follow, or pass compile=False"
        ) from error


def _compare(flat: FlatProblem, gradient: Gradient) -> None:
    """Compare the first compiled gradient with the one that was not compiled.

    Raises:
        ObjectiveError: They differ.
    """
    plain = flat.plain()
    tree, leaves = plain.cut(plain.start)
    # In full precision, whatever the steps are run in: rounded ones need not agree.
    with torch.enable_grad(), torch.autocast(flat.device.type, enabled=False):
        values = plain.call(_NAME, tree, plain.batch)
        wanted = torch.autograd.grad(values, leaves, ones_for(values), materialize_grads=True)
    with torch.no_grad(), torch.autocast(flat.device.type, enabled=False):
        _, found = gradient([leaf.detach() for leaf in leaves])
    gap, size = (
        sum(float(x.double().square().sum()) for x in leaves) ** 0.5
        for leaves in ([a - b for a, b in zip(found, wanted, strict=True)], wanted)
    )
    if not gap <= _SAME.get(flat.vector.dtype, 1e-1) * max(size, 1e-30):
        raise ObjectiveError(
            f"the compiled gradient of `{_NAME}` is {gap / max(size, 1e-30):.1e} of its size away "
            "from the one that was not compiled; pass compile=False"
        )


def _shapes(things: Sequence[Any]) -> Any:
    return tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in things)
