r"""Networks for few-shot learning and regression, with seeded initial values.

The convolutional ones are the two of Rajeswaran et al. (2019) for 28×28 images: four blocks of a
3×3 convolution, a norm and an activation, with strides (113,221 parameters for 5 classes) or with
max-pooling (112,261). Batch norm always uses the statistics of the batch at hand, so that each
network is a pure function of parameters and data. Called as ``net(params, images, reference)``, it
takes them from the reference images instead (the support set, say), and no prediction depends on
the other images of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from .seeding import generator

__all__ = ["Init", "Norm", "conv_pool", "conv_strided", "mlp"]

Norm: TypeAlias = Literal["batch", "group", "layer", "instance", "none"]
"""Batch statistics; groups of 8 channels; all channels of an image; each channel of an image; no
norm at all."""

Init: TypeAlias = Literal["torch", "imaml"]
"""PyTorch's own rule; or that of the code released with iMAML, whose weights are 3 times larger:
before a batch norm, that makes inner steps 9 times smaller in effect, and learning slower."""


def conv_strided(
    ways: int,
    channels: int = 64,
    in_channels: int = 1,
    size: int = 28,
    *,
    blocks: int = 4,
    activation: Callable[[], nn.Module] = nn.ReLU,
    norm: Norm = "batch",
    init: Init = "torch",
    seed: int = 0,
) -> nn.Module:
    """Blocks of a 3×3 convolution of stride 2, a norm and an activation, then a linear layer.

    After the second block a row and a column of zeros are appended below and to the right: 28
    pixels become 14, 7, (8,) 4, 2.

    Args:
        ways: Number of classes.
        channels: Channels of every block.
        in_channels: Channels of the images.
        size: Height and width of the images.
        blocks: Number of blocks.
        activation: Makes the activation, such as ``nn.Tanh``.
        norm: Kind of norm.
        init: Rule for the initial values.
        seed: Seed of the initial values; the global generator is not touched.

    Returns:
        A module from ``[batch, in_channels, size, size]`` to logits ``[batch, ways]``, float32.
    """
    layers: list[nn.Module] = []
    with torch.device("meta"):
        for i in range(blocks):
            layers.append(_conv(in_channels if i == 0 else channels, channels, stride=2))
            layers += [*_norm(norm, channels), activation()]
            size = (size + 1) // 2
            if i == 1 and blocks > 2:
                layers.append(nn.ZeroPad2d((0, 1, 0, 1)))
                size += 1
        layers += [nn.Flatten(), nn.Linear(channels * size**2, ways)]
        return _initialised(_Layers(*layers), init, seed)


def conv_pool(
    ways: int,
    channels: int = 64,
    in_channels: int = 1,
    size: int = 28,
    *,
    blocks: int = 4,
    activation: Callable[[], nn.Module] = nn.ReLU,
    norm: Norm = "batch",
    init: Init = "torch",
    seed: int = 0,
) -> nn.Module:
    """Blocks of a 3×3 convolution, a norm, an activation and 2×2 max-pooling, then a linear layer.

    28 pixels become 14, 7, 3, 1.

    Args:
        ways: Number of classes.
        channels: Channels of every block.
        in_channels: Channels of the images.
        size: Height and width of the images, at least ``2**blocks``.
        blocks: Number of blocks.
        activation: Makes the activation, such as ``nn.Tanh``.
        norm: Kind of norm.
        init: Rule for the initial values.
        seed: Seed of the initial values; the global generator is not touched.

    Returns:
        A module from ``[batch, in_channels, size, size]`` to logits ``[batch, ways]``, float32.

    Raises:
        ValueError: The images are too small for that many blocks.
    """
    if size < 2**blocks:
        raise ValueError(
            f"`size` is {size}, but {blocks} poolings need at least {2**blocks} pixels; lower "
            "`blocks`, or use conv_strided"
        )
    layers: list[nn.Module] = []
    with torch.device("meta"):
        for i in range(blocks):
            layers.append(_conv(in_channels if i == 0 else channels, channels, stride=1))
            layers += [*_norm(norm, channels), activation(), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(channels * (size // 2**blocks) ** 2, ways)]
        return _initialised(_Layers(*layers), init, seed)


def mlp(
    sizes: Sequence[int],
    *,
    activation: Callable[[], nn.Module] = nn.ReLU,
    seed: int = 0,
) -> nn.Module:
    """Linear layers with an activation between them, such as ``sizes=(1, 40, 40, 1)``.

    Args:
        sizes: Width of the input, of each hidden layer, and of the output.
        activation: Makes the activation, such as ``nn.Tanh``.
        seed: Seed of the initial values; the global generator is not touched.

    Returns:
        A module from ``[..., sizes[0]]`` to ``[..., sizes[-1]]``, float32. Weights are
        Xavier-normal, biases zero.

    Raises:
        ValueError: There are fewer than two sizes.
    """
    if len(sizes) < 2:
        raise ValueError(f"`sizes` is {list(sizes)}; give the widths of the input and the output")
    layers: list[nn.Module] = []
    with torch.device("meta"):
        for i in range(len(sizes) - 1):
            layers += [nn.Linear(sizes[i], sizes[i + 1]), activation()]
    module = nn.Sequential(*layers[:-1]).to_empty(device="cpu")
    random = generator(seed, "mlp")
    for layer in module:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight, generator=random)
            nn.init.zeros_(layer.bias)
    return module


def _conv(in_channels: int, channels: int, stride: int) -> nn.Module:
    return nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1)


def _norm(norm: Norm, channels: int) -> list[nn.Module]:
    makers: dict[str, Callable[[], list[nn.Module]]] = {
        "batch": lambda: [nn.BatchNorm2d(channels, track_running_stats=False)],
        "group": lambda: [nn.GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels)],
        "layer": lambda: [nn.GroupNorm(1, channels)],
        "instance": lambda: [nn.InstanceNorm2d(channels, affine=True)],
        "none": list,
    }
    if norm not in makers:
        known = ", ".join(repr(kind) for kind in makers)
        raise ValueError(f"`norm` is {norm!r}; pass one of {known}")
    return makers[norm]()


class _Layers(nn.Sequential):
    """Layers in a row; batch norm may take its statistics from reference images."""

    def forward(self, images: Tensor, reference: Tensor | None = None) -> Tensor:
        if reference is None:
            return super().forward(images)  # type: ignore[no-any-return]
        count = len(reference)
        x = torch.cat([reference, images])
        for layer in self:
            x = _normalised(layer, x, count) if isinstance(layer, nn.BatchNorm2d) else layer(x)
        return x[count:]


def _normalised(layer: nn.BatchNorm2d, x: Tensor, count: int) -> Tensor:
    """Batch norm of all images with the statistics of the first ``count``."""
    variance, mean = torch.var_mean(x[:count], (0, 2, 3), correction=0, keepdim=True)
    scale = (variance + layer.eps).rsqrt() * layer.weight[:, None, None]
    return (x - mean) * scale + layer.bias[:, None, None]


def _initialised(module: nn.Module, init: Init, seed: int) -> nn.Module:
    """Allocate the module and draw its values (made on the meta device, it has drawn none)."""
    if init not in ("torch", "imaml"):
        raise ValueError(f"`init` is {init!r}; pass 'torch' or 'imaml'")
    module = module.to_empty(device="cpu")
    random = generator(seed, "network")
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert isinstance(layer.bias, Tensor)
            if init == "imaml":
                nn.init.xavier_uniform_(layer.weight, gain=1.73, generator=random)
                nn.init.uniform_(layer.bias, 0.0, 0.05, generator=random)
            else:
                bound = layer.weight[0].numel() ** -0.5
                nn.init.uniform_(layer.weight, -bound, bound, generator=random)
                nn.init.uniform_(layer.bias, -bound, bound, generator=random)
        elif isinstance(layer, nn.BatchNorm2d | nn.GroupNorm | nn.InstanceNorm2d):
            layer.reset_parameters()
    return module
