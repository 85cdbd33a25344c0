r"""How accurately to solve the inner problem and the adjoint system, outer step by outer step.

Solving both to rounding at every outer step wastes work far from the optimum; a fixed loose
tolerance stalls near it. A policy makes a controller, which sets both tolerances, looks at each
hypergradient, and says whether it is good enough to step along.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .result import Hypergradient

__all__ = [
    "AccuracyController",
    "AccuracyPolicy",
    "ErrorDrivenAccuracy",
    "FixedAccuracy",
    "ScheduledAccuracy",
    "Tolerances",
]

_LEAST_INNER = 1e-13
_LEAST_RTOL = 1e-13


@dataclass(frozen=True)
class Tolerances:
    """What the next hypergradient is solved to.

    Attributes:
        inner: Absolute tolerance in ‖∂_z G‖.
        linear: Relative tolerance in ‖∂_z f − H v‖.
    """

    inner: float
    linear: float


class AccuracyController(ABC):
    """Sets the tolerances of one minimisation; it may remember.

    Attributes:
        tolerances: Those of the next hypergradient.
        estimate: Whether the next hypergradient shall estimate its error.
        accurate: Whether the last hypergradient was accepted because it is accurate enough, and not
            because nothing more could be done.
    """

    tolerances: Tolerances
    estimate: float | bool = False
    accurate: bool = True

    @abstractmethod
    def judge(self, result: Hypergradient, gradient: Tensor) -> bool:
        """Whether to step along this hypergradient; if not, `tolerances` are tighter now.

        Args:
            result: The hypergradient.
            gradient: All its leaves as one vector, float64.
        """

    def stepped(self, step: int) -> None:
        """An outer step was taken; set the tolerances of the next one."""

    def tighten(self) -> bool:
        """The line search found no decrease; whether tighter tolerances are to be tried."""
        return False


class AccuracyPolicy(ABC):
    """A way to choose tolerances; a frozen dataclass of its settings."""

    @abstractmethod
    def controller(self, residual: float) -> AccuracyController:
        """A controller for one minimisation.

        Args:
            residual: ‖∂_z G‖ at the first inner point, which gives the inner tolerances a scale.
        """


# The same tolerances at every step


@dataclass(frozen=True)
class FixedAccuracy(AccuracyPolicy):
    """The same tolerances at every outer step.

    Args:
        inner: Tolerance in ‖∂_z G‖, relative to that at the first inner point.
        linear: Tolerance in ‖∂_z f − H v‖ / ‖∂_z f‖.

    Raises:
        ValueError: A tolerance is not in (0, 1).
    """

    inner: float = 1e-8
    linear: float = 1e-8

    def __post_init__(self) -> None:
        _check_fraction("inner", self.inner)
        _check_fraction("linear", self.linear)

    def controller(self, residual: float) -> AccuracyController:
        """A controller that never changes its mind."""
        return _FixedController(Tolerances(_scaled(self.inner, residual), self.linear))


class _FixedController(AccuracyController):
    def __init__(self, tolerances: Tolerances) -> None:
        self.tolerances = tolerances

    def judge(self, result: Hypergradient, gradient: Tensor) -> bool:
        return True


# Tolerances by the number of the step


@dataclass(frozen=True)
class ScheduledAccuracy(AccuracyPolicy):
    """Tolerances that fall with the number k of the outer step (HOAG; Pedregosa, 2016, §4.1).

    Converges for summable sequences. Both tolerances are the same number, the inner one relative to
    ‖∂_z G‖ at the first inner point.

    Args:
        kind: ``"quadratic"``: first / k²; ``"cubic"``: first / k³; ``"exponential"``:
            first · 0.9ᵏ⁻¹.
        first: The first tolerance, in (0, 1).

    Raises:
        ValueError: A setting is out of range.
    """

    kind: Literal["quadratic", "cubic", "exponential"] = "exponential"
    first: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in ("quadratic", "cubic", "exponential"):
            raise ValueError(f"`kind` is {self.kind!r}; pass 'quadratic', 'cubic' or 'exponential'")
        _check_fraction("first", self.first)

    def at(self, k: int) -> float:
        """The tolerance of outer step k, from 1."""
        power = {"quadratic": k**-2, "cubic": k**-3, "exponential": 0.9 ** (k - 1)}
        return self.first * power[self.kind]

    def controller(self, residual: float) -> AccuracyController:
        """A controller that follows the sequence."""
        return _ScheduleController(self, residual)


class _ScheduleController(AccuracyController):
    def __init__(self, schedule: ScheduledAccuracy, residual: float) -> None:
        self.schedule, self.residual = schedule, residual
        self.stepped(0)

    def judge(self, result: Hypergradient, gradient: Tensor) -> bool:
        return True

    def stepped(self, step: int) -> None:
        value = max(self.schedule.at(step + 1), _LEAST_RTOL)
        self.tolerances = Tolerances(_scaled(value, self.residual), value)


# Tolerances by the estimated error


@dataclass(frozen=True)
class ErrorDrivenAccuracy(AccuracyPolicy):
    r"""Keep the hypergradient's estimated error under a fraction of its norm.

    The error is a sum of two parts, proportional to $\|\partial_z G\|$ and to the residual of the
    adjoint system. An error estimate now and then finds the two factors; between, the residuals
    alone tell the error, at no cost. Where it is too large, the tolerance of the part that
    dominates is lowered, and its solve goes on from where it is; after a step both tolerances are
    set to what the norm then allows. The test is that of Salehi et al. (2024, arXiv:2308.10098) on
    an estimate in place of a bound.

    Args:
        fraction: The error allowed, relative to the norm, in (0, 1).
        first: The first tolerances, both relative, in (0, 1).
        every: Estimate again after this many outer steps at the latest.

    Raises:
        ValueError: A setting is out of range.
    """

    fraction: float = 0.5
    first: float = 0.1
    every: int = 50

    def __post_init__(self) -> None:
        _check_fraction("fraction", self.fraction)
        _check_fraction("first", self.first)
        if self.every < 1:
            raise ValueError(f"`every` is {self.every}; estimate after at least one step")

    def controller(self, residual: float) -> AccuracyController:
        """A controller with no knowledge of the two factors yet."""
        return _ErrorController(self, residual)


_TRIES = 12
_LOWEST = 0.01
# Of the error allowed, what each part aims at; well below it, since a second attempt costs more
# than an ample first one. A better inner point costs no Hessian product, and a worse one asks for
# a second solve of the adjoint system, so that it aims lower.
_SHARES = (0.03, 0.2)
_RELAX = 3.0
_DROP = 0.001


class _ErrorController(AccuracyController):
    """The two parts, inner and linear, stand in this order everywhere."""

    def __init__(self, policy: ErrorDrivenAccuracy, residual: float) -> None:
        self.policy = policy
        self.loosest = Tolerances(_scaled(policy.first, residual), policy.first)
        self.tolerances = self.loosest
        self.estimate = True
        self.factors = [0.0, 0.0]
        self.measured = (0, math.inf)
        self.norm = math.inf
        self.step = self.tries = 0

    def judge(self, result: Hypergradient, gradient: Tensor) -> bool:
        self.norm = float(gradient.norm())
        residuals = _residuals(result)
        if self.estimate:
            if not self._measure(result, residuals):
                return self._again(*(0.1 * r for r in residuals))
            # A part that happened to vanish has shown no factor yet.
            self.estimate = min(residuals) == 0.0 and self.tries == 0
            self.measured = (self.step, self.norm)
        self.accurate = True
        parts = [c * r for c, r in zip(self.factors, residuals, strict=True)]
        allowed = self.policy.fraction * self.norm
        if sum(parts) > allowed:
            self.accurate = False
            pair = [self.tolerances.inner, self.tolerances.linear]
            for i, (part, share) in enumerate(zip(parts, _SHARES, strict=True)):
                if part > share * allowed:
                    pair[i] = residuals[i] * max(_LOWEST, share * allowed / part)
            return self._again(*pair)
        if self.norm < _DROP * self.measured[1]:
            # A norm that fell this far has left the place where the factors were measured.
            self.estimate = True
            return self._again(self.tolerances.inner, self.tolerances.linear)
        return True

    def stepped(self, step: int) -> None:
        self.step, self.tries = step, 0
        self.estimate = step - self.measured[0] >= self.policy.every
        allowed = self.policy.fraction * self.norm
        now = self.tolerances
        inner, linear = (
            min(share * allowed / factor if factor > 0 else most, _RELAX * tolerance, most)
            for share, factor, tolerance, most in zip(
                _SHARES,
                self.factors,
                (now.inner, now.linear),
                (self.loosest.inner, self.loosest.linear),
                strict=True,
            )
        )
        self.tolerances = _floored(inner, linear)

    def tighten(self) -> bool:
        before = self.tolerances
        self.estimate = True
        self.tries += 1
        self.tolerances = _floored(0.1 * before.inner, 0.1 * before.linear)
        return self.tries <= _TRIES and self.tolerances != before

    def _measure(self, result: Hypergradient, residuals: list[float]) -> bool:
        """The factors, from an error estimate; False where it failed."""
        found = result.diagnostics
        assert found.inner_error is not None
        assert found.linear_error is not None
        assert found.gradient_norm is not None
        parts = [_mean(e * found.gradient_norm) for e in (found.inner_error, found.linear_error)]
        if not all(math.isfinite(part) for part in parts):
            return False
        for i, residual in enumerate(residuals):
            if residual > 0.0:
                self.factors[i] = parts[i] / residual
        return True

    def _again(self, inner: float, linear: float) -> bool:
        """Ask for another hypergradient (False), or give up (True)."""
        before = self.tolerances
        self.tries += 1
        self.tolerances = _floored(min(inner, before.inner), min(linear, before.linear))
        return self.tries > _TRIES or (self.tolerances == before and not self.estimate)


def _floored(inner: float, linear: float) -> Tolerances:
    return Tolerances(max(inner, _LEAST_INNER), max(linear, _LEAST_RTOL))


def _residuals(result: Hypergradient) -> list[float]:
    linear = result.diagnostics.linear
    assert linear is not None
    return [_mean(result.diagnostics.inner.residual), _mean(linear.residual)]


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _scaled(fraction: float, residual: float) -> float:
    return max(fraction * residual, _LEAST_INNER)


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise ValueError(f"`{name}` is {value}; pass a number in (0, 1)")
