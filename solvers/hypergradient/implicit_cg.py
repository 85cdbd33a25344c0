r"""The implicit hypergradient by conjugate gradients (Pedregosa, 2016; Rajeswaran et al., 2019).

iMAML (Rajeswaran et al., 2019, eq. 7) is this method with a few steps on the problem whose
regularizer is $\tfrac\lambda2\|z - x\|^2$.
"""

from __future__ import annotations

from dataclasses import dataclass

from bilevel.method import ImplicitMethod
from bilevel.preconditioner import Preconditioner
from bilevel.registry import METHODS

from ..linear.cg import CG
from ..linear.curvature import Policy

__all__ = ["ImplicitCG"]


@METHODS.register("cg")
@dataclass(frozen=True)
class ImplicitCG(ImplicitMethod):
    """Implicit differentiation, the adjoint system solved by conjugate gradients.

    The error falls as 2((√κ−1)/(√κ+1))ᵏ in k steps; memory does not grow with inner steps.

    Args:
        max_steps: The most CG steps.
        rtol: Tolerance relative to each task's ‖∂_z f‖; 0 asks for ``max_steps`` steps only.
        preconditioner: A stand-in for the inverse Hessian that saves steps; None: none.
        indefinite: What to do about negative curvature: ``"truncate"``, ``"error"``, ``"damp"``,
            ``"ggn"`` or ``"minres"``; see `CG`.
        damping: Added to the matrix, ≥ 0.
    """

    max_steps: int = 100
    rtol: float = 1e-5
    preconditioner: Preconditioner | None = None
    indefinite: Policy = "truncate"

    def _linear_solver(self) -> CG:
        return CG(self.max_steps, self.rtol, self.preconditioner, self.indefinite)
