"""The inner problem as `argmin`'s nodes need it: settings without tensors, and the solves.

Every tensor reaches a solve as an argument, so that transforms see it; the solves run below all
transforms, on plain tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .argmin_transforms import depth, refuse_captured
from .brief import brief
from .errors import SolveError
from .flat import FlatProblem, Outer
from .inner_solver import Carry, InnerSolver, detached
from .linearised import LinearisedSystem
from .method import HypergradientMethod, ImplicitMethod
from .probe import probe
from .problem import BilevelProblem, Structure
from .pytree import PyTree, VectorSpec, tree_flatten, tree_map, tree_unflatten
from .rows import norm
from .stacking import Stacking
from .stationarity import StationarityGraph
from .status import describe_status, members
from .stream import Stream
from .task import TaskBatch

__all__ = ["Data", "InnerProblem", "check_solve"]

_HOLE = object()


@dataclass(frozen=True)
class Data:
    """Structure of the tasks' batches and starting point, with holes for the tensors."""

    leaves: tuple[Any, ...]
    spec: Any

    @classmethod
    def of(cls, tasks: TaskBatch, inner: PyTree) -> tuple[Data, list[Tensor]]:
        """Take the tensors out."""
        leaves, spec = tree_flatten([tasks.inner_batch, tasks.outer_batch, inner])
        rest = tuple(_HOLE if isinstance(x, Tensor) else x for x in leaves)
        return cls(rest, spec), [x for x in leaves if isinstance(x, Tensor)]

    @property
    def count(self) -> int:
        """Number of tensors."""
        return sum(x is _HOLE for x in self.leaves)

    def filled(self, tensors: Sequence[Tensor], count: int, size: int) -> tuple[TaskBatch, PyTree]:
        """The tasks and the starting point; a stream's tasks are repeated ``size`` times."""
        rest = iter(tensors)
        leaves = [next(rest) if x is _HOLE else x for x in self.leaves]
        batch, outer_batch, inner = tree_unflatten(leaves, self.spec)
        if isinstance(batch, Stream) and size > 1:
            draw = batch.draw
            batch = Stream(lambda step: _repeated(draw(step), size))
        return TaskBatch(batch, outer_batch, count=count), inner


@dataclass
class Layout:
    """What the first solve finds out; shared by all folds of a problem."""

    vector: VectorSpec = field(init=False)
    stacking: Stacking = field(init=False)
    checked: bool = False

    @property
    def native_norms(self) -> set[str]:
        """Names of functions that contain a native norm layer."""
        return self.stacking.native_norms


@dataclass(frozen=True, eq=False)
class InnerProblem:
    """An inner problem on stacked tasks, without its tensors.

    Attributes:
        problem: The bilevel problem.
        solver: The inner solver.
        method: The hypergradient method.
        strict: Whether a failed solve raises.
        outer: Structure of the outer variable, and whether each task has its own; no leaves.
        data: Structure of the tasks' data.
        count: Number of tasks, ``size`` times the original number.
        levels: How many transforms stood around `argmin`.
        size: How often the original tasks are repeated, one block after the other.
        layout: Found in the first solve.
    """

    problem: BilevelProblem
    solver: InnerSolver
    method: HypergradientMethod
    strict: bool
    outer: Outer
    data: Data
    count: int
    levels: int
    size: int = 1
    layout: Layout = field(default_factory=Layout)

    @classmethod
    def of(
        cls,
        problem: BilevelProblem,
        solver: InnerSolver,
        method: HypergradientMethod,
        outer: Outer,
        tasks: TaskBatch,
        inner: PyTree,
        *,
        strict: bool,
    ) -> tuple[InnerProblem, list[Tensor]]:
        """Take the tensors out; those of the tasks and the starting point are returned."""
        # Constants, unlike the inner batch: their derivatives are neither given nor refused.
        constant = replace(tasks, outer_batch=_detached(tasks.outer_batch))
        data, tensors = Data.of(constant, _detached(inner))
        structure = outer.with_leaves([])
        return cls(problem, solver, method, strict, structure, data, tasks.count, depth()), tensors

    @property
    def leaf_count(self) -> int:
        """Number of outer leaves."""
        return self.outer.count

    def folded(self, size: int) -> InnerProblem:
        """``size`` times as many tasks, each with its own outer variable."""
        outer = replace(self.outer, per_task=True)
        return replace(self, outer=outer, count=size * self.count, size=size * self.size)

    def split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The data, and what comes after it."""
        return tensors[: self.data.count], tensors[self.data.count :]

    # On plain tensors

    def prepare(self, data: Sequence[Tensor], leaves: Sequence[Tensor]) -> FlatProblem:
        """The problem, checked; detached."""
        outer = self.outer.with_leaves(leaves).detached()
        tasks, inner = self.data.filled(data, self.count, self.size)
        if not self.layout.checked:
            refuse_captured(lambda: _evaluate_one(self.problem, outer, tasks, inner), self.levels)
            self.layout.checked = True
        flat = FlatProblem.of(self.problem, outer, tasks, inner)
        probe(flat)
        self.layout.vector, self.layout.stacking = flat.vector, flat.stacking
        return flat

    def flat(self, data: Sequence[Tensor], z: Tensor, leaves: Sequence[Tensor]) -> FlatProblem:
        """The problem in the graph of the outer leaves, around the point z ``[tasks, n]``."""
        return FlatProblem(
            self.problem,
            self.outer.with_leaves(leaves),
            self.data.filled(data, self.count, self.size)[0],
            self.layout.vector,
            self.layout.stacking,
            z.detach(),
            start_is_constant=True,
            differentiable=True,
        )

    def solve(self, data: Sequence[Tensor], leaves: Sequence[Tensor]) -> Tensor:
        """The inner solution ``[tasks, n]``."""
        flat = self.prepare(data, leaves)
        self.method.check(flat)
        carry = self.solver.solve(flat)
        check_solve(flat, self.solver, carry, strict=self.strict)
        return carry.z

    def unroll(
        self, data: Sequence[Tensor], leaves: Sequence[Tensor], *, keep_graph: bool
    ) -> Tensor:
        """The point ``[tasks, n]`` that the unrolled steps reach."""
        flat = self.prepare(data, leaves)
        graph = flat.with_outer(self.outer.with_leaves(leaves), differentiable=keep_graph)
        with torch.set_grad_enabled(keep_graph):
            carry = unroll(self.method, graph, self.solver)
        check_solve(flat, self.solver, carry, strict=self.strict)
        return carry.z

    def solve_linear(
        self,
        data: Sequence[Tensor],
        z: Tensor,
        leaves: Sequence[Tensor],
        rhs: Tensor,
        *,
        transpose: bool,
    ) -> Tensor:
        """The solution of (∂_z F)ᵀ v = rhs, or of ∂_z F v = rhs, ``[tasks, n]``."""
        assert isinstance(self.method, ImplicitMethod)
        flat = self.flat(data, z.detach(), [leaf.detach() for leaf in leaves])
        graph = StationarityGraph.at(flat, z)
        system = LinearisedSystem(flat, z.detach(), graph, z.new_zeros(len(z)), rhs)
        symmetric = self.problem.structure is not Structure.GENERAL
        operator = system.operator if transpose or symmetric else system.operator.T
        found = self.method.solve(operator, rhs)
        status = members(found.status)
        if self.strict and not all(s.ok for s in status):
            raise SolveError(
                f"{brief(self.problem)}: the adjoint solve failed: {describe_status(status)} Pass "
                "on_failure='ignore' to go on."
            )
        return found.value


def unroll(method: HypergradientMethod, graph: FlatProblem, solver: InnerSolver) -> Carry:
    """The carry after all steps, with its graph."""
    carry = getattr(method, "unroll")(graph, solver)  # noqa: B009  (not every method has it)
    assert isinstance(carry, Carry)
    return carry


def check_solve(flat: FlatProblem, solver: InnerSolver, carry: Carry, *, strict: bool) -> None:
    """Judge the point that an inner solve found.

    Raises:
        SolveError: A task failed, and ``strict``.
    """
    if not strict:
        return
    plain = detached(carry)
    residual = norm(flat.gradient(plain.z))
    status = members(solver.report(plain, residual, flat.notes.get("first_residual")).status)
    if not all(s.ok for s in status):
        raise SolveError(
            f"the inner solve failed: {describe_status(status)} Pass on_failure='ignore' to go on."
        )


def _evaluate_one(problem: BilevelProblem, outer: Outer, tasks: TaskBatch, inner: PyTree) -> None:
    """Call the problem's functions on the first task, without stacking; on copies."""
    outer = outer.cloned()
    if outer.per_task:
        outer = outer.with_leaves([leaf[:1] for leaf in outer.leaves])
    first = tasks.select(torch.tensor([0]))
    flat = FlatProblem.of(
        problem, outer, first, None if inner is None else tree_map(lambda x: x[:1], inner)
    )
    name = "stationarity" if problem.is_equilibrium else "inner_objective"
    flat._call(name, flat.start, flat.batch)


def _detached(tree: PyTree) -> PyTree:
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, tree)


def _repeated(tree: PyTree, size: int) -> PyTree:
    return tree_map(lambda x: torch.cat([x] * size) if isinstance(x, Tensor) else x, tree)
