"""`compare`: which hypergradient method is the cheapest that is accurate enough, on your problem?

Every method is run as it is configured, and judged by its error against the hypergradient of the
*solved* inner problem: by dense float64 algebra where that is possible, else by Newton's method in
the inner variable, whose points' hypergradients converge quadratically (see `bilevel.point`).
Costs are counted in gradients and Hessian products, which depend on no machine.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from .brief import brief
from .check import float64_reference, tasks_and_points
from .clock import seconds_of
from .comparison import TRUSTED, Comparison, MethodResult, duration
from .errors import BilevelError, BilevelWarning, ObjectiveError
from .hypergradient import hypergradient
from .inner_solver import InnerSolver
from .memory import peak_bytes
from .method import HypergradientMethod, ImplicitMethod
from .problem import BilevelProblem, Structure
from .pytree import PyTree, tree_leaves
from .reference import to_float64
from .registry import LINEAR_SOLVERS, METHODS
from .result import Hypergradient
from .status import Status
from .task import Task, TaskBatch

__all__ = ["compare", "default_methods"]

Choice = HypergradientMethod | tuple[HypergradientMethod, InnerSolver]

_NEWTON_STEPS = 8
_LINEAR_STEPS = 1000
_DENSE_RESIDUAL = 1e-8


def compare(
    problem: BilevelProblem,
    outer: PyTree,
    task: Task | TaskBatch | Sequence[Task] | None = None,
    methods: Mapping[str, Choice] | Sequence[Choice] | None = None,
    *,
    inner_solver: InnerSolver,
    accuracy: float = 1e-3,
    budget: float | None = None,
    max_seconds: float | None = None,
    reference: Literal["auto", "dense", "estimate"] = "auto",
    repeats: int = 3,
    memory: bool = True,
    max_n: int = 1000,
) -> Comparison:
    """Run several hypergradient methods on one problem and say which is worth its cost.

    A method that raises an error, such as one that needs a structure that the problem does not
    promise, is a row that says so; where all do, the first error is raised.

    Args:
        problem: The bilevel problem.
        outer: The outer variable, a pytree of floating tensors.
        task: As in `hypergradient`.
        methods: Methods by name, or a sequence of methods, named after what they are; each may be
            a pair (method, inner solver). None: a choice of those that are registered.
        inner_solver: The inner solver of all methods that are no pair.
        accuracy: The relative error allowed.
        budget: The most gradients plus products of one hypergradient that is recommended.
        max_seconds: The longest time of one hypergradient that is recommended.
        reference: What errors are taken against. ``"dense"``: dense float64 algebra at the solved
            inner problem. ``"estimate"``: the hypergradient after further Newton steps in the inner
            variable, from products alone. ``"auto"``: dense where n ≤ ``max_n`` and it works.
        repeats: Timed runs of each method, after one that is not timed; methods take turns.
        memory: Measure the peak of the memory too, in a run of its own.
        max_n: The largest inner variable for a dense reference.

    Raises:
        ValueError: An argument is wrong, or ``reference="dense"`` and the problem is too large.
        ObjectiveError: ``reference="dense"`` and the problem cannot be evaluated in float64.

    Example:
        >>> import torch
        >>> from bilevel import Proximal, compare, problem_from
        >>> from bilevel.solvers import FirstOrder, GradientDescent, ImplicitCG
        >>> problem = problem_from(
        ...     lambda z, x, batch: z.exp().sum(), lambda z, x, batch: (z**2).sum(), Proximal(1.0)
        ... )
        >>> comparison = compare(
        ...     problem,
        ...     torch.tensor([0.5, 1.0], dtype=torch.float64),
        ...     methods={"CG": ImplicitCG(), "first-order": FirstOrder()},
        ...     inner_solver=GradientDescent(lr=0.2, max_steps=100, tol=1e-6),
        ... )
        >>> comparison.recommendation.name
        'CG'
    """
    _check_settings(accuracy, repeats, reference)
    chosen = _named(default_methods(problem, max_n) if methods is None else methods, inner_solver)

    def run(method: HypergradientMethod, solver: InnerSolver) -> Hypergradient:
        return hypergradient(problem, outer, task, inner_solver=solver, method=method)

    rows: list[MethodResult] = []
    found: dict[str, Hypergradient] = {}
    errors: list[Exception] = []
    for name, (method, solver) in chosen.items():
        row = MethodResult(name, brief(method), brief(solver))
        try:
            row, found[name] = _first_run(row, partial(run, method, solver))
        except (BilevelError, ValueError) as error:
            row = replace(row, note=f"{type(error).__name__}: {error}")
            errors.append(error)
        rows.append(row)
    if not found:
        raise errors[0]
    best = min(found.values(), key=_quality)
    kind, exact, uncertain = _reference(
        problem, outer, task, best, [m for m, _ in chosen.values()], reference, accuracy, max_n
    )
    device = tree_leaves(best.inner)[0].device
    seconds: dict[str, list[float]] = {name: [] for name in found}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BilevelWarning)
        for _ in range(repeats):
            for name in found:
                seconds[name].append(seconds_of(partial(run, *chosen[name]), device))
        peaks = {
            name: peak_bytes(partial(run, *chosen[name]), device)
            for name in found
            if memory and device.type in ("cpu", "cuda")
        }
    rows = [
        replace(
            row,
            **_judged(found[row.name], exact),
            seconds=statistics.median(seconds[row.name]),
            memory=peaks.get(row.name),
        )
        if row.name in found
        else row
        for row in rows
    ]
    rows.sort(key=lambda row: (row.status is None, row.cost, row.seconds or 0.0))
    _, points = tasks_and_points(task, best.inner)
    comparison = Comparison(
        problem=_name(problem),
        tasks=len(points),
        n=max(_size(point) for point in points),
        dtype=tree_leaves(points[0])[0].dtype,
        accuracy=accuracy,
        budget=budget,
        max_seconds=max_seconds,
        reference=kind,
        reference_error=uncertain,
        results=tuple(rows),
    )
    return replace(comparison, advice=_advice(comparison, chosen, run))


def default_methods(problem: BilevelProblem, max_n: int = 1000) -> dict[str, HypergradientMethod]:
    """A choice of the registered methods, by the structure that the problem promises.

    Args:
        problem: The problem.
        max_n: The largest inner variable for which the dense method is taken.

    Raises:
        ValueError: Nothing is registered.
    """
    if not METHODS.names():
        raise ValueError(
            "`methods` is None, but no method is registered: import bilevel.solvers, or pass some"
        )
    general = not problem.structure.satisfies(Structure.SYMMETRIC)
    settings: dict[str, dict[str, dict[str, Any]]] = {
        "cg": {
            "CG 1e-2": {"rtol": 1e-2},
            "CG 1e-6": {"rtol": 1e-6, "max_steps": _LINEAR_STEPS},
            "CG 1e-4, corrected": {"rtol": 1e-4, "correct": True},
        },
        "implicit": {},
        "dense": {"dense": {"max_n": max_n}},
        "neumann": {"Neumann 10": {"terms": 10}, "Neumann 100": {"terms": 100}},
        "unrolled": {"unrolled": {}, "unrolled, last 10": {"truncate": 10}},
    }
    if general:
        settings["cg"] = {}
    if general and "gmres" in LINEAR_SOLVERS:
        for rtol in (1e-2, 1e-6):
            solver = LINEAR_SOLVERS.build("gmres", rtol=rtol)
            settings["implicit"][f"GMRES {rtol:.0e}".replace("e-0", "e-")] = {
                "linear_solver": solver
            }
    out = {}
    for key in METHODS:
        for name, options in settings.get(key, {key: {}}).items():
            # A method of yours that is registered but has settings without a default stays out.
            with contextlib.suppress(ValueError):
                out[name] = METHODS.build(key, **options)
    return out


# The methods and their names


def _check_settings(accuracy: float, repeats: int, reference: str) -> None:
    if not 0.0 < accuracy < math.inf:
        raise ValueError(f"`accuracy` is {accuracy}; a relative error allowed is finite and > 0")
    if repeats < 1:
        raise ValueError(f"`repeats` is {repeats}; time each method at least once")
    if reference not in ("auto", "dense", "estimate"):
        raise ValueError(f"`reference` is {reference!r}; pass 'auto', 'dense' or 'estimate'")


def _named(
    methods: Mapping[str, Choice] | Sequence[Choice], inner_solver: InnerSolver
) -> dict[str, tuple[HypergradientMethod, InnerSolver]]:
    """Every method with its inner solver, by a name of its own."""
    given: list[tuple[str | None, Choice]]
    if isinstance(methods, Mapping):
        given = [(name, choice) for name, choice in methods.items()]
    else:
        given = [(None, choice) for choice in methods]
    out: dict[str, tuple[HypergradientMethod, InnerSolver]] = {}
    for name, choice in given:
        method, solver = choice if isinstance(choice, tuple) else (choice, inner_solver)
        if not isinstance(method, HypergradientMethod) or not isinstance(solver, InnerSolver):
            raise ValueError(
                f"`methods` holds {choice!r}; pass methods such as ImplicitCG(), or pairs of a "
                "method and an inner solver"
            )
        if name is None:
            name = brief(method)
            name += f" on {brief(solver)}" if isinstance(choice, tuple) else ""
        if name in out:
            raise ValueError(f"`methods` holds '{name}' twice; pass a dict with names that differ")
        out[name] = (method, solver)
    if not out:
        raise ValueError("`methods` is empty; pass at least one method, or None for a choice")
    return out


def _name(problem: BilevelProblem) -> str:
    plain = type(problem).__repr__ is object.__repr__
    return type(problem).__name__ if plain else repr(problem)


# Runs


def _first_run(
    row: MethodResult, run: Callable[[], Hypergradient]
) -> tuple[MethodResult, Hypergradient]:
    """A method's counts, status and notes, and its hypergradient."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    for one in caught:
        if not issubclass(one.category, BilevelWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    notes = [str(one.message) for one in caught if issubclass(one.category, BilevelWarning)]
    counts = {
        key: result.diagnostics.counts.get(key, 0) for key in ("gradients", "products", "values")
    }
    row = replace(row, counts=counts, status=max(result.status), note="; ".join(notes))
    return row, result


def _quality(result: Hypergradient) -> tuple[bool, float]:
    """Smallest for the result to take a reference from: no task failed, inner residual small."""
    return bool(result.diagnostics.failed), result.diagnostics.inner.residual.max().item()


# Errors


def _reference(
    problem: BilevelProblem,
    outer: PyTree,
    task: Task | TaskBatch | Sequence[Task] | None,
    best: Hypergradient,
    methods: Sequence[HypergradientMethod],
    asked: str,
    accuracy: float,
    max_n: int,
) -> tuple[Literal["dense", "estimate", "none"], Tensor | None, float]:
    """The hypergradient that errors are taken against, flat, and how far it may be off."""
    tasks, points = tasks_and_points(task, best.inner)
    largest = max(_size(point) for point in points)
    if asked == "dense" and largest > max_n:
        raise ValueError(
            f"the inner variable has {largest} entries, more than `max_n` = {max_n}: pass "
            "reference='estimate', or raise `max_n`"
        )
    if asked == "dense" or (asked == "auto" and largest <= max_n):
        try:
            exact, residual = _dense(problem, outer, tasks, points)
        except (ObjectiveError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            if asked == "dense":
                raise
        else:
            if asked == "dense" or residual <= _DENSE_RESIDUAL:
                return "dense", exact, residual
    estimate, uncertain = _after_newton_steps(problem, outer, task, best, methods, accuracy)
    return ("none" if estimate is None else "estimate"), estimate, uncertain


def _dense(
    problem: BilevelProblem, outer: PyTree, tasks: Sequence[Task], points: Sequence[PyTree]
) -> tuple[Tensor, float]:
    x = to_float64(outer)
    each = [
        float64_reference(problem, x, task, to_float64(point))
        for task, point in zip(tasks, points, strict=True)
    ]
    total = math.fsum(task.weight for task in tasks)
    flat = torch.stack(
        [task.weight / total * _flat(one.gradient) for task, one in zip(tasks, each, strict=True)]
    )
    return flat.sum(0), max(one.residual for one in each)


def _after_newton_steps(
    problem: BilevelProblem,
    outer: PyTree,
    task: Task | TaskBatch | Sequence[Task] | None,
    best: Hypergradient,
    methods: Sequence[HypergradientMethod],
    accuracy: float,
) -> tuple[Tensor | None, float]:
    """Corrected hypergradients at Newton steps from the best inner point, until they agree."""
    eps = torch.finfo(tree_leaves(best.inner)[0].dtype).eps
    settled = max(1e-3 * accuracy, 100 * eps)
    estimate, uncertain = None, math.inf
    for method in _correctors(problem, methods, settled):
        inner, last, before = best.inner, None, best.diagnostics.inner.residual
        floor = 1e3 * eps * before.clamp_min(1.0)
        for _ in range(_NEWTON_STEPS):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", BilevelWarning)
                    found = hypergradient(
                        problem, outer, task, inner_solver=None, inner=inner, method=method
                    )
            except BilevelError:
                break
            if max(found.status) >= Status.INDEFINITE:
                break
            gradient = _flat(tree_leaves(found.gradient))
            left = found.diagnostics.inner.residual
            # A Newton step that was refused repeats the last gradient: that is no agreement.
            if before is not None and not bool(((left <= 0.5 * before) | (left <= floor)).all()):
                break
            before = left
            # Equal gradients agree to rounding, and no further.
            gap = math.inf if last is None else max(_distance(last, gradient), 10 * eps)
            if gap < uncertain:
                estimate, uncertain = gradient, gap
            if gap <= settled:
                return estimate, uncertain
            inner, last = found.inner, gradient
    return estimate, uncertain


def _correctors(
    problem: BilevelProblem, methods: Sequence[HypergradientMethod], rtol: float
) -> list[ImplicitMethod]:
    """Tight implicit methods that take a Newton step first; the user's own come last."""
    symmetric = problem.structure.satisfies(Structure.SYMMETRIC)
    names = ("cg", "minres", "gmres") if symmetric else ("gmres", "bicgstab")
    built = [
        METHODS.build("implicit", linear_solver=LINEAR_SOLVERS.build(name))
        for name in names
        if "implicit" in METHODS and name in LINEAR_SOLVERS
    ]
    return [
        replace(
            method.toward(0.1 * rtol, _LINEAR_STEPS),
            correct=True,
            error_estimate=False,
            error_bound=False,
        )
        for method in [*built, *methods]
        if isinstance(method, ImplicitMethod)
    ]


def _judged(result: Hypergradient, exact: Tensor | None) -> dict[str, Any]:
    if exact is None:
        return {}
    found = _flat(tree_leaves(result.gradient)).to(exact.device)
    lengths = (found.norm() * exact.norm()).item()
    cosine = (found @ exact).item() / lengths if lengths > 0 else float(_same(found, exact))
    return {"error": _distance(found, exact), "cosine": cosine}


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a == b).all())


def _distance(found: Tensor, exact: Tensor) -> float:
    size = exact.norm().item()
    return float((found - exact).norm().item() / (size or 1.0))


def _flat(leaves: Sequence[Tensor]) -> Tensor:
    device = leaves[0].device
    return torch.cat([leaf.detach().to(device).double().reshape(-1) for leaf in leaves])


def _size(point: PyTree) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(point))


# Words


def _advice(
    comparison: Comparison,
    chosen: Mapping[str, tuple[HypergradientMethod, InnerSolver]],
    run: Callable[[HypergradientMethod, InnerSolver], Hypergradient],
) -> str:
    best, allowed = comparison.recommendation, f"{comparison.accuracy:.0e}"
    limits = []
    if comparison.budget is not None:
        limits.append(f"a cost of {comparison.budget:g}")
    if comparison.max_seconds is not None:
        limits.append(duration(comparison.max_seconds))
    limit = f" within {' and '.join(limits)}" if limits else ""
    if best is None:
        if comparison.reference == "none":
            return (
                "No error is known, so nothing is recommended: pass an implicit method, from which "
                "a reference can be computed, or a problem small enough for `max_n`."
            )
        if limit:
            return f"No method is usable{limit}: raise it, or give the inner solver less to do."
        kind = max(one.status for one in comparison.results if one.status is not None)
        return f"No method is usable; the worst status is {kind.name}: {kind.cure}."
    word = "estimated error" if comparison.reference == "estimate" else "error"
    error = f"{word} {best.error:.1e}, cost {best.cost}, {duration(best.seconds)}"
    if comparison.ok:
        number = sum(map(comparison.accurate, comparison.affordable))
        among = f"the cheapest of {number} methods" if number > 1 else "the only method"
        use = f"Use {best.name}: {error}; {among} with an error of at most {allowed}{limit}."
        if comparison.reference_error <= TRUSTED * comparison.accuracy:
            return use
        return (
            f"{use} The reference itself may be off by {comparison.reference_error:.0e}: to be "
            "sure, compare in float64, or with an inner solver of more steps."
        )
    beyond = [one for one in comparison.results if one.usable and comparison.accurate(one)]
    sentences = [
        f"No method has an error of at most {allowed}{limit}.",
        f"The most accurate is {best.name}: {error}.",
    ]
    if best.cosine is not None and best.cosine <= 0.0:
        sentences.append(f"It points the wrong way (cosine {best.cosine:.2f}): do not follow it.")
    if beyond:
        sentences.append(
            f"Beyond the limit, {beyond[0].name} has error {beyond[0].error:.1e} at a cost of "
            f"{beyond[0].cost}, {duration(beyond[0].seconds)}."
        )
    sentences.append(_cure(*chosen[best.name], run))
    return " ".join(sentences)


def _cure(
    method: HypergradientMethod,
    solver: InnerSolver,
    run: Callable[[HypergradientMethod, InnerSolver], Hypergradient],
) -> str:
    """What to change, from which part of the error is the larger one."""
    more = "give the inner solver more steps, or a smaller `tol`"
    if not isinstance(method, ImplicitMethod):
        return f"To be more accurate, {more}; or use an implicit method with correct=True."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BilevelWarning)
            report = run(replace(method, error_estimate=True), solver).diagnostics
    except BilevelError:
        return f"To be more accurate, {more}."
    assert report.inner_error is not None
    assert report.linear_error is not None
    inner, linear = report.inner_error.max().item(), report.linear_error.max().item()
    if math.isinf(inner):
        return (
            "So far from a solution, the parts of its error cannot be told apart: "
            f"{more}; `doctor` finds how many."
        )
    if linear > inner:
        return (
            f"Its error is that of the adjoint solve ({linear:.0e}; inner solve {inner:.0e}): "
            "lower `rtol` of the method, or raise its steps or terms."
        )
    corrected = "" if method.correct else ", or pass correct=True to the method"
    return (
        f"Its error is that of the inner solve ({inner:.0e}; adjoint solve {linear:.0e}): "
        f"{more}{corrected}."
    )
