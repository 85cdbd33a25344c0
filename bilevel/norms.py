r"""Batch, instance and layer norm whose derivatives of every order are right.

PyTorch's own layers have right first and second derivatives and wrong third ones (by 3 to 20 %),
which second derivatives of an inner solution need. Written out, as

$$y = \frac{x - \mathrm{mean}(x)}{\sqrt{\mathrm{var}(x) + \epsilon}} \, w + b,$$

they are right to any order. GroupNorm and RMSNorm are right as they are.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["exact_norms"]


def exact_norms(module: nn.Module) -> nn.Module:
    """Copy a module, with hand-written batch, instance and layer norms for PyTorch's own.

    Values, parameters, buffers, `state_dict` keys and modes stay as they are; only derivatives from
    the third on change, to the right ones. Use it where argmin is differentiated twice.

    Args:
        module: Any module. Layers whose class is exactly ``nn.BatchNorm1d`` to ``3d``,
            ``nn.InstanceNorm1d`` to ``3d`` or ``nn.LayerNorm`` are replaced, at any depth; calls of
            ``torch.nn.functional`` cannot be.

    Returns:
        The copy; the module itself is not changed.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
        >>> exact = exact_norms(net)
        >>> x = torch.ones(2, 3)
        >>> torch.allclose(exact(x), net(x), atol=1e-6)
        True
        >>> exact.state_dict().keys() == net.state_dict().keys()
        True
    """
    module = copy.deepcopy(module)
    for layer in module.modules():
        exact = _EXACT.get(type(layer))
        if exact is not None:
            # Parameters, buffers, hooks and modes stay where they are.
            layer.__class__ = exact
    return module


def _batch_norm(layer: Any, x: Tensor, dims: list[int], momentum: float, *, update: bool) -> Tensor:
    """Normalise over ``dims`` by the statistics of the batch; channels lie along dimension 1."""
    size = math.prod(x.shape[i] for i in dims)
    if size == 1:
        raise ValueError(
            f"{type(layer).__name__} got {tuple(x.shape)}, one value to a channel, whose variance "
            "is zero; pass more, or call `module.eval()`"
        )
    var, mean = torch.var_mean(x, dim=dims, correction=0, keepdim=True)
    if update:
        with torch.no_grad():
            others = [0, *range(2, x.ndim)]
            for running, found in (
                (layer.running_mean, mean),
                (layer.running_var, var * size / (size - 1)),
            ):
                running.mul_(1 - momentum).add_(momentum * found.mean(others))
    return _affine((x - mean) * torch.rsqrt(var + layer.eps), layer)


def _running_norm(layer: Any, x: Tensor) -> Tensor:
    """Normalise by the running statistics."""
    mean, var = _column(layer.running_mean, x), _column(layer.running_var, x)
    return _affine((x - mean) * torch.rsqrt(var + layer.eps), layer)


def _affine(x: Tensor, layer: Any) -> Tensor:
    if layer.weight is not None:
        x = x * _column(layer.weight, x)
    return x if layer.bias is None else x + _column(layer.bias, x)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """One value for each channel, to broadcast against ``[batch, channels, ...]``."""
    return values.reshape(-1, *[1] * (like.ndim - 2))


class _ExactBatchNorm(nn.modules.batchnorm._BatchNorm):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return _running_norm(self, input)
        momentum = 0.0 if self.momentum is None else self.momentum
        update = self.training and self.track_running_stats and self.running_mean is not None
        if update and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        return _batch_norm(self, input, [0, *range(2, input.ndim)], momentum, update=update)


class _ExactInstanceNorm(nn.modules.instancenorm._InstanceNorm):
    def _apply_instance_norm(self, input: Tensor) -> Tensor:  # noqa: A002
        if not self.training and self.track_running_stats:
            return _running_norm(self, input)
        momentum = 0.0 if self.momentum is None else self.momentum
        update = self.running_mean is not None
        return _batch_norm(self, input, list(range(2, input.ndim)), momentum, update=update)


class _ExactLayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        shape = tuple(self.normalized_shape)
        if tuple(input.shape[-len(shape) :]) != shape:
            raise ValueError(
                f"LayerNorm got {tuple(input.shape)}, whose last dimensions are not {shape}; "
                "reshape the input, or build the layer for it"
            )
        dims = list(range(-len(shape), 0))
        var, mean = torch.var_mean(input, dim=dims, correction=0, keepdim=True)
        x = (input - mean) * torch.rsqrt(var + self.eps)
        if self.weight is not None:
            x = x * self.weight
        return x if self.bias is None else x + self.bias


# Classes of their own, so that a copy can be pickled, and checks its input like the original.


class _ExactBatchNorm1d(_ExactBatchNorm, nn.BatchNorm1d):
    pass


class _ExactBatchNorm2d(_ExactBatchNorm, nn.BatchNorm2d):
    pass


class _ExactBatchNorm3d(_ExactBatchNorm, nn.BatchNorm3d):
    pass


class _ExactInstanceNorm1d(_ExactInstanceNorm, nn.InstanceNorm1d):
    pass


class _ExactInstanceNorm2d(_ExactInstanceNorm, nn.InstanceNorm2d):
    pass


class _ExactInstanceNorm3d(_ExactInstanceNorm, nn.InstanceNorm3d):
    pass


_EXACT: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _ExactBatchNorm1d,
    nn.BatchNorm2d: _ExactBatchNorm2d,
    nn.BatchNorm3d: _ExactBatchNorm3d,
    nn.InstanceNorm1d: _ExactInstanceNorm1d,
    nn.InstanceNorm2d: _ExactInstanceNorm2d,
    nn.InstanceNorm3d: _ExactInstanceNorm3d,
    nn.LayerNorm: _ExactLayerNorm,
}
