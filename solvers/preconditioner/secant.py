"""The inverse that a quasi-Newton inner solver leaves behind: SHINE (Ramzi et al., 2022).

SHINE takes it for the inverse Hessian itself, at the cost of an error that nobody sees. As a
preconditioner the same pairs save steps, and the error is the solver's tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bilevel.errors import StructureError
from bilevel.operator import MatVec, Operator
from bilevel.preconditioner import Preconditioner
from bilevel.registry import PRECONDITIONERS

from .secant_inverse import SecantInverse

__all__ = ["SecantPreconditioner"]


@PRECONDITIONERS.register("secant")
@dataclass(frozen=True)
class SecantPreconditioner(Preconditioner):
    """The L-BFGS inverse from the inner solver's own pairs; it costs no product."""

    def prepare(self, operator: Operator, like: Tensor) -> MatVec:
        """The L-BFGS inverse of the inner pairs.

        Raises:
            StructureError: The inner solver left no pairs.
        """
        if operator.inner_pairs is None:
            raise StructureError(
                "SecantPreconditioner needs the pairs of a quasi-Newton inner solver, and there "
                "are none; use LBFGS as inner solver, or another preconditioner"
            )
        return SecantInverse.of(operator.inner_pairs)
