r"""The implicit hypergradient by a dense float64 solve: the reference for small problems."""

from __future__ import annotations

from dataclasses import dataclass

from bilevel.method import ImplicitMethod
from bilevel.registry import METHODS

from ..linear.dense import Dense

__all__ = ["DenseExact"]


@METHODS.register("dense")
@dataclass(frozen=True)
class DenseExact(ImplicitMethod):
    """Implicit differentiation, the inner Hessian built and factorised in float64.

    Exact given the inner solution. Costs n products and n³/3 operations, memory n² per task.

    Args:
        max_n: Refuse larger inner variables instead of filling the memory.
        damping: Added to the matrix, ≥ 0.
    """

    max_n: int = 5000

    def _linear_solver(self) -> Dense:
        return Dense(max_n=self.max_n)
