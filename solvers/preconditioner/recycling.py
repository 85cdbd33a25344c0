"""Recycling the directions of the last linear solve (Morales and Nocedal, 2000).

From one outer step to the next the inner Hessian hardly changes. The conjugate directions of one
solve, and what the matrix made of them, are L-BFGS pairs for the next.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bilevel.operator import MatVec, Operator
from bilevel.preconditioner import Preconditioner
from bilevel.registry import PRECONDITIONERS

from .secant_inverse import SecantInverse

__all__ = ["RecyclingPreconditioner"]


@PRECONDITIONERS.register("recycling")
@dataclass(frozen=True)
class RecyclingPreconditioner(Preconditioner):
    """The L-BFGS inverse from the first search directions of the previous outer step's `CG`.

    On the first outer step there are none, and it is the identity. It costs no product. It pays
    where the matrix hardly changes: where the eigenvectors of large outlying eigenvalues turn from
    one outer step to the next, it may cost more steps than it saves.

    Args:
        pairs: Number of directions kept, two vectors of memory each.

    Raises:
        ValueError: A setting is out of range.
    """

    pairs: int = 10

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"`pairs` is {self.pairs}; keep at least one")

    @property
    def recycles(self) -> int:  # type: ignore[override]  # follows `pairs`
        """Number of pairs that the solver should keep for the next outer step."""
        return self.pairs

    def prepare(self, operator: Operator, like: Tensor) -> MatVec:
        """The L-BFGS inverse of the recycled pairs."""
        pairs = operator.recycled_pairs
        return (lambda v: v) if pairs is None else SecantInverse.of(pairs)
