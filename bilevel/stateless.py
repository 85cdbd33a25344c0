"""An ``nn.Module`` as a pure function of its parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from .errors import ObjectiveError, RandomnessError

__all__ = ["stateless"]


def stateless(module: nn.Module) -> tuple[dict[str, Tensor], Callable[..., Any]]:
    """Split a module into its parameters and a pure function of them.

    Buffers are copied now and held fixed; the module itself is never touched again. Batch and
    instance norm use the statistics of the batch at hand.

    Args:
        module: Any module whose forward pass is deterministic and leaves no trace.

    Returns:
        ``params``, a dict of detached copies by name, and ``net(params, *args, **kwargs)``.

    Raises:
        RandomnessError: A dropout layer is active.
        ObjectiveError: A norm layer in training mode updates running statistics, or the module
            has no parameter.

    Example:
        >>> import torch
        >>> params, net = stateless(torch.nn.Linear(3, 2))
        >>> net(params, torch.ones(4, 3)).shape
        torch.Size([4, 2])
    """
    for name, layer in module.named_modules():
        _check_layer(layer, f"module.{name}" if name else "module")
    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    if not params:
        raise ObjectiveError("`module` has no parameter; there is nothing to learn")
    buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
    # A copy: what the caller does to the module later must not reach the function.
    frozen = copy.deepcopy(module).requires_grad_(False)
    tied = _has_ties(module)

    def net(params: dict[str, Tensor], /, *args: Any, **kwargs: Any) -> Any:
        state = {**_like(buffers, params), **params} if buffers else params
        # Looking for tied weights at each call costs more than a small layer.
        return torch.func.functional_call(frozen, state, args, kwargs, tie_weights=tied)

    return params, net


def _has_ties(module: nn.Module) -> bool:
    """Whether one tensor has several names."""
    kinds = (module.named_parameters, module.named_buffers)
    tensors = [id(one) for kind in kinds for _, one in kind(remove_duplicate=False)]
    return len(set(tensors)) < len(tensors)


def _check_layer(layer: nn.Module, name: str) -> None:
    if not layer.training:
        return
    kind = type(layer).__name__
    rate = 0.0
    if isinstance(layer, _DropoutNd):
        rate = layer.p
    elif isinstance(layer, nn.RNNBase | nn.MultiheadAttention):
        rate = layer.dropout
    if rate > 0:
        raise RandomnessError(
            f"`{name}` ({kind}) drops entries at random (p={rate}), so that each evaluation would "
            "be another objective; set its rate to 0, or call `module.eval()`"
        )
    if isinstance(layer, _NormBase) and layer.track_running_stats:
        raise ObjectiveError(
            f"`{name}` ({kind}) updates its running statistics at each evaluation; build it with "
            "`track_running_stats=False` (statistics of the batch), or call `module.eval()` "
            "(fixed statistics)"
        )


def _like(buffers: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
    example = next(iter(params.values()))
    return {
        name: b.to(example.device, example.dtype) if b.is_floating_point() else b.to(example.device)
        for name, b in buffers.items()
    }
