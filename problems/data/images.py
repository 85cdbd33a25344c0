"""Images grouped by class: what few-shot tasks are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ImageClasses"]


@dataclass(frozen=True, eq=False, repr=False)
class ImageClasses:
    """A pool of image classes with equally many examples each.

    Args:
        images: ``[classes, examples, channels, height, width]``, uint8 in 0..255 or floating
            point in [0, 1].
        names: One distinct name per class.

    Raises:
        ValueError: The shape, the dtype or the number of names is wrong, or names repeat.
    """

    images: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        if self.images.ndim != 5 or 0 in self.images.shape:
            raise ValueError(
                f"`images` has shape {list(self.images.shape)}; it must be [classes, examples, "
                "channels, height, width] with no empty dimension"
            )
        if self.images.dtype != torch.uint8 and not self.images.is_floating_point():
            raise ValueError(
                f"`images` has dtype {self.images.dtype}; pass uint8 in 0..255, or floating point "
                "in [0, 1]"
            )
        if len(self.names) != len(self):
            raise ValueError(
                f"`names` has {len(self.names)} entries for {len(self)} classes; name each class"
            )
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"`names` holds {twice!r} more than once; names must be distinct")

    def __len__(self) -> int:
        return int(self.images.shape[0])

    def __repr__(self) -> str:
        shape = "×".join(str(size) for size in self.images.shape)
        return f"ImageClasses({shape}, {self.images.dtype}, {self.images.device})"

    @property
    def examples(self) -> int:
        """Number of images of each class."""
        return int(self.images.shape[1])

    def split(self, sizes: Sequence[int], seed: int = 0) -> tuple[ImageClasses, ...]:
        """Disjoint pools, cut one after the other from one seeded permutation of the classes.

        Args:
            sizes: Number of classes of each part, positive. Classes beyond their sum are left out.
            seed: Seed of the permutation; the global generator is not touched.

        Returns:
            One pool per entry of ``sizes``.

        Raises:
            ValueError: A size is not positive, or they ask for more classes than there are.
        """
        if not sizes or any(size < 1 for size in sizes):
            raise ValueError(f"`sizes` is {list(sizes)}; give one positive number per part")
        if sum(sizes) > len(self):
            raise ValueError(
                f"`sizes` {list(sizes)} ask for {sum(sizes)} classes, but the pool has "
                f"{len(self)}; make their sum at most {len(self)}"
            )
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator)[: sum(sizes)]
        return tuple(
            ImageClasses(
                self.images[part.to(self.images.device)],
                tuple(self.names[i] for i in part.tolist()),
            )
            for part in order.split(list(sizes))
        )

    def to(self, device: torch.device | str) -> ImageClasses:
        """The same pool with its images on ``device``."""
        return ImageClasses(self.images.to(device), self.names)
