"""A judge of hypergradients: right, or flagged; anything else is a silent wrong answer.

The truth comes with the case, from float64 algebra by hand; nothing here asks the library for it.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bilevel import (
    BilevelError,
    BilevelWarning,
    Status,
    check_hypergradient,
    hypergradient,
    problem_from,
)
from bilevel.solvers import GradientDescent

F32, F64 = torch.float32, torch.float64
NONE = object()
"""There is no hypergradient: whatever is returned must be flagged."""

# These speak of speed, not of the answer: they flag nothing.
_IDLE = ("cannot be stacked by torch.vmap",)


@dataclass(frozen=True)
class Case:
    """One thing that is wrong, and the answer that must be right or flagged.

    Attributes:
        name: What is wrong.
        call: Computes the hypergradient.
        truth: The float64 hypergradient, or NONE; with ``reduction="none"`` one row for each task.
        tol: Allowed relative error, and the most that a reported residual may be without speaking
            of trouble, where no tolerance was asked for.
        limit: Why no residual or curvature of one hypergradient shows this case; None where one
            does.
        loud: An error of PyTorch's own that says what is wrong.
    """

    name: str
    call: Callable[[], object]
    truth: object
    tol: float = 1e-6
    limit: str | None = None
    loud: tuple[type[Exception], ...] = ()


@dataclass(frozen=True)
class Verdict:
    """``how``: 'exact', 'raised', 'status', 'warning', 'residual', 'estimate' or 'SILENT'."""

    how: str
    why: str


def judge(case):
    """Compute the hypergradient of a case and compare it with the truth."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = case.call()
        except BilevelError as error:
            return Verdict("raised", f"{type(error).__name__}: {error}")
        except ValueError as error:
            if "`" not in str(error) and not isinstance(error, case.loud):
                raise
            return Verdict("raised", f"{type(error).__name__}: {error}")
        except case.loud as error:
            return Verdict("raised", f"{type(error).__name__}: {error}")
    told = [str(w.message) for w in caught if issubclass(w.category, BilevelWarning)]
    told = [message for message in told if not any(words in message for words in _IDLE)]
    got = flat(result.gradient)
    size = got.norm().item()
    if case.truth is NONE:
        error = float("inf")
    else:
        want = flat(case.truth)
        assert got.shape == want.shape, (got.shape, want.shape)
        rows = len(result.status) if _per_task(result, got, case.truth) else 1
        got, want = got.reshape(rows, -1), want.reshape(rows, -1)
        errors = relative(got - want, want)
        if rows > 1:
            return _judge_rows(case, result, errors)
        error = errors.item()
    if error <= case.tol:
        return Verdict("exact", f"relative error {error:.1e}")
    if not result.ok:
        return Verdict("status", result.summary())
    if told:
        return Verdict("warning", told[0])
    residual = budget_residual(result)
    if residual > case.tol:
        return Verdict("residual", f"BUDGET with a residual of {residual:.1e}")
    estimate = result.diagnostics.error_estimate
    # The estimate is relative to the gradient found, not to the exact one.
    if estimate is not None:
        off = math.inf if case.truth is NONE else ((got - want).norm().item() / (size or 1.0))
        if estimate.max().item() >= 0.5 * off:
            return Verdict("estimate", f"{estimate.max().item():.1e} for {off:.1e}")
        return Verdict("SILENT", f"estimated {estimate.max().item():.1e}, but it is {off:.1e}")
    return Verdict("SILENT", f"{result!r}, ok, but the relative error is {error:.1e}")


def _per_task(result, got, truth):
    return isinstance(truth, torch.Tensor) and truth.ndim > 1 and len(result.status) > 1


def _judge_rows(case, result, errors):
    """Every task must be right, or have its own status say that it is not."""
    for error, status in zip(errors.tolist(), result.status, strict=True):
        if not error <= case.tol and status.ok:
            return Verdict("SILENT", f"{status.name} with a relative error of {error:.1e}")
    return Verdict("exact" if result.ok else "status", result.summary())


def budget_residual(result):
    """The largest residual reported by a solve of which no tolerance was asked."""
    largest = 0.0
    for report in (result.diagnostics.inner, result.diagnostics.linear):
        if report is not None:
            for status, residual in zip(report.status, report.residual.tolist(), strict=True):
                largest = max(largest, residual if status is Status.BUDGET else 0.0)
    left = result.diagnostics.derivative_residual
    if left is not None and result.diagnostics.inner.status[0] is Status.BUDGET:
        largest = max(largest, left.max().item())
    return largest


def flat(tree):
    """A pytree as one float64 vector."""
    leaves = torch.utils._pytree.tree_flatten(tree)[0]
    return torch.cat([leaf.detach().double().reshape(-1) for leaf in leaves])


def relative(gap, want):
    """‖gap‖ / ‖want‖ of each row; NaN where the gap is."""
    return gap.norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-280)


# Problems


def vec(*numbers, dtype=F64):
    """A vector."""
    return torch.tensor(numbers, dtype=dtype)


def zeros_like_outer(x, batch):
    """Start from zero."""
    return torch.zeros_like(x)


def half(z, x):
    """½ ‖z − x‖²."""
    return 0.5 * ((z - x) ** 2).sum()


def run(
    inner,
    outer,
    x,
    method,
    solver=None,
    *,
    start=zeros_like_outer,
    task=None,
    regularizer=None,
    stationarity=None,
    structure=None,
    given=None,
    state=None,
    reduction="mean",
):
    """A call of `hypergradient`, not yet made. The solver is gradient descent to 1e-10."""
    if solver is None and given is None:
        solver = GradientDescent(lr=0.1, max_steps=1000, tol=1e-10)

    def problem():
        return problem_from(
            inner, outer, regularizer, start, stationarity=stationarity, structure=structure
        )

    def call():
        return hypergradient(
            problem(),
            x,
            task,
            inner_solver=solver,
            method=method,
            inner=given,
            state=state() if callable(state) else state,
            reduction=reduction,
        )

    call.checked = lambda: check_hypergradient(
        problem(), x, task, inner_solver=solver, method=method
    )
    return call


def system(H, t, method, *, dtype=F64, state=None, stationarity=False, structure=None):
    """The adjoint system alone, H v = −t: the inner solution is zero, exactly, at x = 0.

    g = ½ zᵀHz − xᵀz and f = ½ ‖z − t‖², or the stationarity Hz − x.
    """
    H, t = H.to(dtype), t.to(dtype)
    x = torch.zeros_like(t)
    outer = lambda z, x, batch: 0.5 * ((z - t) ** 2).sum()  # noqa: E731
    settings = {"given": x, "state": state, "structure": structure}
    if stationarity:
        return run(None, outer, x, method, stationarity=lambda z, x, batch: H @ z - x, **settings)
    return run(lambda z, x, batch: 0.5 * z @ (H @ z) - x @ z, outer, x, method, **settings)


def adjoint(H, t, dtype=F64):
    """The truth of `system`, for the matrix as its dtype holds it."""
    H, t = H.to(dtype).double(), t.to(dtype).double()
    return torch.linalg.solve(H.mT, -t)


def spectrum(values, seed=0):
    """A symmetric matrix of these eigenvalues."""
    values = torch.as_tensor(values, dtype=F64)
    basis, _ = torch.linalg.qr(normal(len(values), len(values), seed=seed))
    matrix = basis @ torch.diag(values) @ basis.mT
    return (matrix + matrix.mT) / 2


def logspaced(n, condition, seed=0):
    """A symmetric matrix with eigenvalues from 1 down to 1 / condition."""
    return spectrum(torch.logspace(0, -math.log10(condition), n, dtype=F64), seed)


def normal(*shape, seed=0):
    """Normal numbers, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64)
