"""Inner solvers: they minimise the inner objective of stacked tasks."""

from .backtracking_descent import BacktrackingDescent
from .closed_form import ClosedForm
from .gradient_descent import GradientDescent
from .hessian_free import HessianFree
from .lbfgs import LBFGS
from .proximal_gradient import ProximalGradient
from .torch_optimizer import TorchOptimizer

__all__ = [
    "LBFGS",
    "BacktrackingDescent",
    "ClosedForm",
    "GradientDescent",
    "HessianFree",
    "ProximalGradient",
    "TorchOptimizer",
]
