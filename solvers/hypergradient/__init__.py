"""Hypergradient methods: how dF/dx is computed from the inner solution."""

from .dense_exact import DenseExact
from .first_order import FirstOrder
from .implicit import Implicit
from .implicit_cg import ImplicitCG
from .neumann_series import NeumannSeries
from .unrolled import Unrolled

__all__ = ["DenseExact", "FirstOrder", "Implicit", "ImplicitCG", "NeumannSeries", "Unrolled"]
