"""A square matrix for each task, known by its products; and pairs that tell of it cheaply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from .errors import StructureError

__all__ = ["MatVec", "Operator", "SecantPairs"]

MatVec: TypeAlias = Callable[[Tensor], Tensor]
"""Product of each task's matrix with its row, ``[tasks, n] -> [tasks, n]``."""


@dataclass(frozen=True)
class SecantPairs:
    """Pairs with y ≈ A s, left by a solver: what it learned of the matrix. Newest last.

    Attributes:
        s: Steps ``[pairs, tasks, n]``.
        y: What the matrix makes of them, likewise.
        valid: Which of them hold a pair of positive curvature, ``[pairs, tasks]``.
    """

    s: Tensor
    y: Tensor
    valid: Tensor

    def select(self, index: Tensor | slice) -> SecantPairs:
        """The pairs of the tasks at ``index``."""
        return SecantPairs(self.s[:, index], self.y[:, index], self.valid[:, index])

    def row(self, i: int) -> SecantPairs:
        """Copies of the pairs of task ``i``, as of one task."""
        here = slice(i, i + 1)
        return SecantPairs(
            self.s[:, here].clone(), self.y[:, here].clone(), self.valid[:, here].clone()
        )

    @classmethod
    def together(cls, parts: Sequence[SecantPairs]) -> SecantPairs:
        """The pairs of several stacks of tasks, as of one; shorter ones begin with empty slots."""
        most = max(len(one.s) for one in parts)

        def joined(name: str) -> Tensor:
            padded = []
            for one in parts:
                x: Tensor = getattr(one, name)
                padded.append(torch.cat([x.new_zeros(most - len(x), *x.shape[1:]), x]))
            return torch.cat(padded, 1)

        return cls(joined("s"), joined("y"), joined("valid"))

    def damped(self, shift: Tensor | float) -> SecantPairs:
        """The pairs of A + shift · I; ``shift`` is a number, or ``[tasks, 1]``."""
        scale = shift.to(self.s.dtype) if isinstance(shift, Tensor) else shift
        return SecantPairs(self.s, self.y + scale * self.s, self.valid)


@dataclass(frozen=True)
class Operator:
    """The matrix A of each task, ``[tasks, n, n]``, by products alone.

    Attributes:
        product: A v.
        transposed: Aᵀ v; None where it is not known.
        gauss_newton: Product with a positive semidefinite stand-in for A; None where there is none.
        inner_pairs: Pairs left by the inner solver (quasi-Newton solvers only).
        recycled_pairs: Pairs left by the linear solve of the last outer step.
        together: A times many vectors at once, ``[vectors, tasks, n]``; None where that is no
            faster than one after the other.
    """

    product: MatVec
    transposed: MatVec | None = None
    gauss_newton: MatVec | None = None
    inner_pairs: SecantPairs | None = None
    recycled_pairs: SecantPairs | None = None
    together: MatVec | None = None

    @classmethod
    def symmetric(cls, product: MatVec) -> Operator:
        """An operator that equals its transpose."""
        return cls(product, product)

    @classmethod
    def of(cls, matvec: MatVec | Operator) -> Operator:
        """Take a plain function for an operator of which nothing else is known."""
        return matvec if isinstance(matvec, Operator) else cls(matvec)

    def __call__(self, v: Tensor) -> Tensor:
        """A v, ``[tasks, n]``."""
        return self.product(v)

    def block(self, vectors: Tensor) -> Tensor:
        """A times many vectors, ``[vectors, tasks, n]``."""
        if self.together is not None:
            return self.together(vectors)
        if not len(vectors):
            return vectors
        return torch.stack([self.product(v) for v in vectors])

    def knowing(self, inner: SecantPairs | None, recycled: SecantPairs | None) -> Operator:
        """The operator with what solvers learned of it."""
        if inner is None and recycled is None:
            return self
        return replace(self, inner_pairs=inner, recycled_pairs=recycled)

    @property
    def T(self) -> Operator:  # noqa: N802  (as in PyTorch)
        """The transposed operator.

        Raises:
            StructureError: The transposed product is not known.
        """
        if self.transposed is None:
            raise StructureError(
                "this solver needs products with the transposed matrix, which are not known here; "
                "pass Operator(product, transposed), or Operator.symmetric(product)"
            )
        together = self.together if self.is_symmetric else None
        return replace(self, product=self.transposed, transposed=self.product, together=together)

    @property
    def is_symmetric(self) -> bool:
        """The operator is known to equal its transpose."""
        return self.transposed is self.product

    def damped(self, damping: Tensor | float) -> Operator:
        """A + damping · I, with pairs to match.

        Args:
            damping: A number, or one for each task, ``[tasks]``.
        """
        if isinstance(damping, Tensor):
            shift: Tensor | float = damping.unsqueeze(-1)
        elif damping == 0.0:
            return self
        else:
            shift = damping

        def shifted(matvec: MatVec) -> MatVec:
            def product(v: Tensor) -> Tensor:
                scale = shift.to(v.dtype) if isinstance(shift, Tensor) else shift
                return matvec(v) + scale * v

            return product

        product = shifted(self.product)
        transposed = product if self.is_symmetric else None
        if transposed is None and self.transposed is not None:
            transposed = shifted(self.transposed)
        positive = None if self.gauss_newton is None else shifted(self.gauss_newton)
        return Operator(
            product,
            transposed,
            positive,
            None if self.inner_pairs is None else self.inner_pairs.damped(shift),
            None if self.recycled_pairs is None else self.recycled_pairs.damped(shift),
            None if self.together is None else shifted(self.together),
        )


def units(like: Tensor) -> Tensor:
    """The unit vectors ``[n, tasks, n]``, the same for every task (a view)."""
    n = like.shape[-1]
    return torch.eye(n, dtype=like.dtype, device=like.device).unsqueeze(1).expand(n, *like.shape)


def signs(like: Tensor, count: int) -> Tensor:
    """``[count, tasks, n]`` pseudo-random signs: the same bits at every call, on every device."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(2, (count, 1, like.shape[-1]), generator=generator)
    return (2 * drawn - 1).to(like).expand(count, *like.shape)
