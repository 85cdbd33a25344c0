r"""Dense float64 reference: the hypergradient by textbook algebra, one task at a time.

Shares no code with the methods under test: no stacking, no flat problem, no linear solver. The
inner problem is solved by Newton's method with its dense Jacobian, then

$$\frac{dF}{dx} = \partial_x f - (\partial_x F)^\top v, \qquad J^\top v = \partial_z f, \quad
  J = \partial_z F,\ F = \partial_z G.$$

Costs n + 1 gradients and n³ operations per Newton step: for small problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import BilevelProblem
from .pytree import (
    PyTree,
    broadcast_prefix,
    matched,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)
from .stream import LINEARISED, Stream
from .task import Task

__all__ = ["DenseReference", "dense_hypergradient", "solved_outer_value", "to_float64"]

_LAST_STEP = 1e-11
_NEWTON_STEPS = 50
_HALVINGS = 30


@dataclass(frozen=True)
class DenseReference:
    """The reference for one task.

    Attributes:
        gradient: One float64 tensor for each outer leaf.
        inner: The inner solution, flat ``[n]``, float64.
        outer_value: f at the solution.
        residual: ‖∂_z G‖ at the solution, relative to 1 + ‖z‖.
        jacobian: J at the solution, ``[n, n]``.
        eigenvalues: Smallest and largest eigenvalue of the symmetric part of J.
    """

    gradient: tuple[Tensor, ...]
    inner: Tensor
    outer_value: float
    residual: float
    jacobian: Tensor
    eigenvalues: tuple[float, float]


def to_float64(tree: PyTree) -> PyTree:
    """Floating tensors as detached float64 copies; everything else as it is."""

    def convert(leaf: object) -> object:
        if isinstance(leaf, Tensor):
            leaf = leaf.detach()
            return leaf.double().clone() if leaf.is_floating_point() else leaf
        return leaf

    return tree_map(convert, tree)


def dense_hypergradient(
    problem: BilevelProblem, outer: PyTree, task: Task, start: PyTree
) -> DenseReference:
    """Solve one task from ``start`` and differentiate by dense algebra; all float64."""
    one = _OneTask(problem, outer, task, start)
    z = one.solve(one.flatten(start))
    z = z.detach().requires_grad_()
    leaves = [leaf.detach().requires_grad_() for leaf in one.leaves]
    stationarity = one.stationarity(z, leaves)
    jacobian = _jacobian(stationarity, z)
    value = one.outer_value(z, leaves)
    grads = torch.autograd.grad(value, [z, *leaves], allow_unused=True, retain_graph=True)
    rhs, *direct = (_or_zero(g, x) for g, x in zip(grads, [z, *leaves], strict=True))
    v = torch.linalg.solve(jacobian.mT, rhs)
    cross: Sequence[Tensor | None] = [None] * len(leaves)
    if stationarity.requires_grad:
        cross = torch.autograd.grad(stationarity, leaves, v, allow_unused=True)
    spectrum = torch.linalg.eigvalsh((jacobian + jacobian.mT) / 2)
    return DenseReference(
        tuple((d - _or_zero(c, x)).detach() for d, c, x in zip(direct, cross, leaves, strict=True)),
        z.detach(),
        value.item(),
        (stationarity.norm() / (1 + z.norm())).item(),
        jacobian,
        (spectrum[0].item(), spectrum[-1].item()),
    )


def solved_outer_value(
    problem: BilevelProblem, outer: PyTree, task: Task, start: PyTree, near: DenseReference
) -> float:
    """F(x) = f(x, z*(x)) of one task at an outer point close to that of ``near``; all float64.

    The inner problem is solved anew, by Newton's method with the Jacobian of ``near``: so close to
    its solution that converges in a few steps, each of one gradient.
    """
    one = _OneTask(problem, outer, task, start)
    z = one.chord(near.inner, torch.linalg.inv(near.jacobian))
    return one.outer_value(z, one.leaves).item()


class _OneTask:
    """One task's functions of the flat inner vector ``[n]`` and the outer leaves."""

    def __init__(self, problem: BilevelProblem, outer: PyTree, task: Task, start: PyTree) -> None:
        self.problem = problem
        self.leaves, self.outer_spec = tree_flatten(outer)
        parts, self.inner_spec = tree_flatten(start)
        self.shapes = [part.shape for part in parts]
        inner = task.inner_batch
        self.inner_batch = to_float64(
            inner.draw(LINEARISED) if isinstance(inner, Stream) else inner
        )
        self.outer_batch = to_float64(task.outer_batch)

    def flatten(self, tree: PyTree) -> Tensor:
        return torch.cat([leaf.reshape(-1) for leaf in tree_leaves(tree)])

    def unflatten(self, z: Tensor) -> PyTree:
        parts = z.split([shape.numel() for shape in self.shapes])
        leaves = [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return tree_unflatten(leaves, self.inner_spec)

    def stationarity(self, z: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """F(z, x) ``[n]`` with its graph; ``z`` requires grad."""
        outer = tree_unflatten(leaves, self.outer_spec)
        inner = self.unflatten(z)
        if self.problem.is_equilibrium:
            found = self.problem.stationarity(inner, outer, self.inner_batch)
            total = self.flatten(matched(found, inner))
        else:
            value = self.problem.inner_objective(inner, outer, self.inner_batch)
            (total,) = torch.autograd.grad(value, z, create_graph=True)
        regularizer = self.problem.regularizer
        if regularizer is None:
            return total
        given = regularizer.strength
        strength = broadcast_prefix(given(outer) if callable(given) else given, inner, "strength")
        pulls = [
            (torch.as_tensor(s, dtype=z.dtype, device=z.device) * (a - c)).reshape(-1)
            for s, a, c in zip(
                strength,
                tree_leaves(inner),
                tree_leaves(matched(regularizer.center_tree(outer), inner)),
                strict=True,
            )
        ]
        return total + torch.cat(pulls)

    def outer_value(self, z: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        outer = tree_unflatten(leaves, self.outer_spec)
        return self.problem.outer_objective(self.unflatten(z), outer, self.outer_batch)

    def solve(self, z: Tensor) -> Tensor:
        """Newton's method with halving until ‖F‖ no longer falls, or z no longer moves."""
        z = start = z.detach()
        best = float("inf")
        for _ in range(_NEWTON_STEPS):
            z = z.requires_grad_()
            stationarity = self.stationarity(z, self.leaves)
            size = stationarity.norm().item()
            if not size < best:
                break
            best = size
            direction, _ = torch.linalg.solve_ex(_jacobian(stationarity, z), stationarity.detach())
            z = z.detach()
            for k in range(_HALVINGS):
                trial = (z - 0.5**k * direction).requires_grad_()
                if self.stationarity(trial, self.leaves).norm().item() < size:
                    z = trial.detach()
                    break
            else:
                break
            # The step after this one would be the square of it, which no digit holds.
            if (direction.abs() <= _LAST_STEP * (z.abs() + (z - start).abs())).all():
                break
        return z.detach()

    def chord(self, z: Tensor, inverse: Tensor) -> Tensor:
        """Newton's method with a fixed inverse Jacobian until ‖F‖ no longer falls."""
        best, solution = float("inf"), z
        for _ in range(_NEWTON_STEPS):
            z = z.detach().requires_grad_()
            stationarity = self.stationarity(z, self.leaves).detach()
            size = stationarity.norm().item()
            if not size < best:
                break
            best, solution = size, z.detach()
            z = solution - inverse @ stationarity
        return solution


def _jacobian(vector: Tensor, z: Tensor) -> Tensor:
    """∂ vector / ∂ z, row by row."""
    if not vector.requires_grad:
        return z.new_zeros(len(z), len(z))
    rows = []
    for i in range(len(z)):
        (row,) = torch.autograd.grad(vector[i], z, retain_graph=True, allow_unused=True)
        rows.append(_or_zero(row, z).detach())
    return torch.stack(rows)


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
