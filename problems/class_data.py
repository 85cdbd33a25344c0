"""Random rows in Gaussian classes, for problems with labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .seeding import generator

__all__ = ["class_data"]


def class_data(
    rows: int, features: int, classes: int, separation: float, seed: tuple[int | str, ...]
) -> tuple[Tensor, Tensor]:
    """Draw rows around one center per class; the last feature is a constant one.

    Args:
        rows: Number of rows; classes follow one another in turn.
        features: Number of features, the constant included.
        classes: Number of classes.
        separation: Length of the vector from the origin to each center; the noise has standard
            deviation 1 in every direction.
        seed: Seed of everything random.

    Returns:
        Features ``[rows, features]``, float64, and labels ``[rows]``, int64.

    Raises:
        ValueError: A count is too small.
    """
    for name, value, least in (
        ("rows", rows, 1),
        ("features", features, 2),
        ("classes", classes, 2),
    ):
        if value < least:
            raise ValueError(f"`{name}` is {value}; it must be at least {least}")
    random = generator(*seed)
    centers = torch.randn(classes, features - 1, generator=random, dtype=torch.float64)
    centers = separation * F.normalize(centers, dim=-1)
    labels = torch.arange(rows) % classes
    noise = torch.randn(rows, features - 1, generator=random, dtype=torch.float64)
    return F.pad(centers[labels] + noise, (0, 1), value=1.0), labels
