"""A problem on stacked tasks, as functions of one flat inner tensor ``[tasks, n]``.

Solvers see this and nothing of pytrees, objectives or stacking. The outer variable stays a tuple
of leaves, shared by all tasks, or one copy per task where per-task gradients are asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .compiled import Gradient, compiled_gradient
from .errors import InPlaceError, ObjectiveError
from .graph import fresh_leaf
from .kernels import Kernels, Precision
from .problem import BilevelProblem
from .pytree import (
    PyTree,
    VectorSpec,
    check_floating,
    leaf_names,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)
from .regularizer import Proximal, check_strength
from .rows import norm, ones_for, step_precision
from .stacking import Stacking
from .stream import LINEARISED, Stream
from .task import TaskBatch

__all__ = ["FlatProblem", "Outer"]


@dataclass(frozen=True)
class Outer:
    """The outer variable: leaves and their structure, shared or one copy per task."""

    leaves: tuple[Tensor, ...]
    spec: Any
    per_task: bool = False

    @classmethod
    def of(cls, tree: PyTree) -> Outer:
        """Read a pytree of floating tensors.

        Raises:
            ValueError: There is no leaf, or a leaf is no floating tensor; the leaf is named.
        """
        leaves, spec = tree_flatten(tree)
        if not leaves:
            raise ValueError("`outer` holds no tensor; pass at least one floating leaf")
        check_floating(leaves, tree, "outer")
        return cls(tuple(leaves), spec)

    @property
    def count(self) -> int:
        """Number of leaves."""
        return int(self.spec.num_leaves)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the leaves, as a user would reach them."""
        return tuple(leaf_names(tree_unflatten(range(self.count), self.spec), "outer"))

    @property
    def tree(self) -> PyTree:
        """The pytree."""
        return tree_unflatten(self.leaves, self.spec)

    def with_leaves(self, leaves: Sequence[Tensor]) -> Outer:
        """The same variable with other leaves."""
        return Outer(tuple(leaves), self.spec, self.per_task)

    def detached(self) -> Outer:
        """Without gradient."""
        return self.with_leaves([leaf.detach() for leaf in self.leaves])

    def cloned(self) -> Outer:
        """Copies that share no memory with these."""
        return self.with_leaves([leaf.detach().clone() for leaf in self.leaves])

    def differentiable(self) -> Outer:
        """Fresh leaves that require grad, sharing memory with these."""
        return self.with_leaves([leaf.detach().requires_grad_() for leaf in self.leaves])

    def expanded(self, count: int) -> Outer:
        """One copy per task (a view until a gradient is taken)."""
        leaves = [leaf.expand(count, *leaf.shape) for leaf in self.leaves]
        return replace(self, leaves=tuple(leaves), per_task=True)


@dataclass(frozen=True)
class FlatProblem:
    """One bilevel problem with its outer variable and stacked tasks.

    Attributes:
        problem: The user's problem.
        outer: The outer variable, as ``outer.tree`` and its ``outer.leaves``; they require grad
            where ``differentiable``.
        tasks: The stacked tasks.
        vector: Layout of the inner variable of one task.
        stacking: How functions of one task are applied to all.
        start: The initial inner point ``[tasks, n]``, detached.
        start_is_constant: Whether it was given, rather than a function of ``outer``.
        step: The inner step whose batch is used; `LINEARISED` for residuals and linearisation.
        differentiable: Whether gradients keep their graph.
        kernels: How gradients and products are computed.
        precision: Of gradients without a graph; that of `kernels` within inner steps alone.
        counts: Evaluations so far, shared by all copies: ``gradients``, ``products``, ``values``,
            each counted once per task.
        notes: ``first_residual``: norm of the first stationarity evaluated, ``[tasks]``.
    """

    problem: BilevelProblem
    outer: Outer
    tasks: TaskBatch
    vector: VectorSpec
    stacking: Stacking
    start: Tensor
    start_is_constant: bool = False
    step: int = LINEARISED
    differentiable: bool = False
    kernels: Kernels = field(default_factory=Kernels)
    precision: Precision = "full"
    counts: Counter[str] = field(default_factory=Counter)
    notes: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        problem: BilevelProblem,
        outer: Outer,
        tasks: TaskBatch,
        inner: PyTree = None,
        kernels: Kernels | None = None,
    ) -> FlatProblem:
        """Lay out the problem: find the inner variable's structure from its initial point.

        Args:
            problem: The bilevel problem.
            outer: The outer variable.
            tasks: The stacked tasks.
            inner: A constant point to start from instead of `initial_inner`, with a leading
                dimension of tasks.
            kernels: How gradients and products are computed; None: `Kernels()`.
        """
        stacking = stacking_of(problem)
        # Until the problem was looked at once, a function may still write to its arguments.
        trial = outer.detached() if stacking.probed else outer.cloned()
        versions = [leaf._version for leaf in trial.leaves]
        if inner is None:
            start, vector = _initial_inner(problem, trial, tasks, stacking)
        else:
            start, vector = _flatten_stacked(inner, "inner")
            if len(start) != tasks.count:
                raise ValueError(
                    f"`inner` holds {len(start)} tasks but `task` holds {tasks.count}; pass one "
                    "starting point per task, stacked along dimension 0"
                )
            start = start.detach()
        flat = cls(
            problem,
            trial,
            tasks,
            vector,
            stacking,
            start,
            start_is_constant=inner is not None,
            kernels=kernels or Kernels(),
        )
        if problem.regularizer is not None and not stacking.probed:
            # Checked against the inner variable here, not in a solver.
            flat._strength, flat._center  # noqa: B018
        if [leaf._version for leaf in trial.leaves] != versions:
            raise InPlaceError(
                "`initial_inner` or the regularizer changes `outer` in place; write to a copy: "
                "`.clone()` it first"
            )
        # Without copies, what is known of center and strength stays known.
        return flat if stacking.probed else flat.with_outer(outer.detached(), differentiable=False)

    # Size and place

    @property
    def count(self) -> int:
        """Number of tasks."""
        return self.tasks.count

    @property
    def n(self) -> int:
        """Length of one task's inner variable."""
        return self.vector.n

    @property
    def device(self) -> torch.device:
        """Device of the inner variable."""
        return self.vector.device

    # Copies

    def with_outer(self, outer: Outer, *, differentiable: bool) -> FlatProblem:
        """The same problem at another outer variable."""
        return replace(self, outer=outer, differentiable=differentiable)

    def plain(self) -> FlatProblem:
        """The same problem without graphs."""
        if not (self.differentiable or any(leaf.requires_grad for leaf in self.outer.leaves)):
            return self
        return self.with_outer(self.outer.detached(), differentiable=False)

    def select(self, index: Tensor) -> FlatProblem:
        """The tasks at ``index``."""
        outer = self.outer
        if outer.per_task:
            outer = outer.with_leaves([leaf[index.to(leaf.device)] for leaf in outer.leaves])
        start = self.start[index.to(self.device)]
        tasks = self.tasks.select(index)
        return replace(self, outer=outer, tasks=tasks, start=start, notes={})

    def at(self, step: int) -> FlatProblem:
        """The problem of one inner step: with the batch that a `Stream` draws for it."""
        return replace(self, step=step) if isinstance(self.tasks.inner_batch, Stream) else self

    def stepping(self) -> FlatProblem:
        """The problem as inner steps evaluate it: in the precision that `kernels` allows them."""
        asked = self.kernels.precision
        return self if self.precision == asked else replace(self, precision=asked)

    def not_compiled(self) -> FlatProblem:
        """The problem without the compiler, which takes the outer variable for a constant."""
        return replace(self, kernels=replace(self.kernels, compile=False))

    def drawn(self) -> FlatProblem:
        """The problem with the batch of its step in the place of a `Stream`, drawn once."""
        if not isinstance(self.tasks.inner_batch, Stream):
            return self
        return replace(self, tasks=replace(self.tasks, inner_batch=self.batch))

    def expanded(self) -> FlatProblem:
        """With one copy of the outer variable per task."""
        return replace(self, outer=self.outer.expanded(self.count))

    # Functions of z, [tasks, n]

    def initial(self) -> Tensor:
        """The initial inner point ``[tasks, n]``, with its graph where differentiable."""
        if self.start_is_constant or not self.differentiable:
            return self.start
        return _initial_inner(self.problem, self.outer, self.tasks, self.stacking)[0]

    def value(self, z: Tensor) -> Tensor:
        """Inner objective with the regularizer ``[tasks]``; NaN for an equilibrium."""
        if self.problem.is_equilibrium:
            return z.new_full((self.count,), float("nan"))
        self.counts["values"] += self.count
        value = self._objective(z)
        if self._strength is None:
            return value
        return value + 0.5 * (self._strength * (z - self._center) ** 2).sum(-1)

    def gradient(self, z: Tensor) -> Tensor:
        """The stationarity ∂_z G ``[tasks, n]``; it keeps its graph where ``differentiable``."""
        return self._value_and_gradient(z, regularized=False)[1]

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """G ``[tasks]`` (detached; NaN for an equilibrium) and its stationarity ``[tasks, n]``."""
        return self._value_and_gradient(z, regularized=True)

    def _value_and_gradient(self, z: Tensor, *, regularized: bool) -> tuple[Tensor, Tensor]:
        """With the regularizer in the value, too, where asked for: that is one more pass over z."""
        self.counts["gradients"] += self.count
        if self.differentiable and not z.requires_grad:
            z = fresh_leaf(z)
        if not self.differentiable:
            with step_precision(self.precision, self.device):
                tree, leaves = self.cut(z)
                slopes, value = self.slopes(tree, leaves, keep_graph=False)
            # Rounded or not, it has the dtype of the point, which a solver adds it to.
            gradient = self.joined(slopes).to(z.dtype)
        elif self.problem.is_equilibrium:
            with torch.enable_grad():
                gradient = self._stationarity(z)
            value = z.new_full((self.count,), float("nan"))
        else:
            # vmap sees the objective only; differentiating its sum from outside is exact, where
            # reverse-differentiating vmap(grad) is wrong for normalisation layers.
            with torch.enable_grad():
                values = self._objective(z)
                (gradient,) = torch.autograd.grad(values, z, ones_for(values), create_graph=True)
            value = values.detach()
        if self._strength is not None:
            with torch.set_grad_enabled(self.differentiable):
                offset = z - self._center
                gradient = torch.addcmul(gradient, self._strength, offset)
            if regularized:
                with torch.no_grad():
                    value = value + 0.5 * (self._strength * offset**2).sum(-1)
        if "first_residual" not in self.notes:
            self.notes["first_residual"] = norm(gradient.detach())
        return value, gradient

    def slopes(
        self, tree: PyTree, leaves: list[Tensor], *, keep_graph: bool
    ) -> tuple[list[Tensor], Tensor]:
        """F without the regularizer, leaf by leaf, and g ``[tasks]``, detached; NaN for equilibria.

        Args:
            tree: The inner variable.
            leaves: Its leaves, which require grad (`cut`).
            keep_graph: Whether F has a graph.
        """
        if self.kernels.compile:
            with torch.set_grad_enabled(keep_graph):
                values, slopes = self.compiled(leaves)
        elif self.problem.is_equilibrium:
            with torch.set_grad_enabled(keep_graph):
                found = tree_leaves(
                    self.vector.matched(self.call("stationarity", tree, self.batch))
                )
                slopes = [one.reshape(x.shape) for one, x in zip(found, leaves, strict=True)]
            values = leaves[0].new_full((self.count,), float("nan"))
        else:
            with torch.enable_grad():
                values = self.call("inner_objective", tree, self.batch)
                slopes = list(
                    torch.autograd.grad(
                        values,
                        leaves,
                        ones_for(values),
                        create_graph=keep_graph,
                        materialize_grads=True,
                    )
                )
        return slopes, values.detach()

    def outer_value(self, z: Tensor) -> Tensor:
        """Outer objective f ``[tasks]``."""
        self.counts["values"] += self.count
        return self._scalar("outer_objective", z, self.tasks.outer_batch)

    def evaluate(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The outer objective ``[tasks]``; and the metrics, where both come from one prediction."""
        return self.evaluate_at(self._tree(z))

    def evaluate_at(self, inner: PyTree) -> tuple[Tensor, dict[str, Tensor] | None]:
        """`evaluate` at leaves of the inner variable."""
        self.counts["values"] += self.count
        batch = self.tasks.outer_batch
        if not self.problem.shares_evaluation:
            return self.call("outer_objective", inner, batch), None
        found = self.call("evaluate", inner, batch, known_as="outer_objective")
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)):
            raise ObjectiveError(
                f"`evaluate` returned a {type(found).__name__}; return the outer objective, a 0-d "
                "tensor, and a dict of 0-d tensors"
            )
        value, metrics = found
        return value, {name: one.detach() for name, one in metrics.items()}

    def prediction(self, z: Tensor) -> PyTree:
        """What `predict` makes of each task, stacked; for problems that are stated by it."""
        return self._call("predict", z, self.batch)

    def loss(self, prediction: PyTree) -> Tensor:
        """The loss of stacked predictions ``[tasks]``."""
        value = self.stacking(
            self.problem.loss,
            (prediction, self.outer.tree, self.batch),
            (True, self.outer.per_task, True),
            self.count,
            "loss",
        )
        assert isinstance(value, Tensor)
        return value

    # The inner variable as leaves, one task alone without a dimension of tasks

    def cut(self, z: Tensor) -> tuple[PyTree, list[Tensor]]:
        """The inner variable and its leaves, which require grad and share memory with z.

        They are cut out of z beforehand, so that autograd does not see the cutting.
        """
        leaves = [leaf.requires_grad_() for leaf in self.parts(z.detach())]
        return self.vector.tree(leaves), leaves

    def parts(self, v: Tensor) -> list[Tensor]:
        """A vector ``[tasks, n]`` without graph, in the shape of those leaves."""
        return self.vector.views(v.squeeze(0) if self.count == 1 else v)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The vector ``[tasks, n]`` of which these are the parts."""
        if len(parts) == 1:
            return parts[0].reshape(self.count, -1)
        return torch.cat([part.reshape(self.count, -1) for part in parts], -1)

    def call(self, name: str, inner: PyTree, batch: PyTree, known_as: str | None = None) -> Any:
        """One of the problem's functions at such leaves, for all tasks."""
        several = self.count > 1
        return self.stacking(
            getattr(self.problem, name),
            (inner, self.outer.tree, batch if several else self.tasks.only(batch)),
            (several, self.outer.per_task, several),
            self.count,
            known_as or name,
        )

    @cached_property
    def compiled(self) -> Gradient:
        """The compiled gradient of the inner objective, at such leaves."""
        return compiled_gradient(self)

    @property
    def strength(self) -> Tensor | None:
        """The regularizer's strength, 0-d or to be broadcast with ``[tasks, n]``; None without."""
        return self._strength

    @cached_property
    def plain_strength(self) -> Tensor | None:
        """The strength without its graph."""
        return None if self._strength is None else self._strength.detach()

    @property
    def center(self) -> Tensor:
        """The regularizer's center, to be broadcast with ``[tasks, n]``; if there is one."""
        return self._center

    def outer_of(self, i: int) -> PyTree:
        """The outer variable of task ``i``, detached."""
        leaves = [leaf.detach() for leaf in self.outer.leaves]
        if self.outer.per_task:
            leaves = [leaf[i] for leaf in leaves]
        return tree_unflatten(leaves, self.outer.spec)

    def smallest_strength(self, i: int) -> float:
        """The smallest proximal strength of task ``i``; 0 without a regularizer."""
        if self._strength is None:
            return 0.0
        strength = self._strength.detach()
        if self.outer.per_task:
            strength = strength[i]
        return float(strength.min())

    def metrics(self, z: Tensor) -> dict[str, Tensor]:
        """The problem's own metrics, ``[tasks]`` each."""
        with torch.no_grad():
            # A copy: metrics are the user's, and the point is the result's.
            result = self._call("metrics", z.detach().clone(), self.tasks.outer_batch)
        if not isinstance(result, dict):
            raise ObjectiveError(
                f"`metrics` returned a {type(result).__name__}; return a dict of 0-d tensors"
            )
        return result

    # Insides

    @property
    def batch(self) -> PyTree:
        """The inner batch at hand."""
        batch = self.tasks.inner_batch
        return batch.draw(self.step) if isinstance(batch, Stream) else batch

    def _objective(self, z: Tensor) -> Tensor:
        return self._scalar("inner_objective", z, self.batch)

    def _stationarity(self, z: Tensor) -> Tensor:
        tree = self._call("stationarity", z, self.batch)
        return self.vector.flatten(tree, batch_dims=1)

    def _scalar(self, name: str, z: Tensor, batch: PyTree) -> Tensor:
        value = self._call(name, z, batch)
        assert isinstance(value, Tensor)
        return value

    def _call(self, name: str, z: Tensor, batch: PyTree) -> PyTree:
        return self.call(name, self._tree(z), batch)

    def _tree(self, z: Tensor) -> PyTree:
        """The inner variable with z's graph; one task alone without a dimension of tasks."""
        return self.vector.unflatten(z.squeeze(0) if self.count == 1 else z)

    @cached_property
    def _center(self) -> Tensor:
        regularizer = _regularizer(self.problem)
        return self._of_outer(lambda outer: regularizer.center_vector(outer, self.vector), "center")

    @cached_property
    def _strength(self) -> Tensor | None:
        """0-d, ``[n]``, or with a leading dimension of tasks."""
        if self.problem.regularizer is None:
            return None
        regularizer = self.problem.regularizer
        strength = self._of_outer(
            lambda outer: regularizer.strength_vector(outer, self.vector), "strength"
        )
        if callable(regularizer.strength):
            try:
                check_strength(strength, "Proximal's strength")
            except ValueError as error:
                raise ObjectiveError(str(error)) from error
        return strength.unsqueeze(-1) if strength.ndim == 1 and self.outer.per_task else strength

    def _of_outer(self, function: Any, name: str) -> Tensor:
        with torch.set_grad_enabled(self.differentiable):
            if not self.outer.per_task:
                result = function(self.outer.tree)
            else:
                result = self.stacking(function, (self.outer.tree,), (True,), self.count, name)
        assert isinstance(result, Tensor)
        return result


def _regularizer(problem: BilevelProblem) -> Proximal:
    assert problem.regularizer is not None
    return problem.regularizer


def stacking_of(problem: BilevelProblem) -> Stacking:
    """The problem's own record of what vmap refused; kept on the instance, not globally."""
    record = problem.__dict__.get("_stacking")
    if not isinstance(record, Stacking) or record.mode != problem.stacking:
        record = Stacking(problem.stacking)
        problem.__dict__["_stacking"] = record
    return record


def _initial_inner(
    problem: BilevelProblem, outer: Outer, tasks: TaskBatch, stacking: Stacking
) -> tuple[Tensor, VectorSpec]:
    batch = tasks.inner_batch
    batch = batch.draw(LINEARISED) if isinstance(batch, Stream) else batch
    tree = stacking(
        problem.initial_inner,
        (outer.tree, batch),
        (outer.per_task, True),
        tasks.count,
        "initial_inner",
    )
    try:
        return _flatten_stacked(tree, "inner")
    except ValueError as error:
        raise ObjectiveError(f"`initial_inner`: {error}") from error


def _flatten_stacked(tree: PyTree, name: str) -> tuple[Tensor, VectorSpec]:
    leaves, spec = tree_flatten(tree)
    one = [x[0] if isinstance(x, Tensor) and x.ndim else x for x in leaves]
    vector = VectorSpec.of(tree_unflatten(one, spec), name)
    return vector.joined(leaves, batch_dims=1), vector
