"""Bilevel optimization in PyTorch: hypergradients that are correct and say how correct.

Define a problem, choose an inner solver, a hypergradient method and a linear solver, and call
`hypergradient`.
"""

from .accuracy import (
    AccuracyController,
    AccuracyPolicy,
    ErrorDrivenAccuracy,
    FixedAccuracy,
    ScheduledAccuracy,
    Tolerances,
)
from .argmin import argmin
from .bounded import minimize_bounded
from .certificate import Smoothness
from .check import HypergradientCheck, LeafCheck, assert_hypergradient, check_hypergradient
from .compare import compare
from .comparison import Comparison, MethodResult
from .doctor import Diagnosis, Finding, doctor
from .errors import (
    BilevelError,
    BilevelWarning,
    DependenceError,
    InPlaceError,
    NotDifferentiableError,
    ObjectiveError,
    RandomnessError,
    SolveError,
    StructureError,
)
from .flat import FlatProblem
from .hypergradient import hypergradient
from .inner_solver import InnerReport, InnerSolver
from .kernels import Kernels
from .level import Level, Variables
from .linear_solver import LinearSolution, LinearSolver
from .method import Estimate, HypergradientMethod, ImplicitMethod, Start
from .minimize import Minimum, OuterStatus, OuterStep, minimize
from .multilevel import MultiLevelGradient, MultiLevelProblem
from .norms import exact_norms
from .operator import Operator, SecantPairs
from .preconditioner import Preconditioner
from .problem import BilevelProblem, Structure, problem_from
from .record import Record
from .regularizer import Proximal
from .result import Diagnostics, Hypergradient, SolveReport, State
from .solve import Evaluation, InnerSolution, evaluate, solve_inner
from .stateless import stateless
from .status import Status
from .stream import Stream
from .task import Task, TaskBatch
from .trainer import Trainer, Training

__version__ = "0.1.0"

__all__ = [
    "AccuracyController",
    "AccuracyPolicy",
    "BilevelError",
    "BilevelProblem",
    "BilevelWarning",
    "Comparison",
    "DependenceError",
    "Diagnosis",
    "Diagnostics",
    "ErrorDrivenAccuracy",
    "Estimate",
    "Evaluation",
    "Finding",
    "FixedAccuracy",
    "FlatProblem",
    "Hypergradient",
    "HypergradientCheck",
    "HypergradientMethod",
    "ImplicitMethod",
    "InPlaceError",
    "InnerReport",
    "InnerSolution",
    "InnerSolver",
    "Kernels",
    "LeafCheck",
    "Level",
    "LinearSolution",
    "LinearSolver",
    "MethodResult",
    "Minimum",
    "MultiLevelGradient",
    "MultiLevelProblem",
    "NotDifferentiableError",
    "ObjectiveError",
    "Operator",
    "OuterStatus",
    "OuterStep",
    "Preconditioner",
    "Proximal",
    "RandomnessError",
    "Record",
    "ScheduledAccuracy",
    "SecantPairs",
    "Smoothness",
    "SolveError",
    "SolveReport",
    "Start",
    "State",
    "Status",
    "Stream",
    "Structure",
    "StructureError",
    "Task",
    "TaskBatch",
    "Tolerances",
    "Trainer",
    "Training",
    "Variables",
    "argmin",
    "assert_hypergradient",
    "check_hypergradient",
    "compare",
    "doctor",
    "evaluate",
    "exact_norms",
    "hypergradient",
    "minimize",
    "minimize_bounded",
    "problem_from",
    "solve_inner",
    "stateless",
]
