"""Linear solvers: A v = b for stacked tasks, from products alone."""

from .cg import CG
from .dense import Dense
from .neumann import Neumann

__all__ = ["CG", "Dense", "Neumann"]
