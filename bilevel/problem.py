"""What a bilevel problem is: the abstract base, and a problem made from plain functions."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from .errors import ObjectiveError
from .pytree import PyTree
from .regularizer import Proximal

if TYPE_CHECKING:
    from .certificate import Smoothness
    from .task import Task

__all__ = ["BilevelProblem", "Structure", "problem_from"]


class Structure(Enum):
    """What a problem promises about the Jacobian of its stationarity (the inner Hessian)."""

    GENERAL = "no promise: equilibria and games"
    SYMMETRIC = "symmetric: the gradient of an objective"
    POSITIVE_DEFINITE = "symmetric and positive definite: a strongly convex inner objective"

    def satisfies(self, needed: Structure) -> bool:
        """Whether this promise is at least as strong as ``needed``."""
        order = list(Structure)
        return order.index(self) >= order.index(needed)


class BilevelProblem(ABC):
    r"""A bilevel problem, written for one task on pytrees.

    $$\min_x f(x, z^\star(x)) \quad\text{with}\quad z^\star(x) = \arg\min_z g(x, z) + r(x, z)$$

    Subclass it and write `outer_objective` and one of: `inner_objective`; `predict` and `loss`;
    or, for an equilibrium, `stationarity`. Objectives are deterministic functions of their
    arguments; whatever gradients flow through stands in ``outer``.

    Attributes:
        regularizer: The proximal regularizer $r$, or None.
        structure: What the problem promises about its inner Hessian; a linear solver that needs
            more refuses early.
        stacking: How functions of one task are applied to stacked tasks: ``"auto"`` (`torch.vmap`,
            or a loop where that is refused, which is said once), ``"vmap"`` or ``"loop"``.
    """

    regularizer: Proximal | None = None
    structure: Structure = Structure.SYMMETRIC
    stacking: Literal["auto", "vmap", "loop"] = "auto"

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "stationarity" in cls.__dict__ and "structure" not in cls.__dict__:
            cls.structure = Structure.GENERAL

    def inner_objective(self, inner: PyTree, outer: PyTree, batch: PyTree) -> Tensor:
        """The inner objective g, a 0-d tensor, without the regularizer.

        Default: ``loss(predict(inner, outer, batch), outer, batch)``.
        """
        return self.loss(self.predict(inner, outer, batch), outer, batch)

    def outer_objective(self, inner: PyTree, outer: PyTree, batch: PyTree) -> Tensor:
        """The outer objective f, a 0-d tensor."""
        raise ObjectiveError(f"{type(self).__name__} defines no `outer_objective`; write it")

    def initial_inner(self, outer: PyTree, batch: PyTree) -> PyTree:
        """Where the inner solver starts; default: the regularizer's center."""
        if self.regularizer is None:
            raise ObjectiveError(
                f"{type(self).__name__} has no regularizer, so there is no center to start from; "
                "define `initial_inner(outer, batch)`"
            )
        return self.regularizer.center_tree(outer)

    def stationarity(self, inner: PyTree, outer: PyTree, batch: PyTree) -> PyTree:
        """What vanishes at the inner solution, a pytree like ``inner``, without the regularizer.

        Default: the gradient of `inner_objective` in ``inner`` (the library differentiates the sum
        over tasks itself and does not call this). An equilibrium returns
        ``inner − Φ(inner, outer)``.
        """
        raise ObjectiveError(
            f"{type(self).__name__} states its inner problem by `inner_objective`; its "
            "stationarity is taken by automatic differentiation"
        )

    def predict(self, inner: PyTree, outer: PyTree, batch: PyTree) -> PyTree:
        """The model's prediction; with `loss` it gives the inner objective."""
        raise ObjectiveError(
            f"{type(self).__name__} defines no inner problem; write `inner_objective`, or "
            "`predict` and `loss`, or `stationarity`"
        )

    def loss(self, prediction: PyTree, outer: PyTree, batch: PyTree) -> Tensor:
        """The loss of a prediction, a 0-d tensor; with `predict` it gives the inner objective."""
        raise ObjectiveError(
            f"{type(self).__name__} defines `predict` but no `loss`; write both, or "
            "`inner_objective`"
        )

    def smoothness(self, outer: PyTree, task: Task) -> Smoothness:
        """Constants from which ``error_bound=True`` certifies a hypergradient's error.

        Args:
            outer: The outer variable.
            task: One task with its data.

        Raises:
            ObjectiveError: The problem declares none.
        """
        raise ObjectiveError(
            f"{type(self).__name__} declares no constants, so no error can be certified; write "
            "`smoothness(outer, task)`, or ask for `error_estimate=True`, which needs none"
        )

    def metrics(self, inner: PyTree, outer: PyTree, batch: PyTree) -> dict[str, Tensor]:
        """Quantities to report for a task, 0-d tensors by name, on the outer batch."""
        return {}

    def evaluate(
        self, inner: PyTree, outer: PyTree, batch: PyTree
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`outer_objective` and `metrics` at once; override where they share a prediction."""
        return self.outer_objective(inner, outer, batch), self.metrics(inner, outer, batch)

    @property
    def shares_evaluation(self) -> bool:
        """`evaluate` is cheaper than its two parts, neither of which was changed after it."""
        evaluate = self._depth("evaluate")
        parts = min(self._depth("outer_objective"), self._depth("metrics"))
        own = "evaluate" in self.__dict__
        return evaluate <= parts and (own or type(self).evaluate is not BilevelProblem.evaluate)

    def _depth(self, name: str) -> int:
        """How many classes up from the instance a method is defined; 0: on the instance."""
        homes = [self, *type(self).__mro__]
        return next(i for i, home in enumerate(homes) if name in home.__dict__)

    @property
    def has_start(self) -> bool:
        """The problem says where its inner solver starts."""
        overridden = type(self).initial_inner is not BilevelProblem.initial_inner
        return overridden or "initial_inner" in self.__dict__ or self.regularizer is not None

    @property
    def has_prediction(self) -> bool:
        """The inner objective is stated by `predict` and `loss`."""
        stated = type(self).inner_objective is BilevelProblem.inner_objective
        stated = stated and "inner_objective" not in self.__dict__
        return stated and type(self).predict is not BilevelProblem.predict

    @property
    def is_equilibrium(self) -> bool:
        """The inner problem is stated by `stationarity`, not by an objective."""
        return type(self).stationarity is not BilevelProblem.stationarity


class _FunctionProblem(BilevelProblem):
    """A problem made from functions; see `problem_from`."""

    def __init__(
        self,
        functions: dict[str, Callable[..., object]],
        regularizer: Proximal | None,
        structure: Structure,
    ) -> None:
        self.regularizer = regularizer
        self.structure = structure
        self._names = {name: getattr(f, "__name__", repr(f)) for name, f in functions.items()}
        # Instance attributes shadow the methods of the same names.
        self.__dict__.update(functions)

    @property
    def is_equilibrium(self) -> bool:
        return "stationarity" in self.__dict__

    def __repr__(self) -> str:
        parts = [f"{key}={value}" for key, value in self._names.items()]
        if self.regularizer is not None:
            parts.append(f"regularizer={self.regularizer}")
        return f"problem_from({', '.join(parts)})"


def problem_from(
    inner_objective: Callable[[PyTree, PyTree, PyTree], Tensor] | None,
    outer_objective: Callable[[PyTree, PyTree, PyTree], Tensor],
    regularizer: Proximal | None = None,
    initial_inner: Callable[[PyTree, PyTree], PyTree] | None = None,
    *,
    stationarity: Callable[[PyTree, PyTree, PyTree], PyTree] | None = None,
    metrics: Callable[[PyTree, PyTree, PyTree], dict[str, Tensor]] | None = None,
    structure: Structure | None = None,
) -> BilevelProblem:
    """Make a `BilevelProblem` from functions of ``(inner, outer, batch)``.

    Args:
        inner_objective: g, returns a 0-d tensor; None if ``stationarity`` is given.
        outer_objective: f, returns a 0-d tensor.
        regularizer: The proximal regularizer, or None.
        initial_inner: Function of ``(outer, batch)``; default: the regularizer's center.
        stationarity: For an equilibrium: what vanishes at the solution, a pytree like ``inner``.
        metrics: Function that returns 0-d tensors by name.
        structure: The promise about the inner Hessian; default SYMMETRIC, or GENERAL for an
            equilibrium.

    Raises:
        ObjectiveError: Both or neither of ``inner_objective`` and ``stationarity`` are given, or
            there is nowhere to start from.

    Example:
        >>> import torch
        >>> problem = problem_from(
        ...     lambda w, x, batch: ((w - batch) ** 2).sum(),
        ...     lambda w, x, batch: (w**2).sum(),
        ...     Proximal(1.0),
        ... )
        >>> problem.regularizer
        Proximal(strength=1.0, center=None)
    """
    if (inner_objective is None) == (stationarity is None):
        raise ObjectiveError(
            "pass exactly one of `inner_objective` and `stationarity`: the inner problem is either "
            "minimised or solved"
        )
    if regularizer is None and initial_inner is None:
        raise ObjectiveError(
            "there is nowhere to start from: pass `initial_inner`, or a `regularizer` whose center "
            "is the start"
        )
    functions = {
        "inner_objective": inner_objective,
        "outer_objective": outer_objective,
        "initial_inner": initial_inner,
        "stationarity": stationarity,
        "metrics": metrics,
    }
    given = {name: function for name, function in functions.items() if function is not None}
    for name, function in given.items():
        if not callable(function):
            raise ObjectiveError(f"`{name}` is a {type(function).__name__}; pass a function")
    if structure is None:
        structure = Structure.SYMMETRIC if stationarity is None else Structure.GENERAL
    return _FunctionProblem(given, regularizer, structure)
