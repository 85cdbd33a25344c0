r"""The implicit hypergradient by a truncated Neumann series (Lorraine et al., 2020, eq. 3).

$$v = a \sum_{j=0}^{K-1} (I - a\,\partial^2_{zz}G)^j\, \partial_z f$$
"""

from __future__ import annotations

from dataclasses import dataclass

from bilevel.method import ImplicitMethod
from bilevel.registry import METHODS

from ..linear.neumann import Neumann

__all__ = ["NeumannSeries"]


@METHODS.register("neumann")
@dataclass(frozen=True)
class NeumannSeries(ImplicitMethod):
    """Implicit differentiation, the inverse Hessian replaced by a truncated Neumann series.

    Converges iff 0 < scale < 2/L with positive curvature; a scale beyond is reported as DIVERGED.

    Args:
        terms: Number of terms, which is also the number of Hessian products.
        scale: The scale a; None: found by power iteration (12 more products).
        rtol: Stop a task early within this relative residual; 0: sum all terms.
        damping: Added to the matrix, ≥ 0.
    """

    terms: int = 100
    scale: float | None = None
    rtol: float = 0.0

    def _linear_solver(self) -> Neumann:
        return Neumann(terms=self.terms, scale=self.scale, rtol=self.rtol)
