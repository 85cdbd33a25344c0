r"""The two nodes of implicit differentiation, each differentiable to any order.

With F the stationarity, J = ∂_z F at the solution, and the bilinear form b(z, x; c, u) = ⟨c, J u⟩:

$$dz^\star = -J^{-1}\, \partial_x F\, dx, \qquad
  d(J^{-1} r) = J^{-1} (dr - dJ\, u), \quad u = J^{-1} r,$$

and likewise with Jᵀ. Derivatives of F, and of J in b, are maps (`argmin_maps`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .argmin_maps import (
    DATA,
    LEAF,
    ROW,
    Pull,
    Stationarity,
    call,
    fold,
    push,
    save,
    unfold,
)
from .argmin_problem import InnerProblem
from .argmin_transforms import check_forward_mode, check_not_batched
from .rows import full_precision

__all__ = ["solution"]


def solution(inner: InnerProblem, data: Sequence[Tensor], leaves: Sequence[Tensor]) -> Tensor:
    """The inner solution ``[tasks, n]``, differentiable in ``leaves``."""
    tensors = [*data, *leaves]
    check_forward_mode(tensors)
    z: Tensor = _Solution.apply(inner, *tensors)
    return z


def solve_linear(
    inner: InnerProblem, point: Sequence[Tensor], rhs: Tensor, *, transpose: bool
) -> Tensor:
    """J⁻¹ rhs, or J⁻ᵀ rhs, ``[tasks, n]`` at the point (data, z, leaves)."""
    check_forward_mode([*point, rhs])
    v: Tensor = _Linear.apply(inner, transpose, *point, rhs)
    return v


class _Solution(Function):
    """z*(x). Backward: −(∂_x F)ᵀ J⁻ᵀ c. Forward mode: −J⁻¹ ∂_x F dx."""

    @staticmethod
    def forward(inner: InnerProblem, *tensors: Tensor) -> Tensor:
        data, leaves = inner.split([x.detach() for x in tensors])
        with torch.enable_grad():
            return inner.solve(data, leaves).detach().clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.inner, *tensors = inputs
        data, leaves = ctx.inner.split(tensors)
        save(ctx, [*data, output, *leaves])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
        check_not_batched([cotangent])
        needs = ctx.needs_input_grad[1:]
        if cotangent is None:
            return (None, *(None for _ in needs))
        inner: InnerProblem = ctx.inner
        point = ctx.saved_tensors
        # The point stands between the data and the leaves.
        wanted = [i + (i >= inner.data.count) for i, need in enumerate(needs) if need]
        pull = Stationarity(inner).pull(wanted)
        v = solve_linear(inner, point, cotangent, transpose=True)
        found = iter(call(pull, [*point, v]))
        return (None, *(-next(found) if need else None for need in needs))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
        check_not_batched(tangents)
        inner: InnerProblem = ctx.inner
        count = inner.data.count
        along = [*tangents[:count], None, *tangents[count:]]
        (moved,) = push(Stationarity(inner), ctx.saved_tensors, along)
        return -solve_linear(inner, ctx.saved_tensors, moved, transpose=False)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], inner: InnerProblem, *tensors: Tensor) -> Any:
        kinds = (DATA,) * inner.data.count + (LEAF,) * inner.leaf_count
        inputs = fold(inner, kinds, tensors, in_dims[1:], info.batch_size)
        z = solution(inner.folded(info.batch_size), *inner.split(inputs))
        return unfold(inner, [ROW], [z], info.batch_size)[0], 0


class _Linear(Function):
    """u = J⁻¹ r (or J⁻ᵀ r) at a point."""

    @staticmethod
    def forward(inner: InnerProblem, transpose: bool, *tensors: Tensor) -> Tensor:
        data, (z, *leaves, rhs) = inner.split([x.detach() for x in tensors])
        with torch.enable_grad(), full_precision(z.device):
            v = inner.solve_linear(data, z, leaves, rhs, transpose=transpose)
        return v.detach().clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.inner, ctx.transpose, *tensors, _ = inputs
        save(ctx, [*tensors, output])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
        check_not_batched([cotangent])
        needs = ctx.needs_input_grad[2:-1]
        if cotangent is None:
            return (None,) * (3 + len(needs))
        *point, u = ctx.saved_tensors
        w = solve_linear(ctx.inner, point, cotangent, transpose=not ctx.transpose)
        gradients: list[Tensor | None] = [None] * len(needs)
        wanted = [i for i, need in enumerate(needs) if need]
        if wanted:
            pair = (u, w) if ctx.transpose else (w, u)
            found = call(_bilinear(ctx.inner).pull(wanted), [*point, *pair])
            for i, gradient in zip(wanted, found, strict=True):
                gradients[i] = -gradient
        return (None, None, *gradients, w)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> Tensor:
        check_not_batched(tangents)
        *point, u = ctx.saved_tensors
        *moves, moved = tangents
        rhs = torch.zeros_like(u) if moved is None else moved
        active = [i for i, t in enumerate(moves) if t is not None]
        if active:
            # dJ u is the gradient of ⟨c, dJ u⟩ in c, at any c; and dJᵀ u that of ⟨u, dJ c⟩.
            zero = torch.zeros_like(u)
            pair, free = ((u, zero), len(point) + 1) if ctx.transpose else ((zero, u), len(point))
            along = [t for t in moves if t is not None]
            (change,) = call(
                _bilinear(ctx.inner).pull(active).pull([free]), [*point, *pair, *along]
            )
            rhs = rhs - change
        return solve_linear(ctx.inner, point, rhs, transpose=ctx.transpose)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], inner: InnerProblem, transpose: bool, *tensors: Tensor
    ) -> Any:
        kinds = (*Stationarity(inner).inputs, ROW)
        *point, rhs = fold(inner, kinds, tensors, in_dims[2:], info.batch_size)
        v = solve_linear(inner.folded(info.batch_size), point, rhs, transpose=transpose)
        return unfold(inner, [ROW], [v], info.batch_size)[0], 0


def _bilinear(inner: InnerProblem) -> Pull:
    """Jᵀ c of (data, z, leaves, c); its pull with the cotangent u differentiates ⟨c, J u⟩."""
    return Stationarity(inner).pull([inner.data.count])
