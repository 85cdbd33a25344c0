"""The abstract preconditioner: a cheap stand-in for the inverse of a matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from .operator import MatVec, Operator

__all__ = ["Preconditioner"]


class Preconditioner(ABC):
    """Makes a cheap M ≈ A⁻¹, symmetric positive definite; a frozen dataclass of its settings.

    It changes the number of steps of a solve, never what is solved: a status comes from the
    residual of A itself.

    Attributes:
        recycles: Number of pairs that the solver should keep for the next outer step.
    """

    recycles: int = 0

    @abstractmethod
    def prepare(self, operator: Operator, like: Tensor) -> MatVec:
        """Products with M.

        Args:
            operator: The matrix A of each task.
            like: A tensor ``[tasks, n]`` of the dtype and device of the right-hand side.
        """
