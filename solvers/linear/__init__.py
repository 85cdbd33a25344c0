"""Linear solvers: A v = b for stacked tasks, from products alone."""

from .bicgstab import BiCGStab
from .cg import CG
from .dense import Dense
from .gmres import GMRES
from .minres import MINRES
from .neumann import Neumann
from .normal_cg import NormalCG
from .nystrom import Nystrom
from .richardson import Richardson
from .scipy import SciPy

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "BiCGStab",
    "Dense",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "Richardson",
    "SciPy",
]
