r"""A look at a few tasks during training: curvature, residuals, and how exact the hypergradient is.

At the point φ where training's inner solver ends: the stationarity residual, alone and over
$\lambda\|\phi - \theta\|$, the smallest eigenvalue of $H + \lambda I$ (by Lanczos), the estimated
error of the hypergradient, and its cosine with the first-order one.

Then the inner problem is solved on in float64. Where its residual falls to 1e-6 the exact
hypergradient is known there, and is compared with central differences of the solved problem along 8
random directions: agreement shows that the implicit function theorem holds at that point.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel import BilevelWarning, ImplicitMethod, SolveError, Task, hypergradient, solve_inner
from bilevel.flat import FlatProblem, Outer
from bilevel.linearised import linearise
from bilevel.pytree import PyTree, tree_flatten, tree_leaves, tree_map, tree_unflatten
from bilevel.reference import to_float64
from bilevel.solvers import FirstOrder, HessianFree, ImplicitCG
from bilevel.spectrum import extreme_eigenvalues

from .job import Job

__all__ = ["probe"]

_TASKS = 2
_SOLVED = 1e-6
_DIRECTIONS = 8
_STEP = 1e-3
_LANCZOS_STEPS = 40
_SOLVER = HessianFree(max_steps=25, tol=1e-9, cg_steps=60)


def probe(job: Job, outer: PyTree) -> list[dict[str, Any]]:
    """What is found for each of two tasks, the same ones at every call of a run."""
    sampler = replace(job.training, tasks=_TASKS, seed=job.settings.seed + 10**6)
    found = []
    for i, task in enumerate(sampler(0).unstack()):
        try:
            found.append({"task": i, **_look(job, outer, task)})
        except SolveError as error:
            # Training goes on without such a task, and so does looking.
            found.append({"task": i, "note": str(error)})
    return found


def _look(job: Job, outer: PyTree, task: Task) -> dict[str, Any]:
    """One task, at the point that training differentiates at."""
    method = job.method
    if isinstance(method, ImplicitMethod):
        method = replace(method, error_estimate=True)
    found = hypergradient(job.problem, outer, task, inner_solver=job.inner_solver, method=method)
    with warnings.catch_warnings():
        # The first-order gradient knows nothing of λ: that is no news here.
        warnings.simplefilter("ignore", BilevelWarning)
        first = hypergradient(
            job.problem, outer, task, inner_solver=None, inner=found.inner, method=FirstOrder()
        )
    residual = found.diagnostics.inner.residual.item()
    pull = _pull(job, outer, found.inner)
    linear = found.diagnostics.linear
    error = found.diagnostics.error_estimate
    out: dict[str, Any] = {
        "status": found.status[0].name,
        "inner_residual": residual,
        "relative_residual": residual / pull if pull > 0 else None,
        "linear_residual": None if linear is None else linear.residual.item(),
        "curvature": _least_curvature(job, outer, task, found.inner),
        "error_estimate": None if error is None else error.item(),
        "cosine_with_first_order": _cosine(_theta(found.gradient), _theta(first.gradient)),
    }
    try:
        return {**out, **_solved(job, outer, task, found.inner, found.gradient)}
    except SolveError as error_found:
        return {**out, "solved_residual": None, "note": str(error_found)}


def _solved(job: Job, outer: PyTree, task: Task, inner: PyTree, gradient: PyTree) -> dict[str, Any]:
    """The same task, its inner problem solved on."""
    outer, inner = to_float64(outer), to_float64(inner)
    task = Task(to_float64(task.inner_batch), to_float64(task.outer_batch))
    solution = solve_inner(job.problem, outer, task, inner_solver=_SOLVER, inner=inner)
    residual = solution.residual.item()
    out: dict[str, Any] = {"solved_residual": residual, "solved_steps": int(solution.steps)}
    if not residual <= _SOLVED:
        return out
    out["solved_curvature"] = _least_curvature(job, outer, task, solution.inner)
    exact = hypergradient(
        job.problem,
        outer,
        task,
        inner_solver=None,
        inner=solution.inner,
        method=ImplicitCG(max_steps=1000, rtol=1e-8),
    )
    out["exact_status"] = exact.status[0].name
    out["error"] = _distance(gradient, exact.gradient)
    out["cosine_with_exact"] = _cosine(_theta(gradient), _theta(exact.gradient))

    def value(point: PyTree) -> float:
        solved = solve_inner(job.problem, point, task, inner_solver=_SOLVER, inner=solution.inner)
        return job.problem.outer_objective(solved.inner, point, task.outer_batch).item()

    slopes, expected = [], []
    for direction in _directions(outer):
        ends = [value(_moved(outer, direction, sign * _STEP)) for sign in (1, -1)]
        slopes.append((ends[0] - ends[1]) / (2 * _STEP))
        expected.append(float(_dot(exact.gradient, direction)))
    got, want = torch.tensor(slopes).double(), torch.tensor(expected).double()
    out["difference_error"] = ((got - want).norm() / want.norm()).item()
    return out


def _least_curvature(job: Job, outer: PyTree, task: Task, inner: PyTree) -> float:
    """The smallest eigenvalue of the inner Hessian, the regularizer included."""
    stacked = tree_map(lambda x: x.unsqueeze(0), inner)
    flat = FlatProblem.of(job.problem, Outer.of(outer), Task.stack([task]), stacked)
    system = linearise(flat, flat.start)
    return float(extreme_eigenvalues(system.operator, flat.start, _LANCZOS_STEPS)[0, 0])


def _pull(job: Job, outer: PyTree, inner: dict[str, Tensor]) -> float:
    """‖λ (φ − θ)‖, the force of the regularizer."""
    regularizer = job.problem.regularizer
    assert regularizer is not None
    center = regularizer.center_tree(outer)
    strength = regularizer.strength
    strength = strength(outer) if callable(strength) else strength
    if not isinstance(strength, dict):
        strength = dict.fromkeys(inner, strength)
    parts = [(strength[k] * (inner[k] - center[k])).square().sum() for k in inner]
    return float(torch.stack(parts).sum().sqrt())


def _theta(tree: PyTree) -> PyTree:
    return tree.get("theta", tree)


def _directions(outer: PyTree) -> list[PyTree]:
    """Random unit directions over all leaves, the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    leaves, spec = tree_flatten(outer)
    out = []
    for _ in range(_DIRECTIONS):
        drawn = [torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x) for x in leaves]
        size = sum(d.square().sum() for d in drawn) ** 0.5
        out.append(tree_unflatten([d / size for d in drawn], spec))
    return out


def _moved(outer: PyTree, direction: PyTree, length: float) -> PyTree:
    return tree_map(lambda x, d: x.detach() + length * d, outer, direction)


def _dot(a: PyTree, b: PyTree) -> Tensor:
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return torch.stack([(x.double() * y.double()).sum() for x, y in pairs]).sum()


def _cosine(a: PyTree, b: PyTree) -> float:
    return float(_dot(a, b) / (_dot(a, a) * _dot(b, b)).sqrt())


def _distance(a: PyTree, exact: PyTree) -> float:
    gap = tree_map(lambda x, y: x.double() - y, a, exact)
    return float((_dot(gap, gap) / _dot(exact, exact)).sqrt())
