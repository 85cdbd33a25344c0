"""`check_hypergradient`: is this hypergradient right? Three routes are compared.

The method's answer, dense float64 algebra at the solved inner problem, and central finite
differences of the solved problem.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .brief import brief
from .errors import ObjectiveError
from .flat import Outer
from .hypergradient import hypergradient
from .inner_solver import InnerSolver
from .method import HypergradientMethod
from .problem import BilevelProblem
from .pytree import PyTree, tree_leaves, tree_map, tree_unflatten
from .reference import DenseReference, dense_hypergradient, solved_outer_value, to_float64
from .result import Hypergradient
from .status import Status, describe_status
from .task import Task, TaskBatch

__all__ = ["HypergradientCheck", "LeafCheck", "assert_hypergradient", "check_hypergradient"]

_FINITE_DIFFERENCE_RTOL = 1e-5
_VANISHING = 1e-3


@dataclass(frozen=True)
class LeafCheck:
    """The comparison for one outer leaf.

    Attributes:
        name: The leaf, such as ``outer['weight']``.
        error: ‖method − dense‖ / ‖dense‖, the latter at least 0.001 of its norm over all leaves.
        cosine: Cosine between the two.
        norm: ‖dense‖.
        finite_difference_error: |dense − finite difference| along a random direction of the leaf,
            relative to the leaf's norm over √(number of entries), its typical size there.
    """

    name: str
    error: float
    cosine: float
    norm: float
    finite_difference_error: float


@dataclass(frozen=True)
class HypergradientCheck:
    """What `check_hypergradient` found; ``str()`` of it is a readable report.

    Attributes:
        leaves: One comparison per outer leaf.
        error: Relative error over all leaves.
        rtol: The error allowed.
        status: One `Status` per task.
        inner_error: Largest ‖z − z*‖ / ‖z*‖ over tasks.
        reference_residual: Largest relative residual of the reference's inner solution.
        eigenvalues: Smallest and largest eigenvalue of the inner Hessian over tasks.
        is_equilibrium: The inner problem is no minimisation, so that any eigenvalue will do.
        seconds: Wall-clock time of the method.
        counts: Gradients, products and values the method took, summed over tasks.
        advice: Sentences: what is wrong and what to change.
        result: The hypergradient that was checked.
    """

    method: str
    inner_solver: str
    dtype: torch.dtype
    leaves: tuple[LeafCheck, ...]
    error: float
    rtol: float
    status: tuple[Status, ...]
    inner_error: float
    reference_residual: float
    eigenvalues: tuple[float, float]
    is_equilibrium: bool
    seconds: float
    counts: dict[str, int]
    advice: tuple[str, ...]
    result: Hypergradient

    @property
    def ok(self) -> bool:
        """The method agrees with dense algebra at a minimum, and that with finite differences."""
        return self.error <= self.rtol and self.reference_ok and self.minimum_ok

    @property
    def minimum_ok(self) -> bool:
        """The inner point can be a minimum: no eigenvalue of its Hessian is negative or zero."""
        return self.is_equilibrium or self.eigenvalues[0] > 0

    @property
    def reference_ok(self) -> bool:
        """Dense algebra agrees with finite differences: the reference can be trusted."""
        worst = max(leaf.finite_difference_error for leaf in self.leaves)
        return worst <= _FINITE_DIFFERENCE_RTOL

    def __str__(self) -> str:
        width = max(len("all leaves"), *(len(leaf.name) for leaf in self.leaves))
        head = f"{'leaf':{width}}  {'error':>9}  {'cosine':>9}  {'norm':>9}  {'FD error':>9}"
        low, high = self.eigenvalues
        condition = f", condition {high / low:.1e}" if low > 0 else ", not positive definite"
        counts = ", ".join(f"{value} {key}" for key, value in self.counts.items())
        names = sorted({s.name for s in self.status})
        number = len(self.status)
        lines = [
            f"{'PASS' if self.ok else 'FAIL'}: {self.method} with {self.inner_solver}",
            f"  relative error {self.error:.1e}, allowed {self.rtol:.0e} ({self.dtype})",
            "",
            f"  {head}",
            f"  {'-' * len(head)}",
            *(
                f"  {leaf.name:{width}}  {leaf.error:9.1e}  {leaf.cosine:9.6f}  {leaf.norm:9.1e}"
                f"  {leaf.finite_difference_error:9.1e}"
                for leaf in self.leaves
            ),
            "",
            f"  status        {', '.join(names)} ({number} task{'s' * (number != 1)})",
            f"  inner error   {self.inner_error:.1e}",
            f"  inner Hessian eigenvalues {low:.2e} to {high:.2e}{condition}",
            f"  cost          {self.seconds * 1e3:.1f} ms; {counts}",
        ]
        lines += [f"  advice        {sentence}" for sentence in self.advice]
        return "\n".join(lines)


def check_hypergradient(
    problem: BilevelProblem,
    outer: PyTree,
    task: Task | TaskBatch | Sequence[Task] | None = None,
    *,
    inner_solver: InnerSolver,
    method: HypergradientMethod,
    rtol: float | None = None,
    max_n: int = 1000,
    seed: int = 0,
) -> HypergradientCheck:
    """Compare a hypergradient with dense float64 algebra and with finite differences.

    The reference is the hypergradient of the *solved* problem: an inner solution that has not
    converged shows as an error, and so does the bias of a biased method.

    Args:
        problem: The bilevel problem.
        outer: The outer variable, a pytree of floating tensors.
        task: As in `hypergradient`.
        inner_solver: The inner solver to check.
        method: The hypergradient method to check.
        rtol: Relative error allowed; default 1e-6 in float64, 1e-3 in lower precision.
        max_n: Refuse larger inner variables: the reference is dense.
        seed: Of the random directions for finite differences.

    Raises:
        ValueError: The inner variable is larger than ``max_n``, or an argument is wrong.
        BilevelError: As `hypergradient` raises.

    Example:
        >>> import torch
        >>> from bilevel import Proximal, check_hypergradient, problem_from
        >>> from bilevel.solvers import GradientDescent, ImplicitCG
        >>> problem = problem_from(
        ...     lambda z, x, batch: z.exp().sum(), lambda z, x, batch: (z**2).sum(), Proximal(1.0)
        ... )
        >>> outer = torch.tensor([0.5, 1.0], dtype=torch.float64)
        >>> report = check_hypergradient(
        ...     problem,
        ...     outer,
        ...     inner_solver=GradientDescent(lr=0.2, max_steps=500, tol=1e-10),
        ...     method=ImplicitCG(rtol=1e-10),
        ... )
        >>> report.ok
        True
    """
    started = time.perf_counter()
    result = hypergradient(problem, outer, task, inner_solver=inner_solver, method=method)
    seconds = time.perf_counter() - started
    variable = Outer.of(outer)
    tasks, points = tasks_and_points(task, result.inner)
    sizes = [sum(leaf.numel() for leaf in tree_leaves(point)) for point in points]
    if max(sizes) > max_n:
        raise ValueError(
            f"the inner variable has {max(sizes)} entries, more than `max_n` = {max_n}: the "
            "reference is dense; check a smaller instance, or raise `max_n`"
        )
    usable = [i for i, status in enumerate(result.status) if status.usable]
    exact = to_float64(outer)
    starts = [to_float64(point) for point in points]
    references = {i: float64_reference(problem, exact, tasks[i], starts[i]) for i in usable}
    total = sum(tasks[i].weight for i in usable)
    shares = {i: tasks[i].weight / total for i in usable}
    dense = [
        sum((shares[i] * references[i].gradient[j] for i in usable), torch.zeros(()).double())
        for j in range(len(variable.leaves))
    ]
    found = [leaf.detach().double() for leaf in tree_leaves(result.gradient)]

    def solved(leaves: list[Tensor]) -> float:
        tree = tree_unflatten(leaves, variable.spec)
        return math.fsum(
            shares[i] * solved_outer_value(problem, tree, tasks[i], starts[i], references[i])
            for i in usable
        )

    scale = _norm(dense)
    generator = torch.Generator().manual_seed(seed)
    leaves = [
        _leaf(
            variable.names[j],
            found[j],
            dense[j],
            scale,
            _finite_difference(solved, tree_leaves(exact), j, generator),
        )
        for j in range(len(dense))
    ]
    spectrum = [references[i].eigenvalues for i in usable]
    inner_error = max(_inner_error(starts[i], references[i]) for i in usable)
    dtype = tree_leaves(points[0])[0].dtype
    check = HypergradientCheck(
        method=brief(method),
        inner_solver=brief(inner_solver),
        dtype=dtype,
        leaves=tuple(leaves),
        error=_norm([a - b for a, b in zip(found, dense, strict=True)]) / (scale or 1.0),
        rtol=rtol if rtol is not None else (1e-6 if dtype == torch.float64 else 1e-3),
        status=result.status,
        inner_error=inner_error,
        reference_residual=max(references[i].residual for i in usable),
        is_equilibrium=problem.is_equilibrium,
        eigenvalues=(min(low for low, _ in spectrum), max(high for _, high in spectrum)),
        seconds=seconds,
        counts=result.diagnostics.counts,
        advice=(),
        result=result,
    )
    return _with_advice(check)


def assert_hypergradient(
    problem: BilevelProblem,
    outer: PyTree,
    task: Task | TaskBatch | Sequence[Task] | None = None,
    *,
    inner_solver: InnerSolver,
    method: HypergradientMethod,
    rtol: float | None = None,
    max_n: int = 1000,
    seed: int = 0,
) -> HypergradientCheck:
    """Raise unless the hypergradient is right; for your own test suite.

    Args:
        problem: The bilevel problem.
        outer: The outer variable.
        task: As in `hypergradient`.
        inner_solver: The inner solver to check.
        method: The hypergradient method to check.
        rtol: Relative error allowed; default 1e-6 in float64, 1e-3 in lower precision.
        max_n: Refuse larger inner variables.
        seed: Of the random directions for finite differences.

    Raises:
        AssertionError: It is not right; the message is the report, with advice.
    """
    check = check_hypergradient(
        problem,
        outer,
        task,
        inner_solver=inner_solver,
        method=method,
        rtol=rtol,
        max_n=max_n,
        seed=seed,
    )
    if not check.ok:
        raise AssertionError(f"\n{check}")
    return check


def float64_reference(
    problem: BilevelProblem, outer: PyTree, task: Task, start: PyTree
) -> DenseReference:
    """The dense reference of one task; says so where the problem is bound to another dtype."""
    try:
        return dense_hypergradient(problem, outer, task, start)
    except RuntimeError as error:
        if not any(word in str(error) for word in ("dtype", "Float", "Double", "scalar type")):
            raise
        raise ObjectiveError(
            f"the problem cannot be evaluated in float64 ({str(error).splitlines()[0]}): it holds "
            "tensors of its own; pass data in the batch of the task, where it can be converted, or "
            "build the problem in float64"
        ) from error


def tasks_and_points(
    task: Task | TaskBatch | Sequence[Task] | None, inner: PyTree
) -> tuple[list[Task], list[PyTree]]:
    """The tasks one by one, each with its part of a result's ``inner``."""
    if task is None:
        return [Task()], [inner]
    if isinstance(task, Task):
        return [task], [inner]
    if isinstance(task, TaskBatch):
        points = [tree_map(lambda x, i=i: x[i], inner) for i in range(task.count)]
        return task.unstack(), points
    return list(task), list(inner)


def _finite_difference(
    function: object, leaves: list[Tensor], j: int, generator: torch.Generator
) -> tuple[Tensor, float]:
    """A random unit direction of leaf j, and the central difference of ``function`` along it."""
    assert callable(function)
    leaf = leaves[j]
    direction = torch.randn(leaf.shape, dtype=torch.float64, generator=generator).to(leaf.device)
    direction = direction / direction.norm().clamp_min(1e-300)
    step = 1e-5 * max(1.0, leaf.abs().max().item() if leaf.numel() else 1.0)

    def at(sign: float) -> float:
        moved = [x + sign * step * direction if k == j else x for k, x in enumerate(leaves)]
        return float(function(moved))

    return direction, (at(1.0) - at(-1.0)) / (2 * step)


def _leaf(
    name: str, found: Tensor, dense: Tensor, scale: float, difference: tuple[Tensor, float]
) -> LeafCheck:
    direction, slope = difference
    size = dense.norm().item()
    # A leaf whose gradient vanishes is judged against the whole gradient.
    floor = max(size, _VANISHING * scale) or 1.0
    product = found.norm().item() * size
    cosine = (found * dense).sum().item() / product if product > 0 else 1.0
    typical = floor / max(dense.numel(), 1) ** 0.5
    return LeafCheck(
        name,
        (found - dense).norm().item() / floor,
        cosine,
        size,
        abs((dense * direction).sum().item() - slope) / typical,
    )


def _inner_error(point: PyTree, reference: DenseReference) -> float:
    z = torch.cat([leaf.reshape(-1) for leaf in tree_leaves(point)])
    gap, size = (z - reference.inner).norm().item(), reference.inner.norm().item()
    return float(gap / max(size, 1e-300))


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(math.fsum(t.square().sum().item() for t in tensors))


def _with_advice(check: HypergradientCheck) -> HypergradientCheck:
    if check.ok:
        return check
    low, high = check.eigenvalues
    advice = []
    if not check.reference_ok:
        advice.append(
            "dense algebra and finite differences disagree: an objective is nonsmooth here, "
            "random, or its inner problem has no isolated solution"
        )
    bad = [s for s in check.status if not s.ok]
    if bad:
        advice.append(describe_status(check.status))
    if low <= 0 and not check.is_equilibrium:
        advice.append(
            f"the inner Hessian has eigenvalue {low:.1e}, so the inner point is no minimum: raise "
            f"the proximal strength above {-low:.1e} more, or solve the inner problem to a minimum"
        )
    if check.inner_error > check.rtol:
        advice.append(
            f"the inner solution is off by {check.inner_error:.1e}: raise `max_steps` or lower "
            "`tol` of the inner solver; its error enters the hypergradient"
        )
    linear = check.result.diagnostics.linear
    if linear is not None and linear.residual.max().item() > check.rtol:
        advice.append(
            f"the adjoint system is solved to {linear.residual.max().item():.1e} only: raise the "
            "steps or terms, or lower `rtol` of the method"
        )
    eps = torch.finfo(check.dtype).eps
    if low > 0 and high / low * eps > check.rtol:
        advice.append(
            f"condition {high / low:.1e} is too much for {check.dtype}: use float64, or a larger "
            "proximal strength"
        )
    if not advice:
        advice.append(
            "every solve is accurate, so the method itself is biased here (as FirstOrder and "
            "truncated Unrolled are): compare with DenseExact()"
        )
    return replace(check, advice=tuple(advice))
