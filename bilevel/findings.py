"""What `doctor` looks for: each check turns measured facts into findings with their cures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import BilevelError
from .inner_solver import InnerSolver
from .method import HypergradientMethod, ImplicitMethod
from .problem import BilevelProblem, Structure
from .pytree import tree_leaves
from .result import Hypergradient
from .status import Status

__all__ = ["Facts", "Finding", "examine", "from_error"]

Severity = Literal["error", "warning", "info"]

# Error: what the finding is about, and where to act if the message names nothing.
_KINDS = {
    "RandomnessError": ("randomness", "problem"),
    "InPlaceError": ("in-place change", "problem"),
    "DependenceError": ("dependence", "outer"),
    "StructureError": ("structure", "method"),
    "NotDifferentiableError": ("not differentiable", "inner_solver"),
    "SolveError": ("failed solve", "method"),
}
_ROUNDING = 50.0
_KINK = 0.02


@dataclass(frozen=True)
class Finding:
    """One thing that `doctor` found.

    Attributes:
        kind: What it is about, such as ``"negative curvature"``.
        severity: ``"error"``: the hypergradient is wrong or there is none; ``"warning"``: it is
            less than it seems; ``"info"``: worth knowing, nothing is wrong.
        argument: Where to act, such as ``"inner_solver"``.
        found: What was found, with its number.
        cure: What to change.
    """

    kind: str
    severity: Severity
    argument: str
    found: str
    cure: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.kind} ({self.argument}): {self.found}. {self.cure}."


@dataclass(frozen=True)
class Facts:
    """What was measured at one outer point; tensors are ``[tasks]``, in the user's order.

    Attributes:
        result: The hypergradient as configured; None where no task had one.
        status: How the inner solve ended.
        residual: ‖∂_z G‖.
        steps: Inner steps.
        size: ‖z‖.
        step: ‖s‖ of a Newton step s, an estimate of the inner error.
        curvature: Smallest and largest eigenvalue ``[tasks, 2]`` (singular value for an
            equilibrium).
        whole: These are the ends of the spectrum, not only bounds from within.
        strength: The smallest proximal strength.
        kink: By how much differences of the gradient over a short way disagree with the Hessian,
            where they do not come closer as the way gets shorter; 0 where they do.
        flat: The objective's own Hessian vanishes although its gradient changes.
        resolution: What rounding makes of ‖∂_z G‖: its distance to float64, or a guess.
        inner_part: Relative error of each hypergradient that the inner error makes, estimated.
        method_part: Relative distance of the hypergradient to the exact one at the same z.
        rounding: That between the exact ones in the dtype at hand and in float64.
        error: Relative error of the hypergradient in all, estimated.
        longer: Result of a longer inner solve: (steps permitted, tolerance, residual, steps).
        norms: Functions with native norm layers.
        messages: Warnings of the library.
        failure: Why there is no result.
        lost: Derivatives of a function in a leaf that differ from steady differences: both.
    """

    problem: BilevelProblem
    inner_solver: InnerSolver
    method: HypergradientMethod
    rtol: float
    dtype: torch.dtype
    names: tuple[str, ...]
    n: int
    result: Hypergradient | None
    status: tuple[Status, ...]
    residual: Tensor
    steps: Tensor
    size: Tensor
    step: Tensor
    curvature: Tensor
    whole: bool
    strength: Tensor
    kink: Tensor
    flat: Tensor
    resolution: Tensor
    inner_part: Tensor | None
    method_part: float | None
    rounding: float | None
    error: float | None
    longer: tuple[int, float, Tensor, Tensor] | None
    norms: tuple[str, ...]
    messages: tuple[str, ...]
    failure: str
    lost: dict[tuple[str, str], tuple[float, float]]

    @property
    def symmetric(self) -> bool:
        """The inner Jacobian is a Hessian."""
        return self.problem.structure is not Structure.GENERAL

    @property
    def low(self) -> float:
        """Smallest curvature over tasks."""
        return self.curvature[:, 0].min().item()

    @property
    def high(self) -> float:
        """Largest curvature over tasks."""
        return self.curvature[:, 1].max().item()

    @property
    def zero(self) -> Tensor:
        """Curvature that rounding may make of nothing, of each task."""
        return _ROUNDING * torch.finfo(self.dtype).eps * self.curvature.abs().amax(-1)

    @property
    def condition(self) -> float:
        """The largest condition number over tasks; infinite where one is not positive."""
        low, high = self.curvature.unbind(-1)
        ratio = torch.where(low > self.zero, high / low, float("inf"))
        return ratio.max().item()

    @property
    def inner_error(self) -> Tensor:
        """‖s‖ / ‖z‖, relative to a small number where z vanishes."""
        return self.step / self.size.clamp_min(torch.finfo(self.dtype).eps ** 0.5)

    @property
    def wrong(self) -> bool:
        """The hypergradient is further off than wanted, as far as is known."""
        return self.error is not None and not self.error <= self.rtol

    def which(self, flags: Tensor) -> str:
        """The tasks that are meant, to begin a sentence or to follow a noun; "" for the only."""
        where = flags.nonzero().flatten().tolist()
        if len(flags) == 1:
            return ""
        if len(where) == len(flags):
            return f" in all {len(flags)} tasks"
        listed = ", ".join(map(str, where[:8])) + (", …" if len(where) > 8 else "")
        return f" in task{'s' * (len(where) > 1)} {listed} (of {len(flags)})"


def from_error(error: BilevelError) -> Finding:
    """A finding made of an error."""
    kind, argument = _KINDS.get(type(error).__name__, ("objective", "problem"))
    return _from_message(str(error), "error", kind, argument)


def _from_message(message: str, severity: Severity, kind: str, argument: str) -> Finding:
    """A finding made of a message of the library: "what; cure" or "what: cure"."""
    text = " ".join(message.split()).rstrip(".")
    what, _, cure = text.partition("; ")
    if not cure:
        what, _, cure = text.rpartition(": ")
    if not what:
        what, cure = text, "See the documentation of the argument"
    named = re.search(r"`([^` ]+)`", what)
    if named and kind not in ("structure", "not differentiable"):
        argument = named[1]
    return Finding(kind, severity, argument, _upper(what), _upper(cure))


def examine(facts: Facts) -> list[Finding]:
    """All findings."""
    found = [finding for check in _CHECKS for finding in check(facts)]
    findings = [replace(finding, cure=_upper(finding.cure)) for finding in found]
    if facts.failure and all(finding.severity != "error" for finding in findings):
        findings.append(_from_message(facts.failure, "error", "failed solve", "method"))
    return findings


# The checks


def _dependence(facts: Facts) -> Iterator[Finding]:
    for message in facts.messages:
        about = "stacking" if "cannot be stacked" in message else "dependence"
        severity: Severity = "info" if about == "stacking" else "warning"
        yield _from_message(message, severity, about, "outer")
    if facts.result is None:
        return
    zero = [
        name
        for name, leaf in zip(facts.names, _leaves(facts.result), strict=True)
        if name not in facts.result.diagnostics.unused and leaf.numel() and not bool(leaf.any())
    ]
    if zero:
        listed = ", ".join(f"`{name}`" for name in zero)
        yield Finding(
            "zero gradient",
            "warning",
            zero[0],
            f"The gradient of {listed} is exactly zero, although an objective uses it",
            "Look for a product with zero, a saturated, rounded or clipped value, or a `.detach()` "
            "on the way; nothing is wrong if this point is stationary",
        )


def _lost(facts: Facts) -> Iterator[Finding]:
    for (function, leaf), (slope, difference) in facts.lost.items():
        yield Finding(
            "lost derivative",
            "warning",
            leaf,
            f"`{function}` changes with `{leaf}` otherwise than its derivative says: {_g(slope)} "
            f"by automatic differentiation, {_g(difference)} by differences",
            "Look for `.detach()`, `.item()`, `.data`, `torch.no_grad()` or a backward pass of "
            "your own between the two; it is fine where a gradient is stopped on purpose",
        )


def _failed(facts: Facts) -> Iterator[Finding]:
    nonfinite = _flags(facts, lambda s: s is Status.NON_FINITE)
    diverged = _flags(facts, lambda s: s is Status.DIVERGED)
    if bool(nonfinite.any()):
        yield Finding(
            "not finite",
            "error",
            "inner_objective",
            f"The inner solve ends in NaN or infinity{facts.which(nonfinite)}",
            "Lower the learning rate"
            if _too_fast(facts)
            else "Look for log(0), 0/0 or overflow in an objective, or lower the learning rate",
        )
    if bool(diverged.any()):
        yield Finding(
            "divergence",
            "error",
            "inner_solver",
            f"The inner solve diverges to ‖∂_z G‖ = {_g(facts.residual[diverged].max())}"
            f"{facts.which(diverged)}",
            "Lower its learning rate, or use LBFGS, which searches for its step lengths",
        )


def _rate(facts: Facts) -> Iterator[Finding]:
    """A learning rate or a Neumann scale that no symmetric matrix of this norm permits."""
    if not (facts.symmetric and facts.high > 0):
        return
    lr, factor = _learning_rate(facts.inner_solver)
    if _too_fast(facts):
        yield Finding(
            "learning rate",
            "error",
            "inner_solver",
            f"lr = {lr:g} is beyond {factor:.3g}/L = {_g(factor / facts.high)}, where L = "
            f"{_g(facts.high)} is the largest curvature: steps along it grow instead of shrinking",
            f"Set lr below that; lr = {_round(factor / 2 / facts.high)} is safe",
        )
    scale = getattr(_linear(facts.method), "scale", None)
    high = facts.high + getattr(facts.method, "damping", 0.0)
    if isinstance(scale, float | int) and scale > 2 / high:
        yield Finding(
            "Neumann scale",
            "error",
            "method",
            f"scale = {scale:g} is beyond 2/L = {_g(2 / high)}, where L = {_g(high)} is the "
            "largest curvature: the series diverges",
            f"Set scale = {_round(1 / high)}, or None to have it found",
        )


def _curvature(facts: Facts) -> Iterator[Finding]:
    low = facts.curvature[:, 0]
    if not facts.symmetric or not bool(low.isfinite().any()):
        return
    negative, singular = low < -facts.zero, low.abs() <= facts.zero
    if bool(facts.flat.any()):
        own = "" if facts.strength.max() == 0 else " beyond the regularizer's"
        yield Finding(
            "piecewise linear",
            "warning",
            "inner_objective",
            f"Its Hessian has no entry{own}{facts.which(facts.flat)}, yet its gradient changes "
            "nearby: it is piecewise linear, and its curvature sits in kinks that no Hessian shows",
            "Use a smooth loss, such as softplus for a hinge or the Huber loss for |·|",
        )
    if bool(negative.any()):
        where = low[negative]
        limit = 1e-6 * facts.curvature.abs().amax(-1) * (1.0 + facts.size)
        solved = bool((facts.residual <= limit)[negative].all())
        promised = facts.problem.structure is Structure.POSITIVE_DEFINITE
        least = facts.strength[negative].min().item() - 2 * where.min().item()
        yield Finding(
            "negative curvature",
            "error",
            "problem",
            f"The inner Hessian has eigenvalue {_g(where.min())}{facts.which(negative)}"
            + (", although `structure` promises a positive definite one" if promised else "")
            + (": the inner solution is a saddle or a maximum" if solved else ""),
            ("" if solved else "Solve the inner problem further, or ")
            + _proximal(facts, least)
            + (", or start elsewhere" if solved else "")
            + f"; damping = {_round(-2 * where.min().item())} in the method restores a solution, "
            "but a biased one",
        )
    elif bool(singular.any()):
        top = facts.curvature[:, 1].abs().max().item()
        yield Finding(
            "singular Hessian",
            "error",
            "problem",
            f"The smallest curvature is zero to rounding in {facts.dtype}{facts.which(singular)}: "
            "the inner solution is not isolated, and its derivative is not defined",
            ("" if facts.dtype == torch.float64 else "Use float64 to tell it from zero, or ")
            + _proximal(facts, facts.strength.min().item() + (1e-3 * top or 1.0)),
        )


def _unsolved(facts: Facts) -> Iterator[Finding]:
    """The inner problem is not solved, or not to what the hypergradient needs."""
    if facts.result is None or not facts.result.diagnostics.inner.residual.isfinite().all():
        return
    part = facts.inner_part
    missed = _flags(facts, lambda s: s is Status.MAX_STEPS)
    off = torch.zeros_like(missed) if part is None else ~(part <= facts.rtol)
    usable = _flags(facts, lambda s: s.usable)
    # Where the Hessian is singular or indefinite, a Newton step says nothing.
    off = off & usable & ~(facts.curvature[:, 0] <= facts.zero)
    if not bool((missed | off).any()):
        return
    tasks = missed | off
    tol = getattr(facts.inner_solver, "tol", None)
    target = f", above tol = {tol:g}," if tol is not None and bool(missed.any()) else ""
    worst = None if part is None else part[tasks].max().item()
    implicit = isinstance(facts.method, ImplicitMethod)
    if worst is not None and math.isfinite(worst):
        effect = (
            f"an error of {_share(worst if implicit else facts.error or 0.0)} in the hypergradient"
        )
    else:
        effect = "an error that cannot be estimated from so far away"
    found = (
        f"‖∂_z G‖ = {_g(facts.residual[tasks].max())}{target} after "
        f"{int(facts.steps[tasks].max())} steps{facts.which(tasks)}; a Newton step would move z by "
        f"{_share(facts.inner_error[tasks].max().item())}, which means {effect}"
    )
    if not implicit and getattr(facts.method, "truncate", 0) is None and not bool(missed.any()):
        yield Finding(
            "inner steps",
            "info",
            "inner_solver",
            f"{found} for the solved problem. For the steps themselves Unrolled is exact",
            "Nothing to do if these steps are what you optimise; take more if it is the solution",
        )
        return
    formula = hasattr(facts.inner_solver, "fn")
    cure = (
        "Correct the formula: the regularizer belongs to what it minimises"
        if formula
        else _more_steps(facts, tol, lasting=bool(off.any()))
    )
    yield Finding("inner problem not solved", "warning", "inner_solver", found, cure)


def _more_steps(facts: Facts, tol: float | None, *, lasting: bool) -> str:
    """How to solve the inner problem, from a longer attempt."""
    lr, factor = _learning_rate(facts.inner_solver)
    safe = factor / 2 / facts.high if facts.high > 0 and facts.symmetric else 0.0
    kinked = bool((facts.kink > _KINK).any() or facts.flat.any())
    if lr is not None and lr < 0.2 * safe and not kinked:
        return f"Raise lr to {_round(safe)}, half of the largest that is stable"
    adapts = hasattr(facts.inner_solver, "memory")
    solver = "a preconditioned one" if adapts else "one that adapts to the curvature, such as LBFGS"
    if facts.longer is None:
        return f"Raise `max_steps`, or use another solver, {solver}"
    permitted, target, residual, steps = facts.longer
    if bool((residual <= target).all()):
        asked = "" if tol is not None and tol <= target else f" with tol = {target:.1g}"
        return f"Set max_steps = {int(steps.max())}{asked}: tried, it suffices"
    before, after = facts.residual.max().item(), residual.max().item()
    if not after < (0.5 if kinked else 0.9) * before:
        # It stalls: by rounding, at a kink, or because the steps are too long.
        floor = facts.resolution.max().item()
        if not lasting:
            looser = f"Loosen tol to {_round(2 * min(before, after))}, which is accurate enough"
            return looser if facts.dtype == torch.float64 else f"Use float64, or {_lower(looser)}"
        if 0 < target < 10 * floor:
            wider = "Rescale the inner variable" if facts.dtype == torch.float64 else "Use float64"
            return f"{wider}: {facts.dtype} resolves ‖∂_z G‖ to about {_g(floor)}"
        if kinked:
            return "Make the objective smooth: at a kink ‖∂_z G‖ does not fall, however many steps"
    if not 0 < after < 0.98 * before:
        return (
            f"More steps do not help, {permitted} end at {_g(after)}: lower the learning rate, or "
            f"use another solver, {solver}"
        )
    rate = math.log(before / after) / max(1, permitted - int(facts.steps.max()))
    if lr is not None and facts.symmetric and facts.low > 0 and factor == 2.0:
        rate = min(rate, lr * facts.low)
    needed = permitted + math.log(after / target) / rate
    return (
        f"At least {_round(needed)} steps would be needed, for {permitted} end at {_g(after)}: "
        f"use another solver, {solver}"
    )


def _linear_solve(facts: Facts) -> Iterator[Finding]:
    """The adjoint system: not solved, or damped into another."""
    if facts.result is None or facts.result.diagnostics.linear is None:
        return
    report = facts.result.diagnostics.linear
    residual = report.residual.max().item()
    indefinite = bool((facts.curvature[:, 0] < facts.zero).any())
    damping = getattr(facts.method, "damping", 0.0)
    part = facts.method_part
    apart = "" if part is None else f", which is an error of {_share(part)} in the hypergradient"
    if damping > 0:
        small = part is not None and part <= facts.rtol
        biased = facts.low / damping if damping else 0.0
        yield Finding(
            "damping",
            "info" if small else "warning",
            "method",
            f"damping = {damping:g} against a smallest curvature of {_g(facts.low)} biases the "
            f"solution{apart}",
            "Nothing to do"
            if small
            else f"Set damping = 0, or below {_round(facts.rtol * biased * damping)}"
            if facts.low > 0
            else "Raise the proximal strength instead, which states the bias in the problem",
        )
        return
    failed = any(s in (Status.MAX_STEPS, Status.DIVERGED) for s in report.status)
    # A series or iteration without tolerance is judged by what it does to the hypergradient.
    if indefinite or not (failed or (part is not None and part > facts.rtol)):
        return
    solver = _linear(facts.method)
    asked = getattr(solver, "rtol", 0.0)
    limit = 10 * facts.condition * torch.finfo(facts.dtype).eps
    goal = max(min(asked or facts.rtol, facts.rtol), limit)
    series = hasattr(solver, "terms")
    needed = _needed(facts, goal, getattr(solver, "scale", None) if series else None, series)
    budget = "terms" if series else "max_steps"
    if residual <= 10 * limit and facts.dtype != torch.float64:
        cure = f"Use float64: at condition {_g(facts.condition)}, {facts.dtype} goes no further"
    elif series:
        cure = f"Set {budget} = {needed}, or use ImplicitCG, which needs about {_cg(facts, goal)}"
    else:
        cure = f"Set {budget} = {needed}, or give the solver a preconditioner"
    yield Finding(
        "adjoint system not solved",
        "warning",
        "method",
        f"Its relative residual is {_g(residual)}"
        + (f", above rtol = {asked:g}," if asked and failed else "")
        + f" after {int(report.steps.max())} steps at condition {_g(facts.condition)}{apart}",
        cure,
    )


def _biased(facts: Facts) -> Iterator[Finding]:
    """Methods that are not meant to be exact."""
    if isinstance(facts.method, ImplicitMethod):
        return
    name = type(facts.method).__name__
    truncate = getattr(facts.method, "truncate", 0)
    if truncate is None or (truncate and truncate >= int(facts.steps.max())):
        return  # every step is differentiated
    how = (
        f"differentiates the last {truncate} of {int(facts.steps.max())} steps only"
        if truncate
        else "takes the derivative of the inner steps for the identity"
        if name == "FirstOrder"
        else "is no implicit method"
    )
    known = facts.error is not None and math.isfinite(facts.error)
    by = f"; here by {_share(facts.error or 0.0)}" if known else ""
    yield Finding(
        "biased method",
        "warning" if facts.wrong or not known else "info",
        "method",
        f"{name} {how}, so it is biased by design{by}",
        "Use an implicit method such as ImplicitCG, "
        + ("or raise `truncate`" if truncate else "or Unrolled"),
    )


def _condition(facts: Facts) -> Iterator[Finding]:
    condition, eps = facts.condition, torch.finfo(facts.dtype).eps
    if not math.isfinite(condition):
        return
    lost = max(condition * eps, facts.rounding or 0.0)
    if lost > facts.rtol:
        measured = facts.rounding is not None and facts.rounding >= condition * eps
        wide = facts.dtype == torch.float64
        yield Finding(
            "precision",
            "warning",
            "problem",
            f"Rounding in {facts.dtype} makes an error of {_share(lost)} in the hypergradient at "
            f"condition {_g(condition)}, "
            + ("compared with float64" if measured else "by their product"),
            "Rescale the inner variable, or raise the proximal strength"
            if wide
            else "Use float64 for `outer` and the data, or raise the proximal strength",
        )
    elif condition > (1 - 1e-6) * 1e4:  # found by iteration: rounding must not decide at 10,000
        yield Finding(
            "conditioning",
            "info",
            "problem",
            f"The inner Hessian has condition {'' if facts.whole else 'at least '}{_g(condition)}: "
            f"CG may need {_cg(facts, facts.rtol)} steps to {facts.rtol:g}, and gradient descent "
            f"about {_round(condition / 2 * math.log(1 / facts.rtol))}",
            "A preconditioner or a larger proximal strength saves steps",
        )


def _kinks(facts: Facts) -> Iterator[Finding]:
    kinked = (facts.kink > _KINK) & ~facts.flat
    if bool(kinked.any()):
        yield Finding(
            "nonsmooth",
            "warning",
            "problem",
            "Within 0.001 ‖z‖ the inner gradient changes otherwise than its Hessian says, by "
            f"{_share(facts.kink[kinked].max().item(), 'it')}{facts.which(kinked)}, and half "
            "the way does not make it less: kinks lie close, and the hypergradient ignores them",
            "Use smooth functions (softplus or GELU for ReLU, Huber for |·|), or take the "
            "hypergradient for that of the piece at hand",
        )


def _norms(facts: Facts) -> Iterator[Finding]:
    if facts.norms:
        listed = ", ".join(f"`{name}`" for name in facts.norms)
        yield Finding(
            "native norms",
            "info",
            facts.norms[0],
            f"{listed} uses native norm layers, whose third derivatives are wrong in PyTorch by 3 "
            "to 20 %; hypergradients are right",
            "For second derivatives through `argmin` pass the module through `exact_norms`",
        )


_CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _failed,
    _rate,
    _curvature,
    _unsolved,
    _linear_solve,
    _biased,
    _lost,
    _dependence,
    _kinks,
    _condition,
    _norms,
)


# Small parts


def _learning_rate(solver: Any) -> tuple[float | None, float]:
    """The learning rate of gradient descent, and c in its limit c / L."""
    options = {"lr": getattr(solver, "lr", None)} | {
        key: getattr(solver, key, default) for key, default in (("momentum", 0.0), ("nesterov", 0))
    }
    if getattr(solver, "cls", None) is torch.optim.SGD:
        options |= {"lr": 1e-3} | dict(solver.options)
    lr, beta = options["lr"], options["momentum"]
    if not isinstance(lr, float | int):
        return None, 2.0
    lr = lr * (1.0 - options.get("dampening", 0.0))
    return lr, 2.0 * (1.0 + beta) / (1.0 + 2.0 * beta if options["nesterov"] else 1.0)


def _too_fast(facts: Facts) -> bool:
    """Gradient descent cannot converge with this learning rate."""
    lr, factor = _learning_rate(facts.inner_solver)
    return facts.symmetric and lr is not None and facts.high > 0 and lr > factor / facts.high


def _linear(method: Any) -> Any:
    """What holds the settings of the linear solve: the method, or its linear solver."""
    return getattr(method, "linear_solver", method)


def _needed(facts: Facts, goal: float, scale: float | None, series: bool) -> int | str:
    if not series:
        return _cg(facts, goal)
    contraction = 1.0 - (scale or 1.0 / (1.1 * facts.high)) * facts.low
    if not 0.0 < contraction < 1.0:
        return "more"
    return math.ceil(math.log(goal) / math.log(contraction))


def _cg(facts: Facts, goal: float) -> int:
    """Steps within which CG is sure to reach ``goal`` without rounding: 2((√κ−1)/(√κ+1))ᵏ."""
    root = math.sqrt(facts.condition)
    # In the residual the bound is √κ times that in the energy norm.
    bound = math.ceil(0.5 * root * math.log(2 * root / goal))
    return max(1, min(bound, 2 * facts.n))


def _proximal(facts: Facts, strength: float) -> str:
    given = facts.problem.regularizer is not None
    if given:
        return f"raise the proximal strength to {_round(strength)}"
    return f"add a regularizer, Proximal({_round(strength)})"


def _flags(facts: Facts, test: Callable[[Status], bool]) -> Tensor:
    return torch.tensor([test(s) for s in facts.status])


def _leaves(result: Hypergradient) -> Sequence[Tensor]:
    return tree_leaves(result.gradient)


def _g(number: float | Tensor) -> str:
    number = float(number)
    return f"{number:.0f}" if 100 <= abs(number) < 1e5 else f"{number:.2g}"


def _share(ratio: float, of: str = "its norm") -> str:
    if ratio >= 1.0:
        return f"{_g(ratio)} times {of}"
    return f"{100 * ratio:.2g} % of {of}" if ratio > 1e-4 else f"{ratio:.1g} of {of}"


def _round(number: float) -> str:
    """To one significant digit and a half, as one would type it."""
    return f"{float(f'{number:.2g}'):g}"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
