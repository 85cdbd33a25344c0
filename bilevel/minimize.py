r"""`minimize`: the outer problem solved with neither a learning rate nor tolerances to choose.

Limited-memory BFGS directions in the outer variable, a backtracking line search on the outer
objective, and an `AccuracyPolicy` that decides how accurately each hypergradient is computed. The
line search solves the inner problem at each trial point, and compares corrected values

$$\hat F = f - v^\top \partial_z G,$$

whose error is quadratic in the inner error, at no further solve (Pierce and Giles, 2000).
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .accuracy import AccuracyPolicy, ErrorDrivenAccuracy, Tolerances
from .brief import brief
from .errors import ObjectiveError, SolveError
from .flat import FlatProblem, Outer
from .hypergradient import Group, check_problem, compute, group
from .inner_solver import InnerSolver
from .method import ImplicitMethod
from .problem import BilevelProblem
from .pytree import PyTree, tree_leaves
from .result import Hypergradient, State
from .rows import dot, norm
from .status import Status, describe_status
from .task import Task, TaskBatch

__all__ = ["Minimum", "OuterStatus", "OuterStep", "minimize"]

_ARMIJO = 1e-4
_TRIALS = 20
_QUASI_NEWTON_TRIALS = 6
_LONGEST = 0.5
_SLACK = 1e-6
_ROUGH = 0.05
_MEMORY = 10
_BUDGET = 10_000


class OuterStatus(Enum):
    """How a minimisation ended."""

    CONVERGED = "the hypergradient's norm is within the tolerance"
    MAX_STEPS = "the permitted outer steps are spent"
    BUDGET = "the permitted gradients and products are spent"
    STALLED = "no step decreases the outer objective, as far as it can be evaluated"
    INACCURATE = "the solves could not be made accurate enough; raise the inner solver's budget"
    FAILED = "a solve failed at the next point; the last good one is returned"


@dataclass(frozen=True)
class OuterStep:
    """One outer step in numbers.

    Attributes:
        step: Number of the step, from 0.
        value: The outer objective, corrected to first order, mean over tasks.
        gradient_norm: Norm of the hypergradient over all leaves.
        inner_tolerance: The tolerance of the inner solve.
        linear_tolerance: The tolerance of the adjoint solve.
        attempts: Hypergradients computed until one was accurate enough.
        length: Length of the step along the search direction; 0 for the last one.
        counts: Gradients, products and values so far.
        seconds: Wall-clock time so far.
    """

    step: int
    value: float
    gradient_norm: float
    inner_tolerance: float
    linear_tolerance: float
    attempts: int
    length: float
    counts: dict[str, int]
    seconds: float


@dataclass(frozen=True)
class Minimum:
    """What `minimize` found.

    Attributes:
        outer: The outer variable, a new pytree.
        value: The outer objective there, mean over tasks, corrected to first order for the inner
            error; ``result.outer_value`` holds it uncorrected.
        status: How it ended.
        steps: One record per outer step.
        result: The hypergradient there, with the inner solution.
        counts: Gradients, products and values over the whole run, line searches and error
            estimates included.
    """

    outer: PyTree
    value: float
    status: OuterStatus
    steps: list[OuterStep]
    result: Hypergradient
    counts: dict[str, int]

    def __repr__(self) -> str:
        return (
            f"Minimum(value={self.value:.6g}, {self.status.name} after {len(self.steps)} steps, "
            f"{self.counts.get('gradients', 0)} gradients, "
            f"{self.counts.get('products', 0)} products)"
        )


def minimize(
    problem: BilevelProblem,
    outer: PyTree,
    task: Task | TaskBatch | Sequence[Task] | None = None,
    *,
    inner_solver: InnerSolver,
    method: ImplicitMethod,
    accuracy: AccuracyPolicy | None = None,
    tol: float = 1e-4,
    max_steps: int = 200,
    budget: int | None = None,
    callback: Callable[[OuterStep], None] | None = None,
) -> Minimum:
    """Minimise the outer objective of a deterministic problem: the same tasks at every step.

    Args:
        problem: The bilevel problem.
        outer: The outer variable to start from, a pytree of floating tensors. It is not changed.
        task: As in `hypergradient`.
        inner_solver: Finds the inner solution; its ``tol`` is set at each step. LBFGS is a good
            one.
        method: An implicit method; its ``rtol`` is set at each step.
        accuracy: How accurately to solve; default: `ErrorDrivenAccuracy()`.
        tol: Stop once the hypergradient's norm is within this fraction of the first one.
        max_steps: The most outer steps.
        budget: The most gradients plus products of the inner objective; None: no limit. Asked for
            after each hypergradient, so that the last one may exceed it; one is always computed.
        callback: Called after each step with its record.

    Raises:
        SolveError: The inner or the adjoint solve failed at ``outer`` itself.
        ValueError: An argument has the wrong kind or value; it is named.

    Example:
        >>> import torch
        >>> from bilevel import Proximal, minimize, problem_from
        >>> from bilevel.solvers import LBFGS, ImplicitCG
        >>> problem = problem_from(
        ...     lambda z, x, batch: 0.5 * (z**2).sum(),
        ...     lambda z, x, batch: ((z - 1.0) ** 2).sum(),
        ...     Proximal(1.0),
        ... )
        >>> found = minimize(problem, torch.zeros(2), inner_solver=LBFGS(), method=ImplicitCG())
        >>> found.status.name
        'CONVERGED'
        >>> torch.allclose(found.outer, torch.full((2,), 2.0), atol=1e-3)
        True
    """
    check_problem(problem, inner_solver, method, None)
    if not isinstance(method, ImplicitMethod):
        raise ValueError(
            f"`method` is {brief(method)}, whose accuracy cannot be set; pass an implicit method"
        )
    if not hasattr(inner_solver, "tol"):
        raise ValueError(f"`inner_solver` is {inner_solver!r}, which takes no `tol`")
    if accuracy is not None and not isinstance(accuracy, AccuracyPolicy):
        raise ValueError(
            f"`accuracy` is a {type(accuracy).__name__}; pass a policy such as "
            "ErrorDrivenAccuracy(), or None"
        )
    if not 0.0 < tol < 1.0:
        raise ValueError(f"`tol` is {tol}; pass a fraction in (0, 1)")
    if max_steps < 1:
        raise ValueError(f"`max_steps` is {max_steps}; take at least one step")
    if budget is not None and (type(budget) is not int or budget < 1):
        raise ValueError(f"`budget` is {budget!r}; pass a number of gradients ≥ 1, or None")
    run = _Run(problem, Outer.of(outer).cloned(), task, inner_solver, method)
    return run.minimize(accuracy or ErrorDrivenAccuracy(), tol, max_steps, budget, callback)


@dataclass(frozen=True)
class _Value:
    """The outer objective at one point, and the inner point it was found with."""

    value: float
    state: State
    ok: bool


@dataclass
class _Run:
    """One minimisation: the problem, and what has been spent on it."""

    problem: BilevelProblem
    outer: Outer
    task: Any
    inner_solver: InnerSolver
    method: ImplicitMethod
    counts: Counter[str] = field(default_factory=Counter)

    def minimize(
        self,
        accuracy: AccuracyPolicy,
        tol: float,
        max_steps: int,
        budget: int | None,
        callback: Callable[[OuterStep], None] | None,
    ) -> Minimum:
        started = time.perf_counter()
        control = accuracy.controller(self._first_residual())
        pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=_MEMORY)
        records: list[OuterStep] = []
        state: State | None = None
        good: tuple[Tensor, Hypergradient] | None = None
        first_norm, length, scale = math.inf, 0.0, 0.0
        x = _vector(self.outer.leaves)
        previous: tuple[Tensor, Tensor] | None = None
        while True:
            try:
                result, attempts = self._accurate(x, control, state)
            except SolveError:
                if good is None:
                    raise
                return self._minimum(*good, OuterStatus.FAILED, records)
            u = _vector(tree_leaves(result.gradient))
            norm = float(u.norm())
            first_norm = min(first_norm, norm) if not records else first_norm
            here = self._value(x, control.tolerances, result.state, solve=False)
            if good is not None and previous is not None:
                highest = records[-1].value + _SLACK * (abs(records[-1].value) + scale)
                # The line search was deceived by rough solves: go back, and look closer.
                if not here.value <= highest and control.tighten():
                    x, state, previous = good[0], good[1].state, None
                    pairs.clear()
                    continue
            scale = abs(here.value) if not records else scale
            if previous is not None:
                _remember(pairs, x - previous[0], u - previous[1])
            status = OuterStatus.CONVERGED if norm <= tol * first_norm else None
            if status is None and len(records) >= max_steps:
                status = OuterStatus.MAX_STEPS
            spent = self.counts["gradients"] + self.counts["products"]
            if status is None and budget is not None and spent >= budget:
                status = OuterStatus.BUDGET
            trial: tuple[Tensor, _Value, float] | None = None
            if status is None:
                trial = self._search(x, u, here, pairs, control.tolerances)
                if trial is None and control.tighten():
                    pairs.clear()
                    previous, state = None, result.state
                    continue
                status = OuterStatus.STALLED if trial is None else None
            length = 0.0 if trial is None else trial[2]
            records.append(
                OuterStep(
                    len(records),
                    here.value,
                    norm,
                    control.tolerances.inner,
                    control.tolerances.linear,
                    attempts,
                    length,
                    dict(self.counts),
                    time.perf_counter() - started,
                )
            )
            if callback is not None:
                callback(records[-1])
            good = (x, result)
            if trial is None:
                assert status is not None
                if not (control.accurate and result.ok):
                    status = OuterStatus.INACCURATE
                return self._minimum(x, result, status, records)
            previous = (x, u)
            x, ahead, _ = trial
            state = replace(ahead.state, adjoint=result.state.adjoint, pairs=result.state.pairs)
            control.stepped(len(records))

    def _minimum(
        self, x: Tensor, result: Hypergradient, status: OuterStatus, records: list[OuterStep]
    ) -> Minimum:
        tree = self._outer(x).tree
        return Minimum(tree, records[-1].value, status, records, result, dict(self.counts))

    # Hypergradients and values

    def _accurate(self, x: Tensor, control: Any, state: State | None) -> tuple[Hypergradient, int]:
        """A hypergradient that the controller accepts; each attempt goes on from the last."""
        attempts = 0
        while True:
            attempts += 1
            tolerances: Tolerances = control.tolerances
            method = replace(
                self.method.toward(tolerances.linear, _BUDGET),
                error_estimate=_ROUGH if control.estimate else False,
            )
            result = compute(
                self.problem,
                self._outer(x).tree,
                self.task,
                inner_solver=self.inner_solver.toward(tolerances.inner),
                method=method,
                state=state,
            )
            self.counts.update(result.diagnostics.counts)
            if result.diagnostics.failed:
                raise SolveError(
                    f"{describe_status(result.status)} Start from another `outer`, or change the "
                    "inner solver's settings."
                )
            if control.judge(result, _vector(tree_leaves(result.gradient))):
                return result, attempts
            state = result.state

    def _value(self, x: Tensor, tolerances: Tolerances, state: State, *, solve: bool) -> _Value:
        """The corrected outer objective; ``state`` holds where to start and the adjoint."""
        solver = self.inner_solver.toward(tolerances.inner)
        values, weights, points, ok = [], [], [], True
        for i, one in enumerate(self._groups):
            flat = FlatProblem.of(self.problem, self._outer(x), one.tasks, one.inner)
            z = state.inner[i]
            if solve:
                z = solver.solve(flat, z).z
            gradient = flat.gradient(z)
            if solve:
                # Where the budget binds, a corrected value is not to be trusted.
                ok = ok and bool((norm(gradient) <= 10.0 * tolerances.inner).all())
            with torch.enable_grad():  # an objective may differentiate inside itself
                value = flat.outer_value(z.detach().requires_grad_()).detach().double()
            adjoint = state.adjoint[i]
            if adjoint is not None:
                value = value - dot(adjoint, gradient)
            ok = ok and bool(value.isfinite().all())
            values.append(value)
            assert one.tasks.weights is not None
            weights.append(one.tasks.weights.to(value.device))
            points.append(z)
            self.counts.update(flat.counts)
        total = math.fsum(float(w.sum()) for w in weights)
        mean = math.fsum(float(w @ v) for w, v in zip(weights, values, strict=True)) / total
        return _Value(mean, replace(state, inner=tuple(points)), ok)

    def _search(
        self,
        x: Tensor,
        u: Tensor,
        here: _Value,
        pairs: deque[tuple[Tensor, Tensor]],
        tolerances: Tolerances,
    ) -> tuple[Tensor, _Value, float] | None:
        """A step that decreases the outer objective enough, or None."""
        if pairs:
            direction = _two_loops(pairs, u)
            # A pair from inexact hypergradients may propose a step out of all proportion.
            longest = _LONGEST * (1.0 + float(x.norm()))
            direction = direction * min(1.0, longest / float(direction.norm()))
            slope = float(direction @ u)
            length = 1.0
            for _ in range(_QUASI_NEWTON_TRIALS if slope < 0.0 else 0):
                point = x + length * direction
                trial = self._trial(point, tolerances, here.state)
                if trial.ok and trial.value <= here.value + _ARMIJO * length * slope:
                    return point, trial, length
                length *= 0.5
            pairs.clear()
        return self._descend(x, u, here, tolerances)

    def _descend(
        self, x: Tensor, u: Tensor, here: _Value, tolerances: Tolerances
    ) -> tuple[Tensor, _Value, float] | None:
        """A step along the negative hypergradient, its length found by doubling or halving."""
        norm = float(u.norm())
        longest = _LONGEST * (1.0 + float(x.norm()))
        length = 0.1 * longest / norm
        best: tuple[Tensor, _Value, float] | None = None
        for _ in range(_TRIALS):
            point = x - length * u
            trial = self._trial(point, tolerances, here.state)
            enough = trial.ok and trial.value <= here.value - _ARMIJO * length * norm**2
            if best is not None and not (enough and trial.value < best[1].value):
                return best
            if enough:
                best = (point, trial, length)
                if 2.0 * length * norm > longest:
                    return best
                length *= 2.0
            else:
                length *= 0.25
        return best

    def _trial(self, x: Tensor, tolerances: Tolerances, state: State) -> _Value:
        try:
            return self._value(x, tolerances, state, solve=True)
        except (ObjectiveError, ArithmeticError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            # A step to where the problem is not defined, such as a strength that overflows.
            return _Value(math.inf, state, ok=False)

    def _first_residual(self) -> float:
        residuals = []
        for one in self._groups:
            flat = FlatProblem.of(self.problem, self.outer, one.tasks, one.inner)
            residuals.append(flat.gradient(flat.start).double().norm(dim=1))
            self.counts.update(flat.counts)
        residual = float(torch.cat([r.cpu() for r in residuals]).mean())
        if residual == 0.0:
            # The start is a solution already: a point beside it tells the scale.
            residual = self._residual_beside()
        if not math.isfinite(residual):
            raise SolveError(
                "the gradient of the inner objective is NaN or infinite at the first inner point "
                f"(NON_FINITE); {Status.NON_FINITE.cure}, or start from another `outer`"
            )
        return residual

    def _residual_beside(self) -> float:
        residuals = []
        for one in self._groups:
            flat = FlatProblem.of(self.problem, self.outer, one.tasks, one.inner)
            beside = flat.start + 0.1 * (1.0 + flat.start.abs())
            residuals.append(norm(flat.gradient(beside)).cpu())
            self.counts.update(flat.counts)
        return float(torch.cat(residuals).mean())

    @property
    def _groups(self) -> list[Group]:
        if not hasattr(self, "_grouped"):
            self._grouped = group(self.task, None)
        return self._grouped

    def _outer(self, x: Tensor) -> Outer:
        leaves, offset = [], 0
        for leaf in self.outer.leaves:
            part = x[offset : offset + leaf.numel()]
            leaves.append(part.reshape(leaf.shape).to(leaf))
            offset += leaf.numel()
        return self.outer.with_leaves(leaves)


# Vectors of the outer variable, float64 on the CPU


def _vector(leaves: Sequence[Tensor]) -> Tensor:
    return torch.cat([leaf.detach().reshape(-1).double().cpu() for leaf in leaves])


def _remember(pairs: deque[tuple[Tensor, Tensor]], s: Tensor, y: Tensor) -> None:
    """Keep a pair of positive curvature; any other one shows that the model is wrong: forget it.

    A model that stays would propose the same step again, however short it is.
    """
    if float(s @ y) > 1e-10 * float(s.norm() * y.norm()):
        pairs.append((s, y))
    else:
        pairs.clear()


def _two_loops(pairs: deque[tuple[Tensor, Tensor]], u: Tensor) -> Tensor:
    """−B u with the L-BFGS inverse B (Nocedal and Wright, 2006, Algorithm 7.4)."""
    q, alphas = u, []
    for s, y in reversed(pairs):
        alpha = (s @ q) / (s @ y)
        q = q - alpha * y
        alphas.append(alpha)
    if pairs:
        s, y = pairs[-1]
        q = q * ((s @ y) / (y @ y))
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        q = q + (alpha - (y @ q) / (s @ y)) * s
    return -q
