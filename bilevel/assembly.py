"""The hypergradients of several stacks of tasks, put together as one result with its reports."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .engine import Engine
from .errors import BilevelWarning, DependenceError, ObjectiveError, SolveError
from .flat import FlatProblem, Outer
from .inner_solver import InnerReport
from .linear_solver import LinearSolution
from .method import Estimate, HypergradientMethod, ImplicitMethod
from .operator import SecantPairs
from .pytree import PyTree, tree_map, tree_unflatten
from .result import Diagnostics, Hypergradient, SolveReport, State
from .rows import all_finite, finite_rows
from .status import Status, describe_status, marked, members
from .task import Task, TaskBatch

__all__ = ["Part", "Verdict", "assemble"]


@dataclass(frozen=True)
class Verdict:
    """How the tasks of a stack ended, on the host.

    Attributes:
        tasks: `Status` codes of the tasks.
        inner: Those of their inner solves.
        linear: Those of their adjoint solves; of the tasks, for methods without.
        finite: The gradient is finite as a whole.
    """

    tasks: list[int]
    inner: list[int]
    linear: list[int]
    finite: bool

    @classmethod
    def of(cls, estimate: Estimate, *, per_task: bool) -> Verdict:
        """Judge an estimate; the device is asked once."""
        status, linear = estimate.status, estimate.linear
        leaves = [leaf for leaf in estimate.gradient if leaf is not None]
        if per_task:
            for leaf in leaves:
                finite = all_finite(leaf.reshape(len(leaf), -1)).to(status.device)
                status = marked(status, ~finite, Status.NON_FINITE)
        rows = [status, estimate.inner.status, status if linear is None else linear.status]
        places: dict[torch.device, list[Tensor]] = {}
        for leaf in leaves:
            row = leaf.reshape(1, -1)
            if not finite_rows(row):
                places.setdefault(leaf.device, []).append(row)
        flags = [all_finite(torch.cat(found, 1)).to(torch.int8) for found in places.values()]
        codes = torch.cat([one.to(status.device) for one in (*rows, *flags)]).tolist()
        n = len(status)
        return cls(codes[:n], codes[n : 2 * n], codes[2 * n : 3 * n], all(codes[3 * n :]))

    @property
    def failed(self) -> list[bool]:
        """Which tasks have no usable hypergradient."""
        return [code >= Status.DIVERGED for code in self.tasks]

    @property
    def usable(self) -> bool:
        """Every task is usable, and so is the gradient."""
        return self.finite and not any(self.failed)


@dataclass(frozen=True)
class Part:
    """The hypergradient of one stack; ``estimate`` is that of all tasks, failed ones included."""

    positions: list[int]
    flat: FlatProblem
    estimate: Estimate
    verdict: Verdict
    gradient: tuple[Tensor | None, ...]
    weight: float


def assemble(
    outer: Outer,
    task: Task | TaskBatch | Sequence[Task] | None,
    stacks: list[list[Part]],
    engines: list[Engine],
    method: HypergradientMethod,
    reduction: str,
) -> Hypergradient:
    """Put the parts together in the order of the user's tasks.

    Args:
        outer: The outer variable.
        task: The tasks as the user passed them.
        stacks: The parts of each group of tasks of one shape.
        engines: How each group was run.
        method: How the hypergradients were computed.
        reduction: ``"mean"`` or ``"none"``.

    Raises:
        SolveError: No task has a usable hypergradient.
        DependenceError: Nothing depends on ``outer``.
        ObjectiveError: `metrics` has other names for other shapes.
    """
    parts = [part for stack in stacks for part in stack]
    places = list(chain.from_iterable(part.positions for part in parts))
    order = None if len(parts) == 1 else torch.tensor(places).argsort()
    in_order = partial(_in_order, order)

    def statuses(name: str) -> tuple[Status, ...]:
        codes = chain.from_iterable(getattr(part.verdict, name) for part in parts)
        return tuple(Status(code) for _, code in sorted(zip(places, codes, strict=True)))

    status = statuses("tasks")
    failed = tuple(i for i, s in enumerate(status) if not s.usable)
    if len(failed) == len(status):
        raise SolveError(
            f"no task has a usable hypergradient; {describe_status(status)} `outer` is unchanged."
        )
    unused = _check_dependence(outer, parts, method)
    mean = reduction == "mean"
    gradient = _mean(outer, parts) if mean else _per_task(outer, parts, in_order)
    linear = [part.estimate.linear for part in parts]
    counts: dict[str, int] = {}
    for part in parts:
        for key, value in part.flat.counts.items():
            counts[key] = counts.get(key, 0) + value
    metrics = [
        part.flat.metrics(part.estimate.z)
        if part.estimate.metrics is None
        else part.estimate.metrics
        for part in parts
    ]
    if any(one.keys() != metrics[0].keys() for one in metrics):
        names = [sorted(one) for one in metrics]
        raise ObjectiveError(
            f"`metrics` returned the names {names} for tasks of different shapes; return the same "
            "names for every task"
        )
    return Hypergradient(
        gradient=tree_unflatten(gradient, outer.spec),
        inner=_inner(task, parts),
        outer_value=_own(in_order([part.estimate.outer_value for part in parts])),
        inner_value=_own(in_order([part.estimate.inner_value for part in parts])),
        metrics={key: _own(in_order([one[key] for one in metrics])) for key in metrics[0]},
        status=status,
        state=_state(stacks),
        diagnostics=Diagnostics(
            inner=_report([part.estimate.inner for part in parts], statuses("inner"), order),
            linear=_report([one for one in linear if one is not None], statuses("linear"), order)
            if all(one is not None for one in linear)
            else None,
            counts=counts,
            unused=unused,
            failed=failed,
            inner_distance=_all_of([part.estimate.distance for part in parts], in_order),
            derivative_residual=_all_of([part.estimate.derivative for part in parts], in_order),
            engine=tuple(engines),
            **_accuracy(parts, in_order),
        ),
        _spec=outer.spec,
    )


def _in_order(order: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
    """The rows of all parts, in the order of the user's tasks."""
    if order is None:
        return tensors[0].detach()
    return torch.cat([tensor.detach() for tensor in tensors])[order.to(tensors[0].device)]


def _own(tensor: Tensor) -> Tensor:
    """A copy: what a user's function returns may be a piece of `outer`, which is changed later."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _mean(outer: Outer, parts: list[Part]) -> list[Tensor]:
    total = math.fsum(part.weight for part in parts)
    if total == 0.0:
        raise SolveError("the weights of all usable tasks are zero; give one a weight > 0")
    out = []
    for j, leaf in enumerate(outer.leaves):
        terms = [part.gradient[j] for part in parts]
        found = [term for term in terms if term is not None]
        out.append(sum(found[1:], found[0]) / total if found else torch.zeros_like(leaf))
    return [leaf.detach() for leaf in out]


def _per_task(
    outer: Outer, parts: list[Part], in_order: Callable[[Sequence[Tensor]], Tensor]
) -> list[Tensor]:
    out = []
    for j, leaf in enumerate(outer.leaves):
        terms = []
        for part in parts:
            term = part.gradient[j]
            terms.append(leaf.new_zeros(part.flat.count, *leaf.shape) if term is None else term)
        out.append(_own(in_order(terms)))
    return out


def _check_dependence(
    outer: Outer, parts: list[Part], method: HypergradientMethod
) -> tuple[str, ...]:
    used = [any(part.gradient[j] is not None for part in parts) for j in range(outer.count)]
    unused: tuple[str, ...] = ()
    if not all(used):
        # Names cost more than all else here: they are made for a message only.
        unused = tuple(n for n, flag in zip(outer.names, used, strict=True) if not flag)
    implicit = isinstance(method, ImplicitMethod)
    constant = implicit and not any(part.estimate.inner_depends for part in parts)
    cure = (
        "use `outer` itself in `inner_objective`, not its `.item()` or `.detach()`; or add a "
        "regularizer, Proximal(strength), whose center is `outer`; or take Unrolled or FirstOrder, "
        "which differentiate through `initial_inner`"
        if implicit
        else "use `outer` in an objective; implicit methods and Unrolled see a use in "
        "`inner_objective` too, so take ImplicitCG where that is the only one"
    )
    if len(unused) == outer.count:
        raise DependenceError(
            f"{type(method).__name__} finds that neither the inner solution nor the outer "
            f"objective depends on `outer`, so that its hypergradient is zero everywhere: {cure}"
        )
    if constant:
        warnings.warn(
            "the inner problem does not depend on `outer`: its solution is constant, and the "
            f"hypergradient is ∂f/∂outer alone: {cure}",
            BilevelWarning,
            stacklevel=5,
        )
    if unused:
        warnings.warn(
            f"{type(method).__name__} finds no dependence on "
            f"{', '.join(f'`{name}`' for name in unused)}, and the gradient there is zero: use it "
            "in an objective, or leave it out of `outer`"
            + ("" if implicit else "; an implicit method sees every use in the inner problem"),
            BilevelWarning,
            stacklevel=5,
        )
    return unused


def _all_of(
    tensors: Sequence[Tensor | None], in_order: Callable[[Sequence[Tensor]], Tensor]
) -> Tensor | None:
    given = [one for one in tensors if one is not None]
    return in_order(given) if len(given) == len(tensors) else None


def _accuracy(parts: list[Part], in_order: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    """The error estimates and bounds, where they were asked for."""
    errors = [part.estimate.error for part in parts]
    bounds = [part.estimate.bound for part in parts]
    given = [one for one in errors if one is not None]
    out: dict[str, Any] = {}
    if given:
        out["error_estimate"] = in_order([one.relative for one in given])
        out["inner_error"] = in_order([one.inner for one in given])
        out["linear_error"] = in_order([one.linear for one in given])
        out["gradient_norm"] = in_order([one.norm for one in given])
        out["error_status"] = members(in_order([one.status for one in given]))
    certified = [one for one in bounds if one is not None]
    if certified:
        out["error_bound"] = in_order(certified)
    return out


def _report(
    reports: Sequence[InnerReport | LinearSolution],
    status: tuple[Status, ...],
    order: Tensor | None,
) -> SolveReport:
    in_order = partial(_in_order, order)
    linear = [one for one in reports if isinstance(one, LinearSolution)]
    curvature = damping = lanczos = None
    if len(linear) == len(reports):
        curvature = in_order(
            [torch.stack([one.curvature_min, one.curvature_max], -1) for one in linear]
        )
        dampings = [one.damping for one in linear if one.damping is not None]
        if len(dampings) == len(linear):
            damping = in_order(dampings)
        tables = [one.tridiagonal for one in linear if one.tridiagonal is not None]
        if len(tables) == len(linear):
            lanczos = partial(_tables, tables, order)
    return SolveReport(
        status,
        in_order([one.residual for one in reports]),
        in_order([one.steps for one in reports]),
        curvature,
        damping,
        lanczos,
    )


def _tables(tables: Sequence[Callable[[], Tensor]], order: Tensor | None) -> Tensor:
    """The tridiagonal matrices of all tasks; they are made when somebody asks for them."""
    found = [table() for table in tables]
    steps = max(table.shape[1] for table in found)
    padded = [
        torch.nn.functional.pad(table, (0, 0, 0, steps - table.shape[1]), value=float("nan"))
        for table in found
    ]
    return _in_order(order, padded)


def _inner(task: Task | TaskBatch | Sequence[Task] | None, parts: list[Part]) -> PyTree:
    trees = [part.flat.vector.unflatten(part.estimate.z) for part in parts]
    if isinstance(task, TaskBatch):
        return trees[0] if len(trees) == 1 else tree_map(lambda *x: torch.cat(x), *trees)
    if task is None or isinstance(task, Task):
        return tree_map(lambda x: x[0], trees[0])
    out: list[PyTree] = [None] * sum(len(part.positions) for part in parts)
    for part, tree in zip(parts, trees, strict=True):
        for i, position in enumerate(part.positions):
            out[position] = tree_map(lambda x, i=i: x[i], tree)
    return out


def _state(stacks: list[list[Part]]) -> State:
    """Warm starts, one for each group of equal shapes, however its tasks were run."""
    inner, adjoint, pairs = [], [], []
    for stack in stacks:
        solved = [part.estimate.linear for part in stack if part.estimate.linear is not None]
        kept = [linear.pairs for linear in solved if linear.pairs is not None]
        inner.append(_joined([part.estimate.z for part in stack]))
        adjoint.append(_joined([x.value.detach() for x in solved]) if solved else None)
        pairs.append(SecantPairs.together(kept) if len(kept) > 1 else next(iter(kept), None))
    return State(tuple(inner), tuple(adjoint), tuple(pairs))


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
