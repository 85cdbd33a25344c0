r"""The dense solve: build $A$ from $n$ products, factorise it in float64.

Cost: $n$ products and $n^3/3$ operations; memory $n^2$ per task. The reference for small problems.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.linear_solver import LinearSolution, LinearSolver
from bilevel.operator import MatVec, Operator, units
from bilevel.registry import LINEAR_SOLVERS
from bilevel.rows import norm
from bilevel.status import Status, marked, residual_status

__all__ = ["Dense"]


@LINEAR_SOLVERS.register("dense")
@dataclass(frozen=True)
class Dense(LinearSolver):
    """Dense solve in float64 by LU; symmetric or not.

    A task whose matrix is symmetric but not positive definite is solved all the same and reported
    INDEFINITE with its extreme eigenvalues; a singular one is NON_FINITE.

    Args:
        rtol: Tolerance in ‖b − A v‖ / ‖b‖, by which the status is judged.
        max_n: Refuse larger systems instead of filling the memory.

    Raises:
        ValueError: A setting is out of range, or the system is larger than ``max_n``.
    """

    rtol: float = 1e-6
    max_n: int = 5000

    def __post_init__(self) -> None:
        if not 0.0 < self.rtol < 1.0:
            raise ValueError(f"`rtol` is {self.rtol}; pass a tolerance in (0, 1)")
        if self.max_n < 1:
            raise ValueError(f"`max_n` is {self.max_n}; it is a size ≥ 1")

    def _solve(self, operator: Operator, rhs: Tensor, start: Tensor | None) -> LinearSolution:
        count, n = rhs.shape
        if n > self.max_n:
            raise ValueError(
                f"the inner variable has {n} entries, more than `max_n` = {self.max_n}: a dense "
                f"solve would hold {count} × {n}² numbers; use CG, or raise `max_n`"
            )
        matrix = build_matrix(operator, rhs)
        b = rhs.double()
        value, singular = torch.linalg.solve_ex(matrix, b.unsqueeze(-1))
        x = value.squeeze(-1)
        residual = norm((matrix @ x.unsqueeze(-1)).squeeze(-1) - b)
        status = residual_status(residual, self.rtol, asked=True)
        gap = (matrix - matrix.mT).abs().amax((-1, -2))
        size = matrix.abs().amax((-1, -2))
        symmetric = gap <= 1e-4 * size
        finite = matrix.isfinite().all(-1).all(-1)
        safe = torch.where((symmetric & finite)[:, None, None], (matrix + matrix.mT) / 2, 0.0)
        eigenvalues = torch.linalg.eigvalsh(safe)
        low, high = eigenvalues[:, 0], eigenvalues[:, -1]
        unknown = ~(symmetric & finite)
        # The products are rounded: an eigenvalue within that of zero may have either sign.
        rounding = torch.finfo(rhs.dtype).eps * n**0.5 * torch.maximum(high.abs(), low.abs())
        indefinite = ~unknown & (low <= rounding)
        status = marked(status, indefinite, Status.INDEFINITE)
        zero = norm(rhs) == 0
        broken = (singular != 0) & ~zero
        status = marked(status, broken | ~finite, Status.NON_FINITE)
        status = marked(status, zero, Status.CONVERGED)
        nan = torch.full_like(low, float("nan"))
        return LinearSolution(
            torch.where(zero.unsqueeze(-1), 0.0, x).to(rhs.dtype),
            status,
            torch.where(zero, 0.0, residual),
            torch.full((count,), n, dtype=torch.int64, device=rhs.device),
            torch.where(unknown, nan, low),
            torch.where(unknown, nan, high),
        )


def build_matrix(matvec: MatVec | Operator, like: Tensor) -> Tensor:
    """Each task's matrix ``[tasks, n, n]`` in float64, from n products."""
    return Operator.of(matvec).block(units(like)).double().permute(1, 2, 0)
