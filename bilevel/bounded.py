r"""`minimize_bounded`: the outer problem under bounds, $l \le x \le u$, by L-BFGS-B.

SciPy's L-BFGS-B (Byrd, Lu, Nocedal and Zhu, 1995) on the outer objective and the hypergradient,
each evaluation starting at the inner solution and the adjoint of the one before.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import BilevelError, SolveError
from .flat import Outer
from .hypergradient import check_problem, compute
from .inner_solver import InnerSolver
from .method import HypergradientMethod
from .minimize import Minimum, OuterStatus, OuterStep
from .problem import BilevelProblem
from .pytree import PyTree, broadcast_prefix, tree_leaves
from .result import Hypergradient, State
from .status import describe_status
from .task import Task, TaskBatch

__all__ = ["minimize_bounded"]

Numbers = NDArray[np.float64]

_TRIALS = 30
_AT_BOUND = 1e-12


def minimize_bounded(
    problem: BilevelProblem,
    outer: PyTree,
    task: Task | TaskBatch | Sequence[Task] | None = None,
    *,
    bounds: tuple[PyTree, PyTree],
    inner_solver: InnerSolver,
    method: HypergradientMethod,
    state: State | None = None,
    tol: float = 1e-6,
    scale: float | None = None,
    max_steps: int = 200,
    memory: int = 10,
    callback: Callable[[OuterStep], None] | None = None,
) -> Minimum:
    """Minimise the outer objective of a deterministic problem, its outer variable within bounds.

    Every evaluation is a `hypergradient` as accurate as ``inner_solver`` and ``method`` make it;
    make them accurate, as L-BFGS-B cannot tell their error from curvature. One that fails from a
    warm start is tried again from the problem's own start; if that fails too, the run ends at the
    best point so far, and SciPy sees none of it.

    The records' ``gradient_norm`` is the largest entry of the *projected* hypergradient, which is 0
    where x is at a bound and the hypergradient pushes against it; ``length`` is how far the step
    went, and ``attempts`` its evaluations.

    Args:
        problem: The bilevel problem.
        outer: The outer variable to start from, a pytree of floating tensors, clipped to the
            bounds. It is not changed.
        task: As in `hypergradient`.
        bounds: (low, high), each a number, None for no bound, a pytree like ``outer`` of numbers
            or tensors, or a prefix of one.
        inner_solver: Finds the inner solution.
        method: How hypergradients are computed.
        state: ``result.state`` of an earlier run on the same tasks, for a warm start.
        tol: Stop once the largest entry of the projected hypergradient is within this fraction of
            ``scale``.
        scale: Default: the largest entry of the projected hypergradient at the start. Give it where
            the start is nearly a minimum.
        max_steps: The most outer steps.
        memory: Number of pairs that L-BFGS-B keeps.
        callback: Called after each step with its record.

    Returns:
        A `Minimum` of the best point. Its status is CONVERGED, MAX_STEPS, STALLED (no step
        decreases the objective any more, as far as it can be evaluated), INACCURATE (a solve did
        not reach its tolerance) or FAILED (a solve failed, or something is not finite).

    Raises:
        SolveError: The first hypergradient failed.
        ValueError: An argument has the wrong kind or value; it is named.

    Example:
        >>> import torch
        >>> from bilevel import Proximal, minimize_bounded, problem_from
        >>> from bilevel.solvers import LBFGS, ImplicitCG
        >>> problem = problem_from(
        ...     lambda z, x, batch: 0.5 * (z**2).sum(),
        ...     lambda z, x, batch: ((z - 1.0) ** 2).sum(),
        ...     Proximal(1.0),
        ... )
        >>> found = minimize_bounded(
        ...     problem,
        ...     torch.zeros(2, dtype=torch.float64),
        ...     bounds=(0.0, torch.tensor([1.5, 5.0])),
        ...     inner_solver=LBFGS(tol=1e-10),
        ...     method=ImplicitCG(rtol=1e-10),
        ... )
        >>> found.status.name, [round(x, 6) for x in found.outer.tolist()]
        ('CONVERGED', [1.5, 2.0])
    """
    check_problem(problem, inner_solver, method, None)
    if inner_solver is None:
        raise ValueError("`inner_solver` is None; pass a solver: the inner solution changes")
    if not 0.0 < tol < 1.0:
        raise ValueError(f"`tol` is {tol}; pass a fraction in (0, 1)")
    if scale is not None and not 0.0 < scale < math.inf:
        raise ValueError(f"`scale` is {scale}; it is finite and > 0, or None")
    for name, count in (("max_steps", max_steps), ("memory", memory)):
        if count < 1:
            raise ValueError(f"`{name}` is {count}; pass at least 1")
    variable = Outer.of(outer).cloned()
    low, high = _bounds(bounds, outer, variable)
    run = _Run(problem, variable, task, inner_solver, method, low, high, state=state)
    return run.minimize(tol, scale, max_steps, memory, callback)


@dataclass(frozen=True)
class _Point:
    """A point that was evaluated."""

    x: Numbers
    value: float
    gradient: Numbers
    result: Hypergradient


class _Stop(Exception):  # noqa: N818  # no error: it ends SciPy's loop
    def __init__(self, status: OuterStatus) -> None:
        super().__init__(status.value)
        self.status = status


@dataclass
class _Run:
    """One minimisation: the problem, the best point, and what has been spent."""

    problem: BilevelProblem
    outer: Outer
    task: Any
    inner_solver: InnerSolver
    method: HypergradientMethod
    low: Numbers
    high: Numbers
    state: State | None = None
    counts: Counter[str] = field(default_factory=Counter)
    records: list[OuterStep] = field(default_factory=list)
    evaluations: int = 0
    points: dict[bytes, _Point] = field(default_factory=dict)
    best: _Point | None = None

    def minimize(
        self,
        tol: float,
        scale: float | None,
        max_steps: int,
        memory: int,
        callback: Callable[[OuterStep], None] | None,
    ) -> Minimum:
        from scipy.optimize import minimize

        started = time.perf_counter()
        x = np.clip(_vector(self.outer.leaves), self.low, self.high)
        first = self._first(x)
        target = tol * (scale or self._projected(first))
        seen = 0

        def record(point: _Point, length: float) -> None:
            nonlocal seen
            self.records.append(
                OuterStep(
                    len(self.records),
                    point.value,
                    self._projected(point),
                    float(self.inner_solver.tol or 0.0),
                    float(getattr(self.method, "rtol", 0.0)),
                    self.evaluations - seen,
                    length,
                    dict(self.counts),
                    time.perf_counter() - started,
                )
            )
            seen = self.evaluations
            if callback is not None:
                try:
                    callback(self.records[-1])
                except StopIteration as error:
                    # SciPy would take it for an order to stop.
                    raise RuntimeError("`callback` raised StopIteration") from error

        here = first
        record(first, 0.0)

        def accepted(xk: Numbers) -> None:
            nonlocal here
            point = self._at(np.clip(xk, self.low, self.high))
            length, here = float(np.linalg.norm(point.x - here.x)), point
            self.points = {point.x.tobytes(): point}
            record(point, length)
            if self._projected(point) <= target:
                raise _Stop(OuterStatus.CONVERGED)

        status: OuterStatus | None = None
        if self._projected(first) <= target:
            status = OuterStatus.CONVERGED
        else:
            try:
                minimize(
                    self._value_and_gradient,
                    x,
                    jac=True,
                    method="L-BFGS-B",
                    bounds=list(zip(self.low, self.high, strict=True)),
                    callback=accepted,
                    options={
                        "maxiter": max_steps,
                        "maxfun": _TRIALS * max_steps,
                        "maxls": _TRIALS,
                        "maxcor": memory,
                        "gtol": 0.0,
                        "ftol": 0.0,
                    },
                )
            except _Stop as stop:
                status = stop.status
        assert self.best is not None
        end = here if status is OuterStatus.CONVERGED else self.best
        if status is None and self._projected(end) <= target:
            status = OuterStatus.CONVERGED
        if status is None:
            spent = len(self.records) > max_steps
            status = OuterStatus.MAX_STEPS if spent else OuterStatus.STALLED
        return Minimum(
            self._tree(end.x), end.value, status, self.records, end.result, dict(self.counts)
        )

    # Evaluations

    def _value_and_gradient(self, x: Numbers) -> tuple[float, Numbers]:
        point = self._at(np.clip(x, self.low, self.high))
        return point.value, point.gradient.copy()

    def _at(self, x: Numbers) -> _Point:
        known = self.points.get(x.tobytes())
        if known is not None:
            return known
        point, problem = self._evaluate(x, self.state)
        if point is None and self.state is not None:
            point, problem = self._evaluate(x, None)
        if point is None:
            raise _Stop(problem)
        self.state = point.result.state
        self.points[x.tobytes()] = point
        if self.best is None or point.value < self.best.value:
            self.best = point
        return point

    def _first(self, x: Numbers) -> _Point:
        """The point to start from, at which whatever fails is raised."""
        try:
            return self._at(x)
        except _Stop:
            pass
        result = self._result(x, None)
        raise SolveError(
            f"the first hypergradient cannot be used: {describe_status(result.status)} Start from "
            "another `outer`, or change the inner solver's settings"
        )

    def _evaluate(self, x: Numbers, state: State | None) -> tuple[_Point | None, OuterStatus]:
        try:
            result = self._result(x, state)
        except (BilevelError, ArithmeticError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            if self.best is None and state is None:
                raise
            return None, OuterStatus.FAILED
        gradient = _vector(tree_leaves(result.gradient))
        value = _mean(result, self.task)
        if (
            result.diagnostics.failed
            or not math.isfinite(value)
            or not bool(np.isfinite(gradient).all())
        ):
            return None, OuterStatus.FAILED
        if not result.ok:
            return None, OuterStatus.INACCURATE
        return _Point(x.copy(), value, gradient, result), OuterStatus.CONVERGED

    def _result(self, x: Numbers, state: State | None) -> Hypergradient:
        self.evaluations += 1
        result = compute(
            self.problem,
            self._tree(x),
            self.task,
            inner_solver=self.inner_solver,
            method=self.method,
            state=state,
        )
        self.counts.update(result.diagnostics.counts)
        return result

    def _projected(self, point: _Point) -> float:
        """The largest entry of the hypergradient, without those that push against their bound.

        In the units of the hypergradient: a step, cut off at the bounds, would be as short as the
        bounds are narrow.
        """
        x, u = point.x, point.gradient.copy()
        slack = _AT_BOUND * (1.0 + np.abs(x))
        u[(x <= self.low + slack) & (u > 0)] = 0.0
        u[(x >= self.high - slack) & (u < 0)] = 0.0
        return float(np.abs(u).max())

    def _tree(self, x: Numbers) -> PyTree:
        leaves, offset = [], 0
        for leaf in self.outer.leaves:
            here = slice(offset, offset + leaf.numel())
            part = torch.from_numpy(x[here].copy()).to(leaf.dtype)
            # Rounding to the leaf's dtype must not leave the bounds.
            for side, sign in ((self.low[here], 1.0), (self.high[here], -1.0)):
                bound = torch.from_numpy(side.copy())
                outside = sign * (part.double() - bound) < 0
                inward = torch.nextafter(part, torch.full_like(part, sign * math.inf))
                part = torch.where(outside, inward, part)
            leaves.append(part.reshape(leaf.shape).to(leaf))
            offset += leaf.numel()
        return self.outer.with_leaves(leaves).tree


def _vector(leaves: Sequence[Tensor]) -> Numbers:
    parts = [leaf.detach().reshape(-1).double().cpu().numpy() for leaf in leaves]
    return np.concatenate(parts)


def _mean(result: Hypergradient, task: Any) -> float:
    """The outer objective, the weighted mean over tasks."""
    values = result.outer_value.detach().double().cpu()
    if isinstance(task, TaskBatch):
        assert task.weights is not None
        weights = task.weights.double().cpu()
    elif isinstance(task, list | tuple):
        weights = torch.tensor([one.weight for one in task], dtype=torch.float64)
    else:
        return float(values.sum())
    return float((weights * values).sum() / weights.sum())


def _bounds(bounds: Any, tree: PyTree, outer: Outer) -> tuple[Numbers, Numbers]:
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise ValueError("`bounds` is no pair; pass (low, high), None where there is no bound")
    sides = []
    for name, given, none in (("low", bounds[0], -math.inf), ("high", bounds[1], math.inf)):
        parts = []
        prefix = broadcast_prefix(given, tree, f"`bounds`: {name}")
        for value, leaf, title in zip(prefix, outer.leaves, outer.names, strict=True):
            try:
                if not isinstance(value, Tensor):
                    value = torch.tensor(none if value is None else value, dtype=torch.float64)
                side = value.detach().double().cpu()
                parts.append(side.expand(leaf.shape).reshape(-1).numpy())
            except (TypeError, ValueError, RuntimeError) as error:
                shape = list(getattr(value, "shape", ())) or type(value).__name__
                raise ValueError(
                    f"`bounds`: {name} for `{title}` is {shape}, but the leaf is "
                    f"{list(leaf.shape)}; pass a number, or a tensor like the leaf"
                ) from error
        side_vector = np.concatenate(parts)
        if bool(np.isnan(side_vector).any()):
            raise ValueError(f"`bounds`: {name} holds a NaN; pass None where there is no bound")
        sides.append(side_vector)
    low, high = sides
    if bool((low > high).any()):
        i = int((low > high).argmax())
        raise ValueError(
            f"`bounds` leave entry {i} of the outer variable no room: low {low[i]:g} is above high "
            f"{high[i]:g}"
        )
    return low, high
