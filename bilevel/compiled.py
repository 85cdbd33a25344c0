"""The gradient of the inner objective, compiled by `torch.compile`.

PyTorch compiles one backward pass, not the backward of a backward. What is compiled is therefore
the gradient itself, whose own backward pass is the product with the Hessian. The objective is
stacked first and the derivative of the sum is taken around it: the other order is wrong for
normalisation layers. The compiler ignores what some functions hide from it (the backward of an
`autograd.Function`, once differentiated again), so that the first compiled gradient and product are
compared with those that were not compiled.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from .errors import ObjectiveError
from .pytree import PyTree, tree_flatten, tree_unflatten
from .rows import norm

if TYPE_CHECKING:
    from .flat import FlatProblem

__all__ = ["Compiled", "compiled_gradient"]

Gradient: TypeAlias = Callable[[Sequence[Tensor]], tuple[Tensor, list[Tensor]]]

_TENSOR = "a tensor"
_NAME = "inner_objective"
_SAME = {torch.float64: 1e-8, torch.float32: 1e-3}
_CURE = "or pass compile=False"


class Compiled(dict[Any, tuple[Any, Callable[..., Any]]]):
    """What was compiled for one problem, with the objective it was compiled from.

    It belongs to that instance: a copy of the problem begins with nothing.
    """

    def __deepcopy__(self, memo: object) -> Compiled:
        return Compiled()

    def __reduce__(self) -> tuple[type[Compiled], tuple[()]]:
        return Compiled, ()


def compiled_gradient(flat: FlatProblem) -> Gradient:
    """Takes leaves of the inner variable, returns values ``[tasks]`` and the slopes, leaf by leaf.

    Compiled once for each problem and shape, with and without a graph. The slopes have a graph in
    the leaves where these require grad; the outer variable is taken for a constant.

    Raises:
        ObjectiveError: The inner objective cannot be compiled, or means something else then.
    """
    if flat.problem.is_equilibrium:
        raise ObjectiveError(
            "an equilibrium has no inner objective whose gradient could be compiled; pass "
            "compile=False"
        )
    alone, per_task = flat.count == 1, flat.outer.per_task
    outer, outer_spec = [leaf.detach() for leaf in flat.outer.leaves], flat.outer.spec
    if alone and per_task:
        # One task is compiled without a dimension of tasks.
        outer = [leaf.squeeze(0) for leaf in outer]
    batch, batch_spec = tree_flatten(flat.tasks.only(flat.batch) if alone else flat.batch)
    _check_batch(batch)
    data = [x for x in batch if isinstance(x, Tensor)]
    constants = tuple((_TENSOR,) if isinstance(x, Tensor) else x for x in batch)
    shapes = _shapes([*flat.vector.shapes, *outer, *data])
    specs = repr((flat.vector.spec, outer_spec, batch_spec))
    # A number and a truth may be equal, but are not the same to a user's function.
    kinds = tuple(type(x) for x in constants)
    place = (flat.vector.dtype, flat.device, shapes, specs)
    key = (flat.kernels.compile, flat.count, per_task, constants, kinds, place)
    objective = flat.problem.inner_objective
    others = (tuple(outer), tuple(data))

    def gradient(leaves: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        kept = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
        known = flat.stacking.compiled
        # An objective that was set anew is another one, and so is that of a copied problem.
        if known.get((key, kept), (None,))[0] != objective:
            stacked = (0, 0 if per_task else None, 0)
            made = _compiled(flat, stacked, outer_spec, batch_spec, constants)
            _compare(flat, lambda at: _called(made, kept, tuple(at), *others)[1], kept)
            known[key, kept] = (objective, made)
        values, slopes = _called(known[key, kept][1], kept, tuple(leaves), *others)
        return (values.unsqueeze(0) if alone else values), list(slopes)

    return gradient


def _check_batch(batch: Sequence[Any]) -> None:
    for x in batch:
        if isinstance(x, Tensor):
            if x.layout != torch.strided:
                raise ObjectiveError(
                    f"the batch holds a tensor of layout {x.layout}, which the compiler does not "
                    f"know; pass a dense one, {_CURE}"
                )
        elif not isinstance(x, bool | int | float | str | None):
            raise ObjectiveError(
                f"the batch holds a {type(x).__name__}, which the compiler would take for a "
                f"constant; pass a tensor, a number or a string, {_CURE}"
            )


def _compiled(
    flat: FlatProblem,
    stacked: tuple[int | None, ...],
    outer_spec: Any,
    batch_spec: Any,
    constants: tuple[Any, ...],
) -> Callable[..., Any]:
    objective, vector, count = flat.problem.inner_objective, flat.vector, flat.count
    if count > 1 and (_NAME in flat.stacking.looped or flat.stacking.mode == "loop"):
        raise ObjectiveError(
            f"`{_NAME}` cannot be stacked by torch.vmap, which compiling stacked tasks needs; pass "
            "engine='loop', or compile=False"
        )

    def one(leaves: Sequence[Tensor], outer: Sequence[Tensor], data: Sequence[Tensor]) -> Tensor:
        rest = iter(data)
        batch = [next(rest) if isinstance(x, tuple) else x for x in constants]
        tree: PyTree = vector.tree(leaves)
        value: Tensor = objective(
            tree, tree_unflatten(outer, outer_spec), tree_unflatten(batch, batch_spec)
        )
        return value

    def total(
        leaves: tuple[Tensor, ...], outer: tuple[Tensor, ...], data: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        if count == 1:
            values = one(leaves, outer, data)
        else:
            values = torch.vmap(one, in_dims=stacked)(leaves, outer, data)
        return values.sum(), values.detach()

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
    with _compiler_errors():
        compiled: Callable[..., Any] = torch.compile(
            own, fullgraph=True, dynamic=False, backend=name
        )
    return compiled


def _called(function: Callable[..., Any], kept: bool, *arguments: Any) -> Any:
    from torch._functorch import config  # the compiler takes seconds to import

    # The graph of the slopes is pulled through many times.
    with _compiler_errors(), config.patch(donated_buffer=False) if kept else nullcontext():
        return function(*arguments)


@contextmanager
def _compiler_errors() -> Iterator[None]:
    """Turn the compiler's errors into ours, and leave nothing of a failure behind.

    Raises:
        ObjectiveError: The compiler failed.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, InvalidBackend, TorchDynamoException

    autograd = torch._C._autograd
    message = autograd._saved_tensors_hooks_get_disabled_error_message
    enabled = message() is None
    try:
        yield
    except FailOnRecompileLimitHit as error:
        raise _failure(
            error, "pass what changes between calls as a tensor, in the batch or in `outer`"
        ) from error
    except InvalidBackend as error:
        raise _failure(error, "pass True or the name of a backend of torch.compile") from error
    except TorchDynamoException as error:
        raise _failure(error, "write it without what the compiler cannot follow") from error
    finally:
        if enabled and message() is not None:
            # A trace that fails inside a transform leaves autograd's hooks switched off.
            autograd._saved_tensors_hooks_enable()


def _failure(error: Exception, cure: str) -> ObjectiveError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(lines[:3])[:240]
    return ObjectiveError(f"`{_NAME}` cannot be compiled ({reason}); {cure}, {_CURE}")


def _compare(
    flat: FlatProblem, slopes_at: Callable[[Sequence[Tensor]], Sequence[Tensor]], kept: bool
) -> None:
    """Compare a compiled gradient with the one that was not compiled, where they are finite.

    Where its graph is kept, compare a product with the Hessian, too. At two points: the start may
    be a solution, where the gradient is rounding.

    Raises:
        ObjectiveError: They differ.
    """
    plain = flat.plain().not_compiled()
    signs = torch.ones_like(plain.start)
    signs[:, 1::2] = -1.0
    ahead = plain.start + 0.1 * signs * (1.0 + plain.start.abs())
    known, found = [], []
    # In full precision, whatever the steps are run in: rounded ones need not agree.
    with torch.enable_grad(), torch.autocast(flat.device.type, enabled=False):
        for z in (plain.start, ahead):
            tree, leaves = plain.cut(z)
            slopes, _ = plain.slopes(tree, leaves, keep_graph=True)
            known.append(_with_product(plain, slopes, leaves, signs))
            _, leaves = plain.cut(z)
            with torch.set_grad_enabled(kept):
                compiled = slopes_at(leaves)
            found.append(_with_product(plain, compiled, leaves, signs))
    for what, i in (("gradient", 0), ("Hessian product", 1))[: 1 + kept]:
        rows = [torch.cat([one[i] for one in both], -1) for both in (known, found)]
        size = norm(rows[0])
        gap = norm(rows[1] - rows[0])
        scale = torch.where(size > 0, size, 1.0)
        same = gap <= _SAME.get(flat.vector.dtype, 1e-1) * size
        # What is not finite either way says nothing.
        same = same | ~(rows[0].isfinite().all(-1) & rows[1].isfinite().all(-1))
        if not bool(same.all()):
            worst = (gap / scale).nan_to_num(0.0).max().item()
            raise ObjectiveError(
                f"the compiled {what} of `{_NAME}` is {worst:.1e} of its size away from the one "
                "that was not compiled; pass compile=False"
            )


def _with_product(
    flat: FlatProblem, slopes: Sequence[Tensor], leaves: list[Tensor], v: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient ``[tasks, n]``, and the product of the Hessian with v."""
    live = [(s, p) for s, p in zip(slopes, flat.parts(v), strict=True) if s.requires_grad]
    product = torch.zeros_like(v)
    if live:
        outputs, weights = zip(*live, strict=True)
        # As every later product: what is compiled at the first one depends on it.
        parts = torch.autograd.grad(
            outputs, leaves, weights, retain_graph=True, materialize_grads=True
        )
        product = flat.joined(parts)
    return flat.joined([slope.detach() for slope in slopes]), product


def _shapes(things: Sequence[Any]) -> Any:
    return tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in things)
