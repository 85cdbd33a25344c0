"""Interchangeable solvers: inner and linear solvers, hypergradient methods, preconditioners."""

from .hypergradient import (
    DenseExact,
    FirstOrder,
    Implicit,
    ImplicitCG,
    NeumannSeries,
    Unrolled,
)
from .inner import (
    LBFGS,
    BacktrackingDescent,
    ClosedForm,
    GradientDescent,
    HessianFree,
    ProximalGradient,
    TorchOptimizer,
)
from .linear import (
    CG,
    GMRES,
    MINRES,
    BiCGStab,
    Dense,
    Neumann,
    NormalCG,
    Nystrom,
    Richardson,
    SciPy,
)
from .preconditioner import (
    JacobiPreconditioner,
    NystromPreconditioner,
    RecyclingPreconditioner,
    SecantPreconditioner,
)

__all__ = [
    "CG",
    "GMRES",
    "LBFGS",
    "MINRES",
    "BacktrackingDescent",
    "BiCGStab",
    "ClosedForm",
    "Dense",
    "DenseExact",
    "FirstOrder",
    "GradientDescent",
    "HessianFree",
    "Implicit",
    "ImplicitCG",
    "JacobiPreconditioner",
    "Neumann",
    "NeumannSeries",
    "NormalCG",
    "Nystrom",
    "NystromPreconditioner",
    "ProximalGradient",
    "RecyclingPreconditioner",
    "Richardson",
    "SciPy",
    "SecantPreconditioner",
    "TorchOptimizer",
    "Unrolled",
]
