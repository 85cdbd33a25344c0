"""Interchangeable solvers: inner solvers, hypergradient methods and linear solvers."""

from .hypergradient import (
    DenseExact,
    FirstOrder,
    Implicit,
    ImplicitCG,
    NeumannSeries,
    Unrolled,
)
from .inner import LBFGS, ClosedForm, GradientDescent, TorchOptimizer
from .linear import CG, Dense, Neumann

__all__ = [
    "CG",
    "LBFGS",
    "ClosedForm",
    "Dense",
    "DenseExact",
    "FirstOrder",
    "GradientDescent",
    "Implicit",
    "ImplicitCG",
    "Neumann",
    "NeumannSeries",
    "TorchOptimizer",
    "Unrolled",
]
