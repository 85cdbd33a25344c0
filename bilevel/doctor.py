"""`doctor`: a look at one bilevel problem, its solver and its method before they are trusted."""

from __future__ import annotations

import copy
import math
import random
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .brief import brief
from .captured import Captured
from .errors import BilevelError, BilevelWarning, ObjectiveError, SolveError
from .findings import Facts, Finding, examine, from_error
from .flat import FlatProblem, Outer
from .hypergradient import Group, check_problem, group, hypergradient
from .inner_solver import InnerSolver
from .linearised import LinearisedSystem, linearise
from .method import HypergradientMethod
from .point import newton_step
from .probe import probe
from .problem import BilevelProblem, Structure
from .pytree import PyTree, tree_leaves
from .reference import to_float64
from .result import Hypergradient
from .rows import norm
from .solve import solve_inner
from .spectrum import extreme_eigenvalues, extreme_singular_values
from .status import Status
from .stream import Stream
from .task import Task, TaskBatch
from .yardstick import PlainCG, Yardstick

__all__ = ["Diagnosis", "Finding", "doctor"]

_LANCZOS_STEPS = 100
_WHOLE = 400
_LONGER = (3, 10)
_WIDTH = 96
_WAYS = tuple(1e-3 * 0.5**k for k in range(7))
_SEVERITIES = ("error", "warning", "info")


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found; ``str()`` of it is a readable report.

    Attributes:
        findings: From the gravest on.
        numbers: What was measured, by name, in words; empty where nothing could be.
        setting: Method, inner solver, dtype and sizes.
        error: Relative error of the hypergradient, estimated; None where it could not be.
        curvature: Smallest and largest eigenvalue of the inner Hessian over tasks (singular values
            for an equilibrium).
        condition: Their ratio, the largest over tasks.
    """

    findings: tuple[Finding, ...]
    numbers: dict[str, str]
    setting: tuple[str, ...]
    error: float | None = None
    curvature: tuple[float, float] | None = None
    condition: float | None = None

    @property
    def ok(self) -> bool:
        """Nothing but information was found."""
        return all(finding.severity == "info" for finding in self.findings)

    def __str__(self) -> str:
        bad = sum(finding.severity != "info" for finding in self.findings)
        notes = len(self.findings) - bad
        head = f"{bad} finding{'s' * (bad != 1)}" if bad else "healthy"
        head += f", {notes} note{'s' * (notes != 1)}" if notes else ""
        lines = [f"{head}: {self.setting[0]}", *(f"  {line}" for line in self.setting[1:])]
        if self.numbers:
            width = max(map(len, self.numbers))
            lines += ["", *(f"  {name:{width}}  {text}" for name, text in self.numbers.items())]
        for finding in self.findings:
            lines += ["", f"  {finding.severity:7}  {finding.kind} ({finding.argument})"]
            for mark, text in (("  ", finding.found), ("→ ", finding.cure)):
                first, rest = " " * 11 + mark, " " * 13
                lines += textwrap.wrap(
                    f"{text}.",
                    _WIDTH,
                    initial_indent=first,
                    subsequent_indent=rest,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
        return "\n".join(lines)


def doctor(
    problem: BilevelProblem,
    outer: PyTree,
    task: Task | TaskBatch | Sequence[Task] | None = None,
    *,
    inner_solver: InnerSolver,
    method: HypergradientMethod,
    rtol: float = 0.01,
    seed: int = 0,
) -> Diagnosis:
    """Examine a problem, its inner solver and its method at one outer point.

    Looks for what makes a hypergradient wrong or worthless without an error: an outer variable that
    nothing depends on, lost derivatives, an unsolved inner problem or adjoint system, negative or
    vanishing curvature, rates beyond 2/L, randomness, changing state, kinks, too little precision.
    Says of each what to change. Costs about ten hypergradients; up to thirteen more inner solves
    where the inner problem is not solved, to find how many steps would do. Changes neither
    ``outer`` nor modules nor random states.

    Args:
        problem: The bilevel problem.
        outer: The outer variable, a pytree of floating tensors.
        task: As in `hypergradient`.
        inner_solver: The inner solver.
        method: The hypergradient method.
        rtol: Relative error of the hypergradient that is fine.
        seed: Of the random directions along which kinks are looked for.

    Returns:
        The findings; an error that the library raises is one of them.

    Raises:
        ValueError: An argument is of the wrong kind.

    Example:
        >>> import torch
        >>> from bilevel import Proximal, doctor, problem_from
        >>> from bilevel.solvers import GradientDescent, ImplicitCG
        >>> problem = problem_from(
        ...     lambda z, x, batch: z.cos().sum(), lambda z, x, batch: (z**2).sum(), Proximal(0.5)
        ... )
        >>> diagnosis = doctor(
        ...     problem,
        ...     torch.zeros(3, dtype=torch.float64),
        ...     inner_solver=GradientDescent(lr=0.5, max_steps=50),
        ...     method=ImplicitCG(),
        ... )
        >>> diagnosis.ok
        False
        >>> print(diagnosis.findings[0].found)
        The inner Hessian has eigenvalue -0.5: the inner solution is a saddle or a maximum
    """
    check_problem(problem, inner_solver, method, None)
    if not 0.0 < rtol < 1.0:
        raise ValueError(f"`rtol` is {rtol}; pass the relative error that is fine, in (0, 1)")
    variable = Outer.of(outer)
    groups = group(task, None)
    # What is known of the problem is forgotten, so that it is probed anew, and then remembered.
    known = problem.__dict__.pop("_stacking", None)
    held = Captured(problem)
    setting = [f"{brief(method)} with {brief(inner_solver)}"]
    findings: list[Finding] = []
    facts = None
    try:
        with _random_states_kept():
            visit = _Visit(problem, outer, task, inner_solver, method, rtol, seed, variable, groups)
            facts = visit.facts()
            findings += examine(facts)
    except BilevelError as error:
        told = from_error(error)
        found = told.found.replace(repr(method), brief(method))
        findings.append(replace(told, found=found))
    finally:
        changed = held.restore()
        problem.__dict__.pop("_stacking", None)
        if known is not None:
            problem.__dict__["_stacking"] = known
    if changed:
        listed = ", ".join(f"`{name}`" for name in changed[:4]) + (", …" if changed[4:] else "")
        findings.append(
            Finding(
                "changing state",
                "warning",
                changed[0],
                f"Evaluating the objectives changes {listed}; it was put back",
                "Make the module pure with `stateless(module)`: build norm layers with "
                "track_running_stats=False, or call `module.eval()`",
            )
        )
    findings.sort(key=lambda finding: _SEVERITIES.index(finding.severity))
    numbers: dict[str, str] = {}
    if facts is None:
        return Diagnosis(tuple(findings), numbers, tuple(setting))
    count = len(facts.status)
    size = sum(leaf.numel() for leaf in variable.leaves)
    setting.append(
        f"{facts.dtype}, {count} task{'s' * (count != 1)}, {facts.n} inner and {size} outer numbers"
    )
    return Diagnosis(
        tuple(findings),
        _numbers(facts, visit.seconds),
        tuple(setting),
        facts.error,
        (facts.low, facts.high),
        facts.condition,
    )


# Measuring


@dataclass
class _Visit:
    """One examination: the arguments of `doctor`, and what is measured with them."""

    problem: BilevelProblem
    outer: PyTree
    task: Any
    inner_solver: InnerSolver
    method: HypergradientMethod
    rtol: float
    seed: int
    variable: Outer
    groups: list[Group]
    seconds: float = 0.0
    lost: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    def facts(self) -> Facts:
        """Measure everything.

        Raises:
            BilevelError: Something is wrong that leaves nothing to measure.
        """
        messages: list[str] = []
        with _warnings_into(messages):
            flats = [FlatProblem.of(self.problem, self.variable, one.tasks) for one in self.groups]
            for flat in flats:
                probe(flat)
            result, failure = self._hypergradient()
        if result is not None:
            inner, state = result.diagnostics.inner, result.state
            status, residual, steps = inner.status, inner.residual, inner.steps
        else:
            found = solve_inner(self.problem, self.outer, self.task, inner_solver=self.inner_solver)
            status, residual, steps = found.status, found.residual, found.steps
            state = found.state
        points = self._points(flats, state.inner, status)
        looks = [
            self._look(flat, z, one.tasks)
            for flat, z, one in zip(flats, points, self.groups, strict=True)
        ]
        merged = {key: self._in_order([look[key] for look in looks]) for key in looks[0]}
        stacking = flats[0].stacking
        facts = Facts(
            problem=self.problem,
            inner_solver=self.inner_solver,
            method=self.method,
            rtol=self.rtol,
            dtype=flats[0].vector.dtype,
            names=self.variable.names,
            n=max(flat.n for flat in flats),
            result=result,
            status=status,
            residual=residual.cpu(),
            steps=steps.cpu(),
            whole=all(flat.n <= _lanczos_steps(flat.n) for flat in flats),
            inner_part=None,
            method_part=None,
            rounding=None,
            error=None,
            longer=None,
            norms=tuple(sorted(stacking.native_norms)),
            messages=tuple(dict.fromkeys(messages)),
            failure=failure,
            lost=self.lost,
            **merged,
        )
        if result is not None and all(s.usable for s in result.status) and facts.low > 0:
            facts = self._with_errors(facts, result)
        return self._with_longer(facts)

    def _hypergradient(self) -> tuple[Hypergradient | None, str]:
        """The hypergradient as configured, or why there is none."""
        result, failure = None, ""
        started = time.perf_counter()
        try:
            result = hypergradient(
                self.problem,
                self.outer,
                self.task,
                inner_solver=self.inner_solver,
                method=self.method,
            )
        except SolveError as error:
            failure = str(error)
        self.seconds = time.perf_counter() - started
        return result, failure

    def _points(
        self, flats: list[FlatProblem], found: Sequence[Tensor], status: Sequence[Status]
    ) -> list[Tensor]:
        """The inner solutions; the start where there is none."""
        points = []
        for flat, z, one in zip(flats, found, self.groups, strict=True):
            good = torch.tensor([status[i].usable for i in one.positions], device=z.device)
            good = good & z.isfinite().all(-1)
            points.append(torch.where(good.unsqueeze(-1), z.detach(), flat.start))
        return points

    def _in_order(self, columns: Sequence[Tensor]) -> Tensor:
        """Values of the groups' tasks in the order of the user's list."""
        positions = torch.tensor([p for one in self.groups for p in one.positions])
        return torch.cat([c.detach().cpu() for c in columns])[positions.argsort()]

    def _look(self, flat: FlatProblem, z: Tensor, tasks: TaskBatch) -> dict[str, Tensor]:
        """Curvature, Newton step and kinks of stacked tasks at ``z``."""
        system = linearise(flat, z)
        operator = system.operator
        symmetric = flat.problem.structure is not Structure.GENERAL
        ends = extreme_eigenvalues if symmetric else extreme_singular_values
        curvature = ends(operator, z, _lanczos_steps(flat.n))
        ahead, _ = newton_step(system, operator, PlainCG(rtol=0.01))
        resolution = torch.finfo(z.dtype).eps * curvature[:, 1] * norm(z)
        twin = self._in_float64(flat, z, tasks)
        if twin is not None:
            resolution = norm(twin.gradient(twin.start) - flat.gradient(z).double())
        # In float64, where it can be, rounding does not look like a kink.
        sharp = system if twin is None else linearise(twin, twin.start)
        kink, piecewise = _kinks(sharp, self.seed)
        self.lost |= _lost(sharp, self.seed)
        strength = [flat.smallest_strength(i) for i in range(flat.count)]
        return {
            "size": norm(z),
            "step": norm(ahead - z),
            "curvature": curvature,
            "strength": torch.tensor(strength, dtype=torch.float64),
            "kink": kink,
            "flat": piecewise,
            "resolution": resolution,
        }

    def _in_float64(self, flat: FlatProblem, z: Tensor, tasks: TaskBatch) -> FlatProblem | None:
        """The problem in float64, starting at ``z``; None where it is, or cannot be."""
        if z.dtype == torch.float64:
            return None
        outer = Outer.of(to_float64(self.outer))
        inner = to_float64(flat.vector.unflatten(z))
        try:
            twin = FlatProblem.of(self.problem, outer, tasks.to(torch.float64), inner)
            twin.gradient(twin.start)
        except (RuntimeError, ObjectiveError):
            return None  # the problem holds tensors of its own dtype
        return twin

    # The error of the hypergradient

    def _with_errors(self, facts: Facts, result: Hypergradient) -> Facts:
        """Hold the hypergradient against the exact one at its z, and that at a Newton step."""
        own = self._exact(result, double=False)
        best = own
        if facts.dtype != torch.float64:
            try:
                best = self._exact(result, double=True)
            except (RuntimeError, ObjectiveError):
                best = own  # the problem holds tensors of its own dtype
        exact, ahead = best
        found = _joined(result)
        at_z, solved = _joined(exact), _joined(ahead)
        part = exact.diagnostics.error_estimate
        assert part is not None
        lost = bool(part.isinf().any())
        return replace(
            facts,
            inner_part=part.cpu(),
            method_part=_distance(at_z, found),
            rounding=None if best is own else _distance(at_z, _joined(own[0])),
            error=math.inf if lost else _distance(solved, found),
        )

    def _exact(self, result: Hypergradient, *, double: bool) -> tuple[Hypergradient, Hypergradient]:
        """The exact hypergradient at the inner point, and at the Newton step from it."""
        change: Callable[[Any], Any] = to_float64 if double else (lambda tree: tree)
        task = _double(self.task) if double else self.task

        def at(method: Yardstick) -> Hypergradient:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", BilevelWarning)
                return hypergradient(
                    self.problem,
                    change(self.outer),
                    task,
                    inner_solver=None,
                    inner=change(result.inner),
                    method=method,
                )

        return at(Yardstick(error_estimate=True)), at(Yardstick(correct=True))

    def _with_longer(self, facts: Facts) -> Facts:
        """Solve the inner problem with more steps where it is not solved."""
        part, tol = facts.inner_part, self.inner_solver.tol
        short = any(s is Status.MAX_STEPS for s in facts.status)
        off = part is not None and not bool((part <= self.rtol).all())
        if facts.result is None or not (short or off) or hasattr(self.inner_solver, "fn"):
            return facts
        target = tol
        if off:
            assert part is not None
            ratio = self.rtol / torch.where(part.isfinite(), part, 10.0).clamp_min(self.rtol)
            target = min(0.5 * float((facts.residual * ratio).min()), tol or math.inf)
        if not target or not math.isfinite(target):
            return facts
        for times in _LONGER:
            longer = copy.copy(self.inner_solver)
            permitted = max(times * longer.max_steps, 30 * times)
            for name, value in (("max_steps", permitted), ("tol", target)):
                object.__setattr__(longer, name, value)
            found = solve_inner(self.problem, self.outer, self.task, inner_solver=longer)
            residual = found.residual.cpu()
            facts = replace(facts, longer=(permitted, target, residual, found.steps.cpu()))
            moved = residual.max() < 0.9 * facts.residual.max()
            if bool((residual <= target).all()) or not bool(moved):
                break
        return facts


def _lanczos_steps(n: int) -> int:
    return n if n <= _WHOLE else _LANCZOS_STEPS


def _kinks(system: LinearisedSystem, seed: int) -> tuple[Tensor, Tensor]:
    """Compare differences of the stationarity with the Hessian, along two random directions.

    Returns the disagreement within 0.001 ‖z‖ where it does not fall as for a smooth function, and
    whether the Hessian vanishes beyond the regularizer's although the gradient changes.
    """
    flat = system.flat.with_outer(system.flat.outer.detached(), differentiable=False)
    z = system.z.detach()
    size = norm(z)
    eps = torch.finfo(z.dtype).eps
    size = torch.where(size > eps**0.5, size, 1.0).unsqueeze(-1)
    generator = torch.Generator().manual_seed(seed)
    strength = 0.0 if flat.strength is None else flat.strength.detach()
    kink = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    straight, moved = torch.ones_like(kink, dtype=torch.bool), torch.zeros_like(kink).bool()
    for _ in range(2):
        d = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)
        d = d / norm(d).unsqueeze(-1).to(z)
        product = system.push(d) if flat.problem.structure is Structure.GENERAL else system.pull(d)
        length = norm(product)
        gaps: list[Tensor] = []
        kept = torch.zeros_like(moved)
        for h in _WAYS:
            way = (h * size).to(z)
            ends = [flat.gradient(z + sign * way * d).detach() for sign in (1.0, -1.0)]
            gap = norm((ends[0] - ends[1]) / (2 * way) - product)
            noise = 1e3 * eps * norm(ends[0]) / way.squeeze(-1).double()
            # Half the way leaves a quarter of the gap of a smooth function.
            kept = kept | ((gap > 0.7 * gaps[-1]) & (gap > noise) if gaps else kept)
            gaps.append(gap)
        share = gaps[0] / length.clamp_min(1e-300)
        kink = torch.maximum(kink, torch.where(kept, share, 0.0))
        straight = straight & (norm(product - strength * d) <= 50 * eps * length)
        here, there = (flat.gradient(p).detach() for p in (z, z + size.to(z) * d))
        change = norm(there - here - strength * size.to(z) * d)
        moved = moved | (change > 1e-3 * (norm(here) + norm(there)))
    return kink.nan_to_num(0.0), straight & moved


def _lost(system: LinearisedSystem, seed: int) -> dict[tuple[str, str], tuple[float, float]]:
    """Where derivatives in ``outer`` differ from steady differences, along a random direction.

    Returns, for a function and a leaf, the derivative by differentiation and that by differences.
    """
    flat, z = system.flat, system.z.detach()
    names = (
        ("stationarity" if flat.problem.is_equilibrium else "inner_objective"),
        "outer_objective",
    )
    eps = torch.finfo(z.dtype).eps
    generator = torch.Generator().manual_seed(seed)

    def direction(like: Tensor) -> Tensor:
        d = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return d.div(d.norm().clamp_min(1e-300)).to(like)

    v = direction(z)
    known = system.cross(v), system.direct(z.new_ones(len(z)))
    base = (norm(system.stationarity.detach()), system.outer_value.detach().abs())
    out = {}
    for j, leaf in enumerate(flat.outer.leaves):
        d = direction(leaf)
        h = 1e-4 * (leaf.detach().norm().item() or 1.0)
        sides = []
        for step in (h, -h, h / 2, -h / 2):
            leaves = [
                x.detach() + (step * d if k == j else 0) for k, x in enumerate(flat.outer.leaves)
            ]
            moved = flat.with_outer(flat.outer.with_leaves(leaves), differentiable=False)
            with torch.no_grad():
                values = (v * moved.gradient(z)).sum(), moved.outer_value(z).sum()
            sides.append([value.item() for value in values])
        for i, name in enumerate(names):
            gradient = known[i][j]
            slope = 0.0 if gradient is None else (gradient * d).sum().item()
            far = (sides[0][i] - sides[1][i]) / (2 * h)
            near = (sides[2][i] - sides[3][i]) / h
            size = max(abs(far), abs(near), abs(slope))
            noise = 1e3 * eps * base[i].sum().item() / h
            if abs(far - near) < 0.01 * size and abs(near - slope) > 0.05 * size + noise:
                out[name, flat.outer.names[j]] = (slope, near)
    return out


# Small parts


@contextmanager
def _warnings_into(messages: list[str]) -> Iterator[None]:
    """Collect the library's warnings; pass others on."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    for one in seen:
        if issubclass(one.category, BilevelWarning):
            messages.append(str(one.message))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Put every global random state back: PyTorch's, Python's and numpy's."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy and numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])


def _double(task: Any) -> Any:
    """A task, or several, with data in float64."""
    if task is None:
        return None
    if isinstance(task, Task):
        return replace(
            task, inner_batch=_data(task.inner_batch), outer_batch=_data(task.outer_batch)
        )
    return task.to(torch.float64) if isinstance(task, TaskBatch) else [_double(t) for t in task]


def _data(batch: PyTree) -> PyTree:
    if isinstance(batch, Stream):
        return Stream(lambda step: to_float64(batch.draw(step)))
    return to_float64(batch)


def _joined(result: Hypergradient) -> Tensor:
    """The gradient as one vector."""
    leaves = tree_leaves(result.gradient)
    return torch.cat([leaf.detach().double().reshape(-1).cpu() for leaf in leaves])


def _distance(exact: Tensor, found: Tensor) -> float:
    """Relative to what was found, like every error estimate; to the exact one where that is 0."""
    size = found.norm().item() or exact.norm().item()
    return (exact - found).norm().item() / size if size > 0 else 0.0


def _numbers(facts: Facts, seconds: float) -> dict[str, str]:
    """The table of the report."""
    low, high, result = facts.low, facts.high, facts.result
    names = ", ".join(sorted({s.name for s in facts.status}))
    out = {
        "inner solve": f"{names}, ‖∂_z G‖ = {facts.residual.max().item():.1e} after "
        f"{int(facts.steps.max())} steps"
    }
    usable = torch.tensor([s.usable for s in facts.status])
    if bool(usable.any()):
        out["inner error"] = f"{facts.inner_error[usable].max().item():.1e} ‖z‖, by a Newton step"
    if result is not None and result.diagnostics.linear is not None:
        linear = result.diagnostics.linear
        names = ", ".join(sorted({s.name for s in linear.status}))
        out["adjoint solve"] = (
            f"{names}, relative residual {linear.residual.max().item():.1e} after "
            f"{int(linear.steps.max())} steps"
        )
    if facts.error is not None:
        out["gradient error"] = (
            f"{facts.error:.1e} of its norm, estimated; {facts.rtol:g} is fine"
            if math.isfinite(facts.error)
            else f"too large to estimate; {facts.rtol:g} is fine"
        )
    definite = f"condition {facts.condition:.1e}"
    if not math.isfinite(facts.condition):
        definite = "not positive definite" if facts.symmetric else "singular"
    out["curvature" if facts.symmetric else "singular values"] = (
        f"{low:.1e} to {high:.1e}, {definite}" + ("" if facts.whole else " at least, by Lanczos")
    )
    if result is not None:
        told = ", ".join(
            f"{value} {key if value != 1 else key[:-1]}"
            for key, value in result.diagnostics.counts.items()
        )
        out["cost"] = f"{seconds * 1e3:.1f} ms; {told}"
    return out
