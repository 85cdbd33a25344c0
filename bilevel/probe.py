"""The first look at a problem: one evaluation that finds what would go wrong in silence.

Run once for each problem instance and data shape, before any solver. It decides how the functions
are stacked, and raises where a function returns the wrong thing, draws random numbers, changes its
arguments, or hides a tensor whose gradient would be lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .errors import DependenceError, InPlaceError, ObjectiveError, RandomnessError
from .flat import FlatProblem
from .graph import is_fresh_leaf, nodes, reaches
from .pytree import leaf_names, tree_leaves
from .stacking import randomness_message

__all__ = ["probe"]


def probe(flat: FlatProblem, *, whole: bool = True) -> None:
    """Evaluate the problem's functions once and check them; repeated only for new shapes.

    Args:
        flat: The problem.
        whole: Look at the outer objective, too.

    Raises:
        ObjectiveError: A function returns something of the wrong kind, shape, dtype or device.
        RandomnessError: A function draws random numbers.
        InPlaceError: A function changes an argument in place.
        DependenceError: A function uses a tensor that requires grad but was not passed in, or an
            inner problem does not depend on its inner variable.
    """
    signature = _signature(flat)
    seen: set[Any] = flat.stacking.probed
    if (signature, whole) in seen or (signature, True) in seen:
        return
    problem = flat.problem
    # Copies: a function that writes to its arguments must not reach the user's tensors.
    outer = flat.outer.cloned().differentiable()
    flat = flat.with_outer(outer, differentiable=True)
    z = flat.start.detach().clone().requires_grad_()
    allowed = {id(leaf) for leaf in outer.leaves} | {id(z)}
    name = "stationarity" if problem.is_equilibrium else "inner_objective"
    inner = _evaluate(flat, name, z, flat.batch, "inner_batch", allowed)
    if not reaches(inner, [z]):
        raise DependenceError(
            f"`{name}` does not depend on `inner`; compute it from its first argument"
        )
    if whole:
        batch = flat.tasks.outer_batch
        last = _evaluate(flat, "outer_objective", z, batch, "outer_batch", allowed)
        if not last.requires_grad:
            raise DependenceError(
                "`outer_objective` depends neither on `inner` nor on `outer`: its value comes out "
                "of `.detach()`, `.item()`, an argmax or torch.no_grad(); compute it from its "
                "arguments"
            )
    if problem.regularizer is not None:
        for what in ("_center", "_strength"):
            _check_captured(getattr(flat, what), allowed, f"Proximal's {what[1:]}", flat)
    if not flat.start_is_constant:
        _check_captured(flat.initial(), allowed, "initial_inner", flat)
    flat.counts.clear()
    flat.notes.clear()
    seen.add((signature, whole))


def _evaluate(
    flat: FlatProblem, name: str, z: Tensor, batch: Any, batch_name: str, allowed: set[int]
) -> Tensor:
    arguments = {f"`{n}`": t for n, t in zip(flat.outer.names, flat.outer.leaves, strict=True)}
    arguments["`inner`"] = z
    for leaf_name, leaf in zip(leaf_names(batch, batch_name), tree_leaves(batch), strict=True):
        if isinstance(leaf, Tensor):
            arguments[f"`{leaf_name}`"] = leaf
            if leaf.device != flat.device:
                raise ObjectiveError(
                    f"the device of `{leaf_name}` is {leaf.device} but `inner` is on "
                    f"{flat.device}; move the tasks with `task.to(device)`"
                )
    versions = {key: tensor._version for key, tensor in arguments.items()}
    before = {key: tensor.detach().clone() for key, tensor in arguments.items()}
    random_state = _random_state(flat.device)
    try:
        # The math kernel here, whatever is called: fused attention would be refused by vmap.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _AttentionSeen() as seen:
            result = flat._call(name, z, batch)
    except RuntimeError as error:
        if "in-place operation" in str(error) or "inplace" in str(error):
            raise InPlaceError(
                f"`{name}` changes one of its arguments in place ({_first_line(error)}); write to "
                "a copy: `.clone()` it first, or use the operation without trailing underscore"
            ) from error
        mismatch = _mismatch(arguments)
        if mismatch and _speaks_of_place(error):
            raise ObjectiveError(f"`{name}` failed: {_first_line(error)}: {mismatch}") from error
        raise
    except (TypeError, AttributeError) as error:
        if batch is None and "NoneType" in str(error):
            raise ObjectiveError(
                f"`{name}` failed: {_first_line(error)}: the task came without its `{batch_name}`; "
                f"pass Task({batch_name}=...), if the objective reads its batch"
            ) from error
        raise
    changed = [
        key
        for key, tensor in arguments.items()
        if tensor._version != versions[key] or not _same(tensor, before[key])
    ]
    if changed:
        raise InPlaceError(
            f"`{name}` changed {', '.join(changed)} in place; write to a copy: `.clone()` it first"
        )
    if not all(a.equal(b) for a, b in zip(random_state, _random_state(flat.device), strict=True)):
        raise RandomnessError(randomness_message(name))
    value = _checked(flat, name, result, arguments)
    behind = list(nodes(value))
    _check_captured(value, allowed, name, flat)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        again = _checked(flat, name, flat._call(name, z, batch), arguments)
    if not (_same(again, value) and _same(_slope(again, z), _slope(value, z))):
        raise RandomnessError(
            f"`{name}` returned another value for the same arguments: it draws random numbers, or "
            "depends on what it was called for before; pass all that it depends on in the batch"
        )
    names = {type(node).__name__ for node in behind}
    if seen.attention:
        flat.stacking.attention.add(name)
    if name != "outer_objective" and any(node.startswith(_NATIVE_NORMS) for node in names):
        flat.stacking.native_norms.add(name)
    return value


class _AttentionSeen(TorchFunctionMode):
    """Notices whether an attention function is called."""

    attention = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.attention |= "attention" in getattr(func, "__name__", "")
        return func(*args, **(kwargs or {}))


_ONE_DTYPE = "convert the data, `outer`, or what `initial_inner` returns, to one dtype"

# The third derivatives of these are wrong in PyTorch (and only those).
_NATIVE_NORMS = ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "NativeLayerNorm")


def _checked(flat: FlatProblem, name: str, result: Any, arguments: dict[str, Tensor]) -> Tensor:
    if name == "stationarity":
        return _checked_stationarity(flat, result)
    if not isinstance(result, Tensor):
        raise ObjectiveError(f"`{name}` returned a {type(result).__name__}; return a 0-d tensor")
    if result.ndim != 1:
        raise ObjectiveError(
            f"`{name}` returned a tensor of shape {tuple(result.shape[1:])}; return a 0-d tensor, "
            "such as its `.sum()` or `.mean()`"
        )
    if result.dtype != flat.vector.dtype:
        raise ObjectiveError(
            f"`{name}` returned {result.dtype} but `inner` is {flat.vector.dtype}"
            f"{_because(arguments)}; {_ONE_DTYPE}"
        )
    if result.device != flat.device:
        raise ObjectiveError(
            f"`{name}` returned a value on {result.device} but `inner` is on {flat.device}; "
            "move both to one device"
        )
    return result


def _checked_stationarity(flat: FlatProblem, tree: Any) -> Tensor:
    shapes = [
        tuple(x.shape[1:]) if isinstance(x, Tensor) else None
        for x in tree_leaves(flat.vector.matched(tree))
    ]
    expected = [tuple(shape) for shape in flat.vector.shapes]
    if shapes != expected:
        raise ObjectiveError(
            f"`stationarity` returned leaves of shapes {shapes} but the inner variable has "
            f"{expected}; return a pytree like `inner`"
        )
    vector = flat.vector.flatten(tree, batch_dims=1)
    if vector.dtype != flat.vector.dtype:
        raise ObjectiveError(
            f"`stationarity` returned {vector.dtype} but `inner` is {flat.vector.dtype}; "
            f"{_ONE_DTYPE}"
        )
    return vector


def _check_captured(value: Tensor, allowed: set[int], name: str, flat: FlatProblem) -> None:
    for node in nodes(value):
        variable = getattr(node, "variable", None)
        if (
            isinstance(variable, Tensor)
            and id(variable) not in allowed
            # What an `argmin` inside began its steps at.
            and not is_fresh_leaf(variable)
        ):
            raise DependenceError(
                f"`{name}` uses a tensor of shape {tuple(variable.shape)} that requires grad but "
                "was not passed in `outer`; its gradient would be lost: put it into `outer`, or "
                "`.detach()` it"
            )


def _slope(value: Tensor, z: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(z)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(
            value.sum(), z, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    return slope


def _same(a: Tensor, b: Tensor) -> bool:
    if a.layout == torch.sparse_coo:
        a, b = (x.detach().coalesce() for x in (a, b))
        return a.indices().equal(b.indices()) and _same(a.values(), b.values())
    return bool(torch.isclose(a.detach(), b, rtol=1e-3, atol=0.0, equal_nan=True).all())


def _signature(flat: FlatProblem) -> Any:
    def describe(tree: Any) -> Any:
        leaves = tree_leaves(tree)
        return tuple(
            (x.shape, x.dtype, x.device, x.requires_grad) for x in leaves if isinstance(x, Tensor)
        )

    return (
        flat.n,
        flat.vector.dtype,
        flat.device,
        describe(list(flat.outer.leaves)),
        describe(flat.batch),
        describe(flat.tasks.outer_batch),
        flat.start_is_constant,
        flat.count == 1,
    )


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _mismatch(arguments: dict[str, Tensor]) -> str:
    floating = {key: x for key, x in arguments.items() if x.is_floating_point()}
    for attribute in ("device", "dtype"):
        tensors = arguments if attribute == "device" else floating
        groups: dict[Any, str] = {}
        for key, tensor in tensors.items():
            groups.setdefault(getattr(tensor, attribute), key)
        if len(groups) > 1:
            (first, one), (second, other) = list(groups.items())[:2]
            return f"{one} has {attribute} {first} but {other} has {second}; convert one of them"
    return ""


def _because(arguments: dict[str, Tensor]) -> str:
    mismatch = _mismatch(arguments)
    return f" ({mismatch.split(';')[0]})" if mismatch else ""


def _speaks_of_place(error: RuntimeError) -> bool:
    return any(word in str(error) for word in ("dtype", "device", "Float", "Double", "scalar type"))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
