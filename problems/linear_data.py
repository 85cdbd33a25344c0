"""Random designs for linear models: few informative features of many, columns of uneven scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .seeding import generator

__all__ = ["LinearData", "linear_data"]


@dataclass(frozen=True)
class LinearData:
    """A draw of `linear_data`, float64.

    Attributes:
        features: ``[rows, features]``.
        signal: The features' product with the true coefficients ``[rows]``, of variance near 1.
        noise: Standard normal ``[rows]``, not added yet.
    """

    features: Tensor
    signal: Tensor
    noise: Tensor


def linear_data(
    rows: int, features: int, informative: int, spread: float, seed: tuple[int | str, ...]
) -> LinearData:
    """Draw a Gaussian design whose first ``informative`` features carry the signal.

    Args:
        rows: Number of rows.
        features: Number of features.
        informative: How many of them have a nonzero coefficient.
        spread: Ratio of the largest column scale to the smallest, ≥ 1; scales are log-spaced from
            1 down, in random order.
        seed: Seed of everything random.

    Raises:
        ValueError: A count is not positive, or there are more informative features than features.
    """
    for name, value in (("rows", rows), ("features", features), ("informative", informative)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}; it must be at least 1")
    if informative > features:
        raise ValueError(
            f"`informative` is {informative}, but there are {features} features; lower it"
        )
    if not 1.0 <= spread < math.inf:
        raise ValueError(f"`spread` is {spread}; a ratio of scales is finite and ≥ 1")
    random = generator(*seed)
    scales = torch.logspace(0.0, -math.log10(spread), features, dtype=torch.float64)
    scales = scales[torch.randperm(features, generator=random)]
    standard = torch.randn(rows, features, generator=random, dtype=torch.float64)
    signs = torch.randint(2, (informative,), generator=random).double() * 2 - 1
    signal = standard[:, :informative] @ signs / math.sqrt(informative)
    noise = torch.randn(rows, generator=random, dtype=torch.float64)
    return LinearData(standard * scales, signal, noise)
