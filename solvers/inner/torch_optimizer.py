r"""Any `torch.optim` optimizer as an inner solver.

Elementwise optimizers run on all tasks at once, on the flat ``[tasks, n]`` tensor: each entry is
updated from its own gradient, so that a stack is the same as each task alone. Optimizers that mix
the entries of a tensor run task by task, on leaves of the user's shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.errors import NotDifferentiableError
from bilevel.flat import FlatProblem
from bilevel.inner_solver import InnerSolver
from bilevel.kernels import Precision
from bilevel.pytree import PyTree, tree_leaves, tree_map
from bilevel.registry import INNER_SOLVERS

__all__ = ["TorchOptimizer"]

_ELEMENTWISE = (
    "SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adagrad", "Adadelta",
    "ASGD",
)  # fmt: skip
# Adamax and Rprop raise in-place errors when differentiated, in every release that we tried.
_DIFFERENTIABLE = (
    "SGD",
    "Adam",
    "AdamW",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Adagrad",
    "Adadelta",
    "ASGD",
)


@INNER_SOLVERS.register("torch-optimizer")
@dataclass(frozen=True, init=False)
class TorchOptimizer(InnerSolver):
    """A `torch.optim` optimizer on the regularised inner objective.

    Args:
        cls: The optimizer class, or its name in `torch.optim`. Elementwise ones of PyTorch (SGD,
            Adam, RMSprop, …) run on all tasks at once; any other (LBFGS, Muon, Adafactor, your
            own) runs task by task.
        max_steps: The most steps.
        tol: Stop a task once ‖∂_z G‖ ≤ tol, looked at every 10 steps; None: take all steps.
        **options: Passed to ``cls``, such as ``lr``.

    Raises:
        ValueError: An option is unknown to ``cls``, asks for weight decay (a second regularizer,
            hidden from the hypergradient: use `Proximal`) or for ascent.

    Example:
        >>> import torch
        >>> TorchOptimizer(torch.optim.Adam, max_steps=50, lr=0.1)
        TorchOptimizer(cls=Adam, max_steps=50, tol=None, lr=0.1)
    """

    cls: type[torch.optim.Optimizer]
    max_steps: int
    tol: float | None
    options: Mapping[str, Any] = field(hash=False)

    check_every: ClassVar[int] = 10

    def __init__(
        self,
        cls: type[torch.optim.Optimizer] | str,
        max_steps: int = 100,
        tol: float | None = None,
        **options: Any,
    ) -> None:
        if isinstance(cls, str):
            cls = getattr(torch.optim, cls, cls)
        set_field = object.__setattr__
        set_field(self, "cls", cls)
        set_field(self, "max_steps", max_steps)
        set_field(self, "tol", tol)
        set_field(self, "options", dict(options))
        super().__post_init__()
        if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
            raise ValueError(
                f"`cls` is {cls!r}; pass a class such as torch.optim.Adam, or its name"
            )
        self._check_options()

    def _check_options(self) -> None:
        # An optimizer of one number tells whether the options fit, and what the defaults are.
        shape = (1, 1) if self.cls.__name__ == "Muon" else (1,)
        try:
            defaults = self._build([torch.zeros(shape, requires_grad=True)], {}).defaults
        except TypeError as error:
            raise ValueError(f"{self.cls.__name__} does not take these options: {error}") from error
        decay = defaults.get("weight_decay") or 0.0
        if decay != 0.0:
            raise ValueError(
                f"{self.cls.__name__}'s weight_decay is {decay}, a second regularizer of which the "
                "hypergradient would know nothing; pass weight_decay=0.0 and state the regularizer "
                "in the problem: Proximal(strength, center)"
            )
        if defaults.get("maximize"):
            raise ValueError("`maximize` is set, but an inner solver minimises; leave it out")

    @property
    def elementwise(self) -> bool:
        """Whether each entry is updated from its own gradient alone."""
        return _builtin(self.cls) and self.cls.__name__ in _ELEMENTWISE

    def require_differentiable(self) -> None:
        """Raise unless the optimizer's step can be differentiated correctly.

        Raises:
            NotDifferentiableError: It cannot.
        """
        name = self.cls.__name__
        if not (_builtin(self.cls) and name in _DIFFERENTIABLE):
            raise NotDifferentiableError(
                f"torch.optim.{name} cannot be unrolled; use an implicit method such as "
                f"ImplicitCG, or one of {', '.join(_DIFFERENTIABLE)}"
            )
        if name == "SGD" and self.options.get("momentum", 0.0):
            raise NotDifferentiableError(
                "torch.optim.SGD detaches its first momentum buffer, so that unrolling it would "
                "be 16-20 % wrong in silence; use GradientDescent(lr, max_steps, momentum=...)"
            )

    def require_precision(
        self, precision: Precision, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Raise unless steps in this precision are sound; those with a closure are not.

        Raises:
            ValueError: They are not.
        """
        if precision != "full" and _needs_closure(self.cls):
            raise ValueError(
                f"`precision` is {precision!r}, but torch.optim.{self.cls.__name__} evaluates the "
                "inner objective within a step and compares the values, which rounding makes "
                "alike; use GradientDescent, or pass precision='full'"
            )
        super().require_precision(precision, dtype, device)

    def _init(self, flat: FlatProblem, z: Tensor) -> PyTree:
        if self.elementwise:
            return {}
        optimizers = []
        for i in range(flat.count):
            tree = flat.vector.unflatten(z[i])
            leaves = [x.detach().clone().requires_grad_() for x in tree_leaves(tree)]
            optimizers.append((leaves, self._build(leaves, {})))
        return [_PerTask(optimizers)]

    def _step(self, flat: FlatProblem, z: Tensor, state: PyTree) -> tuple[Tensor, PyTree]:
        if self.elementwise:
            return self._step_all(flat, z, state)
        return self._step_each(flat, z, state[0]), state

    def _step_all(self, flat: FlatProblem, z: Tensor, state: PyTree) -> tuple[Tensor, PyTree]:
        # The optimizer is rebuilt around its state, which makes a step a function of (z, state).
        gradient = flat.gradient(z)
        # `step` writes in place: give it copies, in the graph where there is one.
        parameter = z.clone()
        options = {"differentiable": True} if flat.differentiable else {}
        optimizer = self._build([parameter], options)
        copy = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, state)
        if copy:
            optimizer.state[parameter] = copy
        parameter.grad = gradient if flat.differentiable else gradient.detach()
        with torch.set_grad_enabled(flat.differentiable), _scalars_in(z.dtype):
            optimizer.step()
        return parameter, dict(optimizer.state[parameter])

    def _step_each(self, flat: FlatProblem, z: Tensor, runs: _PerTask) -> Tensor:
        rows = []
        for i, (leaves, optimizer) in enumerate(runs.optimizers):
            one = flat.select(torch.tensor([i], device=flat.device))
            with torch.no_grad():
                for leaf, value in zip(
                    leaves, tree_leaves(flat.vector.unflatten(z[i])), strict=True
                ):
                    leaf.copy_(value)

            def closure(one: FlatProblem = one, leaves: list[Tensor] = leaves) -> Tensor:
                point = torch.cat([leaf.detach().reshape(-1) for leaf in leaves]).unsqueeze(0)
                value, gradient = one.value_and_gradient(point)
                parts = tree_leaves(flat.vector.unflatten(gradient[0].detach()))
                for leaf, part in zip(leaves, parts, strict=True):
                    leaf.grad = part.clone()
                return value[0].detach()

            with torch.enable_grad():
                if _needs_closure(self.cls):
                    optimizer.step(closure)  # type: ignore[arg-type]
                else:
                    closure()
                    optimizer.step()
            rows.append(torch.cat([leaf.detach().reshape(-1) for leaf in leaves]))
        return torch.stack(rows)

    def _build(self, parameters: list[Tensor], extra: dict[str, Any]) -> torch.optim.Optimizer:
        return self.cls(parameters, **{**self.options, **extra})

    def __repr__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return (
            f"TorchOptimizer(cls={self.cls.__name__}, max_steps={self.max_steps}, tol={self.tol}"
            f"{options})"
        )


@contextmanager
def _scalars_in(dtype: torch.dtype) -> Iterator[None]:
    """Let the optimizer keep its step count, hence its bias corrections, in ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _PerTask:
    """One optimizer per task with its leaves; opaque to pytrees."""

    def __init__(self, optimizers: list[tuple[list[Tensor], torch.optim.Optimizer]]) -> None:
        self.optimizers = optimizers


def _builtin(cls: type[torch.optim.Optimizer]) -> bool:
    return getattr(torch.optim, cls.__name__, None) is cls


def _needs_closure(cls: type[torch.optim.Optimizer]) -> bool:
    parameter = inspect.signature(cls.step).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty
