r"""Conjugate gradients (Hestenes and Stiefel, 1952), preconditioned and batched over tasks.

Solves $A v = b$ for symmetric positive definite $A$. After $k$ steps the error in the energy norm
is at most $2\left(\frac{\sqrt\kappa-1}{\sqrt\kappa+1}\right)^k$ times the first one, with $\kappa$
the condition number of $A$, or of $M A$ where there is a preconditioner $M \approx A^{-1}$:

$$\alpha = \frac{r^\top M r}{p^\top A p},\quad v \leftarrow v + \alpha p,\quad
  r \leftarrow r - \alpha A p,\quad \beta = \frac{r_+^\top M r_+}{r^\top M r},\quad
  p \leftarrow M r + \beta p$$

Departures from the textbook: every task has its own scalars and stops on its own; curvature
$p^\top A p \le 0$ stops a task at its last good iterate, as INDEFINITE; a claim of convergence is
checked against the true residual, and iteration restarts from there where it does not hold.
Without a preconditioner the scalars give the Lanczos matrix (Golub and Van Loan, 2013, 11.3.5):
diagonal $\frac{1}{\alpha_k} + \frac{\beta_{k-1}}{\alpha_{k-1}}$, off-diagonal
$\frac{\sqrt{\beta_k}}{\alpha_k}$.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, get_args

import torch
from torch import Tensor

from bilevel.linear_solver import LinearSolution, LinearSolver, with_tolerance
from bilevel.operator import MatVec, Operator
from bilevel.preconditioner import Preconditioner
from bilevel.problem import Structure
from bilevel.registry import LINEAR_SOLVERS
from bilevel.rows import Choice, all_between, dot, plus

from .curvature import Policy, repair
from .cycles import Progress, check_settings, prepare, solve_in_cycles
from .lanczos import Lanczos
from .minres import minres
from .pairs import PairKeeper

__all__ = ["CG"]


@LINEAR_SOLVERS.register("cg")
@dataclass(frozen=True)
class CG(LinearSolver):
    """Conjugate gradients for symmetric positive definite systems.

    Args:
        max_steps: The most products with the matrix spent on iterating.
        rtol: Tolerance in ‖b − A v‖ / ‖b‖ of each task; 0 asks for ``max_steps`` steps only, and
            the residual reported is then that of the recurrence.
        preconditioner: A cheap stand-in for the inverse; None: the identity.
        indefinite: What becomes of a task that meets negative curvature; it is INDEFINITE in any
            case, and its residual is that of A. ``"truncate"``: its last good iterate; ``"error"``:
            raise; ``"damp"``: the solution with A + damping · I for about the smallest damping that
            restores positive curvature; ``"ggn"``: that with the Gauss-Newton matrix;
            ``"minres"``: that of A all the same, by MINRES.

    Raises:
        ValueError: A setting is out of range.
        SolveError: Negative curvature was met, and ``indefinite`` is ``"error"``.
        StructureError: ``indefinite`` is ``"ggn"``, but there is no Gauss-Newton matrix.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[[2.0, 0.0], [0.0, 4.0]]])
        >>> solution = CG(max_steps=2)(lambda v: (matrix @ v[..., None])[..., 0], torch.ones(1, 2))
        >>> solution.value
        tensor([[0.5000, 0.2500]])
    """

    needs: ClassVar[Structure] = Structure.SYMMETRIC
    max_steps: int = 100
    rtol: float = 1e-5
    preconditioner: Preconditioner | None = None
    indefinite: Policy = "truncate"

    def __post_init__(self) -> None:
        check_settings(self.max_steps, self.rtol, self.preconditioner)
        if self.indefinite not in get_args(Policy):
            known = ", ".join(get_args(Policy))
            raise ValueError(f"`indefinite` is '{self.indefinite}'; pass one of: {known}")

    def toward(self, rtol: float, most: int) -> CG:
        """The same solver asked for a relative residual; negative curvature only ends it."""
        return replace(with_tolerance(self, rtol, most), indefinite="truncate")

    def _solve(self, operator: Operator, rhs: Tensor, start: Tensor | None) -> LinearSolution:
        precondition = prepare(self.preconditioner, operator, rhs)
        found = self._iterate(operator, rhs, start, precondition)
        if self.indefinite == "truncate":
            return found

        def by_cg(other: Operator, b: Tensor) -> LinearSolution:
            return self._iterate(other, b, None, precondition)

        def by_minres(other: Operator, b: Tensor) -> LinearSolution:
            return minres(other, b, None, precondition, self.max_steps, self.rtol)

        return repair(self.indefinite, found, operator, rhs, by_cg, by_minres)

    def _iterate(
        self, operator: Operator, rhs: Tensor, start: Tensor | None, precondition: MatVec
    ) -> LinearSolution:
        """Solve as far as positive curvature goes."""
        count = 0 if self.preconditioner is None else self.preconditioner.recycles
        keeper = PairKeeper(count, rhs, operator.recycled_pairs) if count else None
        lanczos = Lanczos(rhs) if self.preconditioner is None else None

        plain = self.preconditioner is None

        def cycle(progress: Progress) -> None:
            _cycle(operator, None if plain else precondition, progress, lanczos, keeper)
            if lanczos is not None:
                lanczos.close()

        found = solve_in_cycles(
            cycle, operator, rhs, start, max_steps=self.max_steps, rtol=self.rtol
        )
        return replace(
            found,
            tridiagonal=None if lanczos is None else lanczos.table,
            pairs=None if keeper is None else keeper.pairs(),
        )


def _cycle(
    operator: Operator,
    precondition: MatVec | None,
    progress: Progress,
    lanczos: Lanczos | None,
    keeper: PairKeeper | None,
) -> None:
    """Iterate from the residual until no task is active."""
    z = p = progress.r if precondition is None else precondition(progress.r)
    rz = progress.rr if precondition is None else dot(progress.r, z)
    ap = None
    if precondition is None and keeper is None and lanczos is not None and progress.alone:
        p, ap = _stride(operator, progress, lanczos, p)
        rz = progress.rr
    for _ in progress.rounds():
        ap = operator(p) if ap is None else ap
        pap, pp = dot(p, ap), dot(p, p)
        met = progress.active
        sound = progress.everyone and all(all_between(0.0, x, math.inf) for x in (pap, pp, rz))
        progress.observe(pap / pp, sound=sound)
        if sound:
            choose = Choice(met, everyone=True)
        else:
            choose = Choice(met & (pap > 0) & (pap < math.inf) & (rz > 0))
            met = progress.demand_finite(pap)
            progress.indefinite = progress.indefinite | (met & (pap <= 0))
        alpha = rz / pap if choose.everyone else torch.where(met, rz / pap, 0.0)
        # A choice, not a product with alpha = 0: a failed task's NaN would spread over its row.
        x = plus(progress.x, alpha, p)
        r = plus(progress.r, alpha, ap, -1.0)
        progress.step(choose, x, r)
        z = progress.r if precondition is None else precondition(progress.r)
        new = progress.rr if precondition is None else dot(progress.r, z)
        beta = choose(new / rz, 0.0)
        if lanczos is not None:
            # The step that met negative curvature is recorded too: it has a negative Ritz value.
            lanczos.add_coefficients(met, alpha, beta)
        if keeper is not None:
            keeper.add(choose.tasks, p, ap)
        p, ap = choose(plus(z, beta, p), p), None
        rz = choose(new, rz)


def _stride(
    operator: Operator, progress: Progress, lanczos: Lanczos, p: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Steps of a task that is alone, for as long as nothing unusual is met.

    Its scalars are numbers, which cost less than tensors of one entry and have the same bits.
    Returns the next direction, and its product where one was taken that only `_cycle` can judge.
    """
    x, r, rr = progress.x, progress.r, progress.rr.item()
    pp = rr
    most = torch.finfo(x.dtype).max
    quotients: list[float] = []
    ap = None
    while progress.goes_on(rr, len(quotients)):
        ap = operator(p)
        pap = dot(p, ap).item()
        if not (0.0 < pap < math.inf and 0.0 < pp < math.inf and rr / pap < most):
            break
        quotients.append(pap / pp)
        alpha = rr / pap
        x, r = torch.add(x, p, alpha=alpha), torch.add(r, ap, alpha=-alpha)
        rr, last = dot(r, r).item(), rr
        beta = rr / last
        lanczos.add_coefficients(True, alpha, beta)
        p, ap = torch.add(r, p, alpha=beta) if beta < most else r * beta, None
        pp = rr + beta * beta * pp  # r is orthogonal to the last p
    progress.strode(x, r, rr, quotients)
    return p, ap
