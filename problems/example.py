"""A small instance of a problem with all that is known about it; every problem has one."""

from __future__ import annotations

from dataclasses import dataclass

from bilevel.inner_solver import InnerSolver
from bilevel.problem import BilevelProblem
from bilevel.pytree import PyTree
from bilevel.task import Task, TaskBatch

__all__ = ["Example"]


@dataclass(frozen=True, eq=False)
class Example:
    """A problem at one outer point, with a solver that solves it and bounds on its curvature.

    Every registered problem makes a small, smooth, well-conditioned one (n ≤ 200) by
    ``example(*, tasks=None, dtype=torch.float64, seed=0)``: a `Task`, or a `TaskBatch` of
    ``tasks`` tasks that differ in data. Any Jacobian J of the regularised inner stationarity, at
    the start or at the inner solution of any task, satisfies
    ‖J − (L + μ)/2 · I‖₂ ≤ (L − μ)/2, which for a Hessian says that its eigenvalues lie in [μ, L].

    Attributes:
        problem: The problem.
        outer: The outer variable.
        task: The task, or the stacked tasks.
        inner_solver: Reaches the inner solution to the rounding of the dtype.
        lipschitz: L; a learning rate of 1/L or a Neumann scale of 1/L is safe.
        mu: μ > 0; steps of 2 / (L + μ) contract by (L − μ) / (L + μ).
        gradient: The exact hypergradient, a pytree like ``outer``; None where no formula is known.
        note: What the instance is, in a sentence.
    """

    problem: BilevelProblem
    outer: PyTree
    task: Task | TaskBatch
    inner_solver: InnerSolver
    lipschitz: float
    mu: float
    gradient: PyTree = None
    note: str = ""

    @property
    def condition(self) -> float:
        """L / μ, a bound on the condition number of J."""
        return self.lipschitz / self.mu
