r"""The implicit hypergradient by conjugate gradients (Pedregosa, 2016; Rajeswaran et al., 2019).

iMAML (Rajeswaran et al., 2019, eq. 7) is this method with a few steps on the problem whose
regularizer is $\tfrac\lambda2\|z - x\|^2$.
"""

from __future__ import annotations

from dataclasses import dataclass

from bilevel.method import ImplicitMethod
from bilevel.registry import METHODS

from ..linear.cg import CG

__all__ = ["ImplicitCG"]


@METHODS.register("cg")
@dataclass(frozen=True)
class ImplicitCG(ImplicitMethod):
    """Implicit differentiation, the adjoint system solved by conjugate gradients.

    The error falls as 2((√κ−1)/(√κ+1))ᵏ in k steps; memory does not grow with inner steps.

    Args:
        max_steps: The most CG steps.
        rtol: Tolerance relative to each task's ‖∂_z f‖; 0 asks for ``max_steps`` steps only.
        damping: Added to the matrix, ≥ 0.
    """

    max_steps: int = 100
    rtol: float = 1e-5

    def _linear_solver(self) -> CG:
        return CG(max_steps=self.max_steps, rtol=self.rtol)
