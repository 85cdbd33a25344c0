r"""Restarted GMRES (Saad and Schultz, 1986), right-preconditioned and batched over tasks.

Minimises $\|b - A v\|$ over the Krylov space of $A M$ for general $A$; with $M$ on the right the
residual stays that of $A$. Arnoldi's process builds an orthonormal basis $V$ with
$A M V_k = V_{k+1} H$, and $v = v_0 + M V_k y$ with $y = \arg\min \|\,\|r_0\| e_1 - H y\|$.

The residual is known at every step without solving for $y$ (Ayachour, 2003): with $g_1 = 1$ and
$g^\top H = 0$ it is $\|r_0\| / \|g\|$.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.linear_solver import LinearSolution, LinearSolver
from bilevel.operator import MatVec, Operator
from bilevel.preconditioner import Preconditioner
from bilevel.problem import Structure
from bilevel.registry import LINEAR_SOLVERS
from bilevel.rows import all_finite, choose, column, dot, norm

from .cycles import Progress, check_settings, prepare, solve_in_cycles

__all__ = ["GMRES"]


@LINEAR_SOLVERS.register("gmres")
@dataclass(frozen=True)
class GMRES(LinearSolver):
    """Generalised minimal residuals, for systems without symmetry.

    Args:
        max_steps: The most products with the matrix spent on iterating, over all restarts.
        rtol: Tolerance in ‖b − A v‖ / ‖b‖ of each task; 0 asks for ``max_steps`` steps only, and
            the residual reported is then that of the recurrence.
        restart: Steps between restarts, and so the number of vectors held in memory. With fewer
            than the system needs, the residual may stagnate.
        preconditioner: A cheap stand-in for the inverse; None: the identity.

    Raises:
        ValueError: A setting is out of range.
    """

    needs: ClassVar[Structure] = Structure.GENERAL
    max_steps: int = 100
    rtol: float = 1e-5
    restart: int = 30
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_settings(self.max_steps, self.rtol, self.preconditioner)
        if self.restart < 1:
            raise ValueError(f"`restart` is {self.restart}; take at least one step in between")

    def _solve(self, operator: Operator, rhs: Tensor, start: Tensor | None) -> LinearSolution:
        precondition = prepare(self.preconditioner, operator, rhs)
        # The Krylov space has no more dimensions than there are unknowns.
        length = min(self.restart, self.max_steps, rhs.shape[1])

        def cycle(progress: Progress) -> None:
            _cycle(operator, precondition, progress, length)

        return solve_in_cycles(
            cycle, operator, rhs, start, max_steps=self.max_steps, rtol=self.rtol
        )


def _cycle(operator: Operator, precondition: MatVec, progress: Progress, length: int) -> None:
    """One restart: ``length`` steps, fewer where a task is done."""
    entered, size = progress.active, progress.rr.sqrt()
    basis = progress.r.new_zeros(length + 1, *progress.r.shape)
    basis[0] = choose(entered, progress.r / column(size, progress.r), basis[0])
    hessenberg = size.new_zeros(len(size), length + 1, length)
    g = torch.ones(1, len(size), dtype=torch.float64, device=size.device)
    used = 0
    for k in progress.rounds():
        if k == length:
            break
        used = k + 1
        w = operator(precondition(basis[k]))
        before = norm(w)
        good = progress.demand_finite(before)
        # Gram-Schmidt twice is enough (Giraud et al., 2005).
        above = torch.zeros_like(g)
        for _ in range(2):
            part = dot(basis[:used], w)
            w = w - (part.unsqueeze(-1).to(w.dtype) * basis[:used]).sum(0)
            above = above + part
        below = norm(w)
        # Below rounding the space is invariant, and the residual zero.
        below = torch.where(below > torch.finfo(w.dtype).eps * before, below, 0.0)
        # A task that is done gets a column that leaves the least-squares problem as it is.
        hessenberg[:, :used, k] = torch.where(good, above, 0.0).T
        hessenberg[:, used, k] = torch.where(good, below, 1.0)
        g = torch.cat([g, (-(g * above).sum(0) / below).unsqueeze(0)])
        progress.steps = progress.steps + good
        goes_on = good & (below > 0) & (size > progress.floor * g.norm(dim=0))
        progress.active = goes_on & (progress.steps < progress.max_steps)
        basis[used] = choose(good & (below > 0), w / column(below, w), basis[used])
    basis, hessenberg = basis[: used + 1], hessenberg[:, : used + 1, :used]
    _advance(precondition, progress, entered, size, basis, hessenberg)


def _advance(
    precondition: MatVec,
    progress: Progress,
    entered: Tensor,
    size: Tensor,
    basis: Tensor,
    hessenberg: Tensor,
) -> None:
    """Move each task to the minimiser over its basis; a cycle that made it worse is forgotten."""
    if len(basis) == 1:
        return
    first = torch.zeros_like(hessenberg[:, :, :1])
    first[:, 0, 0] = torch.where(entered, size, 0.0)
    q, triangle = torch.linalg.qr(hessenberg)
    y = torch.linalg.solve_triangular(triangle, q.mT @ first, upper=True)
    rest = first - hessenberg @ y
    x = progress.x + precondition(_combine(basis[:-1], y))
    r = _combine(basis, rest)
    better = entered & (dot(r, r) < progress.rr) & all_finite(x)
    progress.x, progress.r = choose(better, x, progress.x), choose(better, r, progress.r)
    progress.rr = torch.where(better, dot(r, r), progress.rr)
    progress.active = torch.zeros_like(entered)


def _combine(basis: Tensor, weights: Tensor) -> Tensor:
    """Σ wₖ vₖ of each task."""
    return (weights.permute(1, 0, 2).to(basis.dtype) * basis).sum(0)
