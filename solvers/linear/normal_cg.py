r"""Conjugate gradients on the normal equations: CGLS (Björck, 1996, Algorithm 7.4.1).

Solves $A^\top A v = A^\top b$ for general square $A$ without forming $A^\top A$, keeping the
residual $r = b - A v$ itself:

$$\alpha = \frac{\|A^\top r\|^2}{\|A p\|^2},\quad v \leftarrow v + \alpha p,\quad
  r \leftarrow r - \alpha A p,\quad
  p \leftarrow A^\top r + \frac{\|A^\top r\|^2}{\|A^\top r_-\|^2}\, p$$

It never breaks down, and needs no definiteness; its rate is that of conjugate gradients with the
condition number squared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.linear_solver import LinearSolution, LinearSolver
from bilevel.operator import Operator
from bilevel.problem import Structure
from bilevel.registry import LINEAR_SOLVERS
from bilevel.rows import Choice, choose, column, dot, norm

from .cycles import Progress, check_settings, solve_in_cycles

__all__ = ["NormalCG"]


@LINEAR_SOLVERS.register("normal-cg")
@dataclass(frozen=True)
class NormalCG(LinearSolver):
    """Conjugate gradients on the normal equations, for any square matrix with a transpose.

    Args:
        max_steps: The most steps, of one product with the matrix and one with its transpose.
        rtol: Tolerance in ‖b − A v‖ / ‖b‖ of each task; 0 asks for ``max_steps`` steps only, and
            the residual reported is then that of the recurrence.

    Raises:
        ValueError: A setting is out of range.
        StructureError: The operator does not know its transpose.
    """

    needs: ClassVar[Structure] = Structure.GENERAL
    max_steps: int = 200
    rtol: float = 1e-5

    def __post_init__(self) -> None:
        check_settings(self.max_steps, self.rtol)

    def _solve(self, operator: Operator, rhs: Tensor, start: Tensor | None) -> LinearSolution:
        def cycle(progress: Progress) -> None:
            _cycle(operator, operator.T, progress)

        return solve_in_cycles(
            cycle, operator, rhs, start, max_steps=self.max_steps, rtol=self.rtol
        )


def _cycle(operator: Operator, transposed: Operator, progress: Progress) -> None:
    """Iterate from the residual until no task is active."""
    s = transposed(progress.r)
    # Of A / scale, so that squares stay within the range of the dtype.
    scale = norm(s)
    zero = scale == 0
    scale = torch.where(zero, 1.0, scale)
    progress.active = progress.demand_finite(scale) & ~zero
    s = p = s / column(scale, s)
    ss = dot(s, s)
    for _ in progress.rounds():
        q = operator(p) / column(scale, p)
        qq = norm(q) ** 2
        good = progress.demand_finite(qq) & (qq > 0)
        alpha = torch.where(good, ss / qq, 0.0)
        x = progress.x + column(alpha / scale, p) * p
        progress.step(Choice(good), x, progress.r - column(alpha, q) * q)
        s = transposed(progress.r) / column(scale, s)
        new = dot(s, s)
        progress.active = progress.active & (new > 0)
        p = choose(progress.active, s + column(new / ss, p) * p, p)
        ss = new
