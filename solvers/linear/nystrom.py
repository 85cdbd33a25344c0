r"""The Nyström method (Hataya and Yamada, 2023): a low-rank matrix is inverted in closed form.

$$v = (H_k + \rho I)^{-1} b,\qquad H_k = H_{:K}\, (H_{KK})^{+}\, H_{:K}^\top$$

with $K$ a set of $k$ columns. The paper applies Woodbury's formula, eq. 6; here $H_k$ is brought to
$U \Lambda U^\top$ first, so that no small difference of large numbers is taken:

$$v = U (\Lambda + \rho I)^{-1} U^\top b + \frac{1}{\rho} (b - U U^\top b)$$

The error of the inverse is at most $\frac{1}{\rho} \frac{D}{\rho + D}$ with $D = \|H - H_k\|$: what
the columns miss is treated as zero, so that $\rho$ must not be much smaller than it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.linear_solver import LinearSolution, LinearSolver, relative_residual
from bilevel.operator import Operator
from bilevel.problem import Structure
from bilevel.registry import LINEAR_SOLVERS
from bilevel.rows import norm
from bilevel.status import Status, marked, residual_status

from .low_rank import nystrom

__all__ = ["Nystrom"]


@LINEAR_SOLVERS.register("nystrom")
@dataclass(frozen=True)
class Nystrom(LinearSolver):
    """Invert the Nyström approximation from a few evenly spaced columns of the matrix.

    One pass of ``rank`` products, nothing iterates. It is exact only where the columns span the
    range of the matrix, and then solves a system damped by ``rho``; as a preconditioner
    (`NystromPreconditioner`) the same approximation costs accuracy nothing.

    Args:
        rank: Number of columns.
        rho: Damping ρ > 0, in the units of the matrix.
        rtol: Tolerance in ‖b − A v‖ / ‖b‖ of the undamped system, by which the status is judged; 0:
            whatever the columns give is accepted, as BUDGET.

    A task is INDEFINITE where its sampled block has a negative eigenvalue.

    Raises:
        ValueError: A setting is out of range.
    """

    needs: ClassVar[Structure] = Structure.SYMMETRIC
    rank: int = 10
    rho: float = 0.01
    rtol: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"`rank` is {self.rank}; sample at least one column")
        if not (self.rho > 0 and math.isfinite(self.rho)):
            raise ValueError(f"`rho` is {self.rho}; it is finite and > 0")
        if not 0.0 <= self.rtol < 1.0:
            raise ValueError(f"`rtol` is {self.rtol}; pass a tolerance in [0, 1), 0 for the budget")

    def _solve(self, operator: Operator, rhs: Tensor, start: Tensor | None) -> LinearSolution:
        n = rhs.shape[1]
        rank = min(self.rank, n)
        chosen = torch.arange(rank, device=rhs.device) * n // rank
        probes = torch.eye(n, dtype=torch.float64, device=rhs.device)[:, chosen]
        found = nystrom(operator, probes, rhs)
        b = rhs.double().unsqueeze(-1)
        inside = found.basis.mT @ b
        # With all columns nothing lies outside but rounding, which 1 / ρ would blow up.
        outside = b - found.basis @ inside if rank < n else torch.zeros_like(b)
        inside = inside / (found.values.unsqueeze(-1) + self.rho)
        x = (found.basis @ inside + outside / self.rho).squeeze(-1).to(rhs.dtype)
        residual = relative_residual(operator, rhs, x)
        eps = torch.finfo(rhs.dtype).eps
        status = residual_status(residual, self.rtol or eps, asked=self.rtol > 0.0)
        low, high = found.core[:, 0], found.core[:, -1]
        # Rounding leaves a singular block with eigenvalues of either sign.
        negative = low < -100 * eps * found.core.abs().amax(-1)
        status = marked(status, negative & (status != Status.CONVERGED), Status.INDEFINITE)
        status = marked(status, ~found.finite, Status.NON_FINITE)
        status = marked(status, norm(rhs) == 0, Status.CONVERGED)
        steps = torch.full((len(rhs),), rank, dtype=torch.int64, device=rhs.device)
        nan = torch.full_like(low, float("nan"))
        return LinearSolution(
            x,
            status,
            residual,
            steps,
            torch.where(found.finite, low, nan),
            torch.where(found.finite, high, nan),
        )
