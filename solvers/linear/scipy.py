"""Any iterative solver of `scipy.sparse.linalg`, one task at a time on the host.

For comparison, and for solvers that this library does not have.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from bilevel.linear_solver import LinearSolution, LinearSolver, relative_residual
from bilevel.operator import MatVec, Operator
from bilevel.problem import Structure
from bilevel.registry import LINEAR_SOLVERS
from bilevel.rows import norm
from bilevel.status import Status, marked, residual_status

from .cycles import check_settings

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

__all__ = ["SciPy"]

_SYMMETRIC = ("cg", "minres")
_GENERAL = ("gmres", "lgmres", "bicgstab", "qmr", "lsmr", "lsqr", "gcrotmk", "tfqmr")


class _NotFiniteError(ArithmeticError):
    """A product has an entry that is not finite."""


_TIGHTER, _TIGHTEST = 1e-2, 1e-6


@LINEAR_SOLVERS.register("scipy")
@dataclass(frozen=True)
class SciPy(LinearSolver):
    """A solver of `scipy.sparse.linalg` by its name.

    Args:
        name: ``cg`` or ``minres`` for symmetric matrices; ``gmres``, ``lgmres``, ``bicgstab``,
            ``qmr``, ``lsmr``, ``lsqr``, ``gcrotmk`` or ``tfqmr`` for any (``qmr``, ``lsmr`` and
            ``lsqr`` need the transposed product).
        rtol: Tolerance in ‖b − A v‖ / ‖b‖ of each task; 0 asks for the steps only.
        max_steps: SciPy's ``maxiter``; for ``gmres``, ``lgmres`` and ``gcrotmk`` that counts
            restarts. The steps reported are products with the matrix.
        options: Further keyword arguments of the SciPy function.

    Raises:
        ValueError: A setting is out of range.
        StructureError: The solver needs the transposed product, which is not known.
    """

    name: str = "minres"
    rtol: float = 1e-5
    max_steps: int = 100
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_settings(self.max_steps, self.rtol)
        known = _SYMMETRIC + _GENERAL
        if self.name not in known:
            raise ValueError(f"`name` is '{self.name}'; pass one of: {', '.join(known)}")

    @property
    def needs(self) -> Structure:  # type: ignore[override]  # depends on the name
        """Symmetry, for the solvers that assume it."""
        return Structure.SYMMETRIC if self.name in _SYMMETRIC else Structure.GENERAL

    def _solve(self, operator: Operator, rhs: Tensor, start: Tensor | None) -> LinearSolution:
        x = torch.zeros_like(rhs) if start is None else start.clone()
        floor = max(self.rtol, torch.finfo(rhs.dtype).eps)
        r = rhs - operator(x)
        steps = torch.zeros(len(rhs), dtype=torch.int64, device=rhs.device)
        broken = torch.zeros_like(steps, dtype=torch.bool)
        # Neither a zero right-hand side nor a solved one is SciPy's business.
        for task in (norm(r) > floor).nonzero().flatten().tolist():
            host = _Host(operator, rhs, task)
            try:
                x[task] += host.tensor(self._solve_one(host, host.array(r[task]), floor))
            except _NotFiniteError:
                broken[task] = True
            steps[task] = host.products
        residual = relative_residual(operator, rhs, x)
        status = residual_status(residual, self.rtol or floor, asked=self.rtol > 0.0)
        status = marked(status, broken, Status.NON_FINITE)
        nan = torch.full_like(residual, float("nan"))
        return LinearSolution(x, status, residual, steps, nan, nan)

    def _solve_one(self, host: _Host, r: Array, target: float) -> Array:
        """The solution of one task; SciPy starts over from the residual until that is small.

        Its solvers understand tolerances differently, and some stop early by ours: where a start
        does not halve the residual, the next one is asked for more.
        """
        import numpy as np

        x, size = np.zeros_like(r), float(np.linalg.norm(r))
        # Some compare with absolute numbers: give them a matrix of size about 1.
        host.scale = float(np.linalg.norm(host.matvec(r))) / size or 1.0
        share = 1.0
        while size > target and host.products < self.max_steps:
            change = self._call(host, r, share * min(target / size, 0.5))
            rest = r - host.matvec(change)
            before, after = size, float(np.linalg.norm(rest))
            if after < before:
                x, r, size = x + change, rest, after
            if not after <= 0.5 * before:
                # MINRES measures by ‖A‖ ‖x‖, and takes a solution for found long before it is.
                share *= _TIGHTER
                if share < _TIGHTEST:
                    break
        return x / host.scale

    def _call(self, host: _Host, b: Array, rtol: float) -> Array:
        """Run the SciPy function, with the settings under the names that its signature has."""
        import numpy as np
        from scipy.sparse import linalg

        function = getattr(linalg, self.name)
        settings = {
            "rtol": rtol,
            "btol": rtol,
            "atol": 0.0,
            "conlim": 0.0,
            "maxiter": self.max_steps,
            "iter_lim": self.max_steps,
        }
        known = inspect.signature(function).parameters
        arguments: dict[str, Any] = {key: value for key, value in settings.items() if key in known}
        matrix = linalg.LinearOperator(
            (len(b), len(b)), matvec=host.matvec, rmatvec=host.rmatvec, dtype=np.float64
        )
        # A breakdown shows in the residual; SciPy need not warn of it.
        with np.errstate(all="ignore"):
            found = function(matrix, b, **(arguments | dict(self.options)))
        return found[0]  # type: ignore[no-any-return]


class _Host:
    """One task's matrix as NumPy sees it: the rows of the other tasks are zero."""

    def __init__(self, operator: Operator, like: Tensor, task: int) -> None:
        self._operator, self._like, self._task = operator, like, task
        self.scale, self.products = 1.0, 0

    def array(self, v: Tensor) -> Array:
        """To NumPy."""
        return v.double().cpu().numpy()

    def tensor(self, v: Array) -> Tensor:
        """From NumPy."""
        return torch.from_numpy(v.copy()).to(self._like).reshape(-1)

    def matvec(self, v: Array) -> Array:
        """A v / scale."""
        self.products += 1
        return self._apply(self._operator, v)

    def rmatvec(self, v: Array) -> Array:
        """Aᵀ v / scale."""
        return self._apply(self._operator.T, v)

    def _apply(self, product: MatVec, v: Array) -> Array:
        rows = torch.zeros_like(self._like)
        rows[self._task] = self.tensor(v)
        image = product(rows)[self._task]
        if not bool(image.isfinite().all()):
            raise _NotFiniteError
        return self.array(image) / self.scale
