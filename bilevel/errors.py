"""The errors and the warning that the library raises, in one place.

Every message names the argument, the finding and the cure.
"""

from __future__ import annotations

__all__ = [
    "BilevelError",
    "BilevelWarning",
    "DependenceError",
    "InPlaceError",
    "NotDifferentiableError",
    "ObjectiveError",
    "RandomnessError",
    "SolveError",
    "StructureError",
]


class BilevelError(Exception):
    """Base of every error that is the library's own."""


class BilevelWarning(UserWarning):
    """Base of every warning that is the library's own."""


class ObjectiveError(BilevelError, ValueError):
    """A user's function returned something of the wrong kind, shape, dtype or device."""


class RandomnessError(ObjectiveError):
    """A user's function draws random numbers, so that each evaluation is another objective."""


class InPlaceError(ObjectiveError):
    """A user's function changes one of its arguments in place."""


class DependenceError(BilevelError, ValueError):
    """Something does not depend on `outer` that must, or its gradient would be lost in silence."""


class StructureError(BilevelError, ValueError):
    """A solver needs a structure of the inner problem that the problem does not declare."""


class NotDifferentiableError(BilevelError, ValueError):
    """An inner solver's step cannot be differentiated, but the method differentiates it."""


class SolveError(BilevelError, RuntimeError):
    """No usable solution was found; the message names the tasks and their status."""
