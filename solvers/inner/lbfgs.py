r"""Limited-memory BFGS (Liu and Nocedal, 1989), batched over tasks.

The direction is $-B\,\partial_z G$ with $B$ the two-loop recursion (Nocedal and Wright, 2006,
Algorithm 7.4) on the last ``memory`` pairs $s, y$; the step length is found by backtracking until
Armijo's condition holds. Pairs with $s^\top y \le 0$ are skipped, so that $B$ stays positive
definite. Every task has its own pairs, step length and stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.flat import FlatProblem
from bilevel.inner_solver import Carry, InnerSolver
from bilevel.operator import SecantPairs
from bilevel.pytree import PyTree
from bilevel.registry import INNER_SOLVERS
from bilevel.rows import column, dot, norm

from .line_search import backtrack

__all__ = ["LBFGS"]


@INNER_SOLVERS.register("lbfgs")
@dataclass(frozen=True)
class LBFGS(InnerSolver):
    """L-BFGS with backtracking, for smooth deterministic inner objectives.

    Args:
        max_steps: The most steps.
        tol: Stop a task once ‖∂_z G‖ ≤ tol, looked at after every step; None: take all steps.
        memory: Number of pairs kept, for each task.

    Raises:
        ValueError: A setting is out of range.
    """

    differentiable: ClassVar[bool] = False
    needs_objective: ClassVar[bool] = True
    check_every: ClassVar[int] = 1
    max_steps: int = 200
    tol: float | None = 1e-6
    memory: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 1:
            raise ValueError(f"`memory` is {self.memory}; keep at least one pair")

    def _init(self, flat: FlatProblem, z: Tensor) -> PyTree:
        value, gradient = flat.value_and_gradient(z)
        shape = (self.memory, *z.shape)
        return {
            "value": value.double(),
            "gradient": gradient,
            "s": z.new_zeros(shape),
            "y": z.new_zeros(shape),
            # 1 / sᵀy of each pair; 0 marks an empty slot.
            "rho": torch.zeros(self.memory, len(z), dtype=torch.float64, device=z.device),
            "scale": 1.0 / norm(gradient).clamp_min(1.0),
            "stuck": torch.zeros(len(z), dtype=torch.bool, device=z.device),
        }

    def _residual(self, flat: FlatProblem, z: Tensor, state: PyTree) -> Tensor:
        return norm(state["gradient"])

    def pairs(self, carry: Carry) -> SecantPairs:
        """The pairs kept, from which `SecantPreconditioner` builds an inverse (SHINE)."""
        state = carry.state
        return SecantPairs(state["s"], state["y"], state["rho"] > 0)

    def _step(self, flat: FlatProblem, z: Tensor, state: PyTree) -> tuple[Tensor, PyTree]:
        gradient = state["gradient"]
        direction = -_two_loops(state, gradient)
        slope = dot(gradient, direction)
        # Where rounding made it no descent direction, fall back to the gradient.
        uphill = slope >= 0
        direction = torch.where(
            uphill.unsqueeze(-1), -column(state["scale"], z) * gradient, direction
        )
        slope = torch.where(uphill, dot(gradient, direction), slope)
        # Tasks that are done, or have nowhere to go, must not keep the others searching.
        size = norm(gradient)
        rest = state["stuck"] | (size <= (self.tol or 0.0)) | ~size.isfinite()
        new_z, value, new_gradient, found = backtrack(
            flat, z, state["value"], gradient, direction, slope, rest
        )
        s, y = new_z - z, new_gradient - gradient
        sy, yy, ss = dot(s, y), dot(y, y), dot(s, s)
        # A NaN fails the comparison and is skipped like negative curvature.
        keep = sy > torch.finfo(z.dtype).eps * (ss * yy).sqrt()
        rho = torch.where(keep, 1.0 / sy, 0.0)
        rhos = _push(state["rho"].unsqueeze(-1), rho.unsqueeze(-1), keep).squeeze(-1)
        # Without a step length the same search would fail for ever: start over from the gradient.
        rhos = torch.where(found, rhos, 0.0)
        return new_z, {
            "value": value,
            "gradient": new_gradient,
            "s": _push(state["s"], s, keep),
            "y": _push(state["y"], y, keep),
            "rho": rhos,
            "stuck": rest | (~found & (state["rho"] == 0.0).all(0)),
            "scale": torch.where(keep, sy / yy, state["scale"]),
        }


def _two_loops(state: Any, gradient: Tensor) -> Tensor:
    """B times the gradient, ``[tasks, n]``; newest pair last."""
    s, y, rho = state["s"], state["y"], state["rho"]
    q, alphas = gradient, []
    for i in reversed(range(len(s))):
        alpha = rho[i] * dot(s[i], q)
        q = q - column(alpha, q) * y[i]
        alphas.append(alpha)
    q = column(state["scale"], q) * q
    for i, alpha in zip(range(len(s)), reversed(alphas), strict=True):
        q = q + column(alpha - rho[i] * dot(y[i], q), q) * s[i]
    return q


def _push(history: Tensor, new: Tensor, keep: Tensor) -> Tensor:
    """Drop the oldest entry and add the newest, for the tasks to keep; others stay."""
    shifted = torch.cat([history[1:], new.unsqueeze(0)])
    return torch.where(keep.unsqueeze(-1), shifted, history)
