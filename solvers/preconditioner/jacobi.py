r"""The Jacobi preconditioner: the inverse of the diagonal (Jacobi, 1845).

The diagonal is exact from $n$ products, or estimated with random signs $s$ (Bekas, Kokiopoulou and
Saad, 2007):

$$\operatorname{diag}(A) \approx \frac{1}{m} \sum_{i=1}^m s_i \odot A s_i$$

with an error in entry $j$ of variance $\frac{1}{m} \sum_{k \ne j} A_{jk}^2$ for symmetric $A$.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.operator import MatVec, Operator, signs, units
from bilevel.preconditioner import Preconditioner
from bilevel.registry import PRECONDITIONERS

__all__ = ["JacobiPreconditioner"]


@PRECONDITIONERS.register("jacobi")
@dataclass(frozen=True)
class JacobiPreconditioner(Preconditioner):
    """The inverse diagonal, for unknowns of very different scale.

    Args:
        samples: Number of random probes that estimate the diagonal, one product each. None: the
            exact diagonal, one product for each unknown.

    Raises:
        ValueError: A setting is out of range.
    """

    samples: int | None = None

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"`samples` is {self.samples}; take at least one, or None")

    def prepare(self, operator: Operator, like: Tensor) -> MatVec:
        """Divide by the absolute diagonal, kept away from zero."""
        if self.samples is None:
            diagonal = _exact(operator, like)
        else:
            probes = signs(like, self.samples)
            diagonal = (probes * operator.block(probes)).mean(0)
        diagonal = diagonal.abs()
        largest = diagonal.amax(-1, keepdim=True)
        diagonal = torch.maximum(diagonal, torch.finfo(like.dtype).eps * largest)
        diagonal = torch.where(largest > 0, diagonal, 1.0)
        return lambda v: v / diagonal


def _exact(operator: Operator, like: Tensor) -> Tensor:
    return operator.block(units(like)).diagonal(dim1=0, dim2=2).clone()
