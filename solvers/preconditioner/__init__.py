"""Preconditioners: cheap stand-ins for the inverse of a matrix, which save steps."""

from .jacobi import JacobiPreconditioner
from .nystrom import NystromPreconditioner
from .recycling import RecyclingPreconditioner
from .secant import SecantPreconditioner

__all__ = [
    "JacobiPreconditioner",
    "NystromPreconditioner",
    "RecyclingPreconditioner",
    "SecantPreconditioner",
]
