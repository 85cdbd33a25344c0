"""Random strongly convex bilevel problems with a known hypergradient, stacked over tasks.

Each problem is stated for one task; every task has its own data, its own inner error and its own
direction of that error. The exact inner solution comes from L-BFGS followed by dense Newton steps,
the exact hypergradient from dense algebra there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel import BilevelProblem, Proximal, Structure, TaskBatch, hypergradient, problem_from
from bilevel.pytree import tree_leaves
from bilevel.solvers import LBFGS, DenseExact

__all__ = ["FAMILIES", "Instance", "draw"]

F64 = torch.float64
ERRORS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


@dataclass(frozen=True)
class Instance:
    """Stacked tasks at one outer point, with their exact answers.

    Attributes:
        problem: The problem.
        outer: The outer variable.
        tasks: The tasks, stacked.
        solution: The exact inner solution ``[tasks, n]``.
        exact: The exact hypergradient of each task ``[tasks, d]``.
        eigenvalues: Smallest and largest eigenvalue of each inner Hessian ``[tasks, 2]``.
        directions: A unit direction for each task's inner error ``[tasks, n]``.
    """

    problem: BilevelProblem
    outer: Tensor
    tasks: TaskBatch
    solution: Tensor
    exact: Tensor
    eigenvalues: Tensor
    directions: Tensor

    def away(self, errors: Tensor) -> Tensor:
        """Inner points at these relative distances from the solution, ``[tasks]``."""
        size = self.solution.norm(dim=1, keepdim=True)
        return self.solution + errors.unsqueeze(1) * size * self.directions


def _logistic(generator: torch.Generator, count: int) -> tuple[BilevelProblem, Tensor, TaskBatch]:
    rows, n = 40, int(torch.randint(4, 25, (), generator=generator))
    scales = torch.logspace(0, -1, n, dtype=F64)

    def data() -> tuple[Tensor, Tensor]:
        x = torch.randn(count, rows, n, generator=generator, dtype=F64) * scales
        y = (torch.rand(count, rows, generator=generator, dtype=F64) < 0.5).double()
        return x, y

    def loss(w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(batch[0] @ w, batch[1])

    problem = problem_from(
        lambda w, x, batch: loss(w, batch) + 0.5 * (x.exp() * w**2).sum(),
        lambda w, x, batch: loss(w, batch),
        initial_inner=lambda x, batch: torch.zeros_like(x),
        structure=Structure.POSITIVE_DEFINITE,
    )
    outer = torch.randn(n, generator=generator, dtype=F64) - _uniform(generator, 2.0, 7.0)
    return problem, outer, TaskBatch(data(), data())


def _softmax(generator: torch.Generator, count: int) -> tuple[BilevelProblem, Tensor, TaskBatch]:
    rows, features, classes = 30, int(torch.randint(3, 8, (), generator=generator)), 3

    def data() -> tuple[Tensor, Tensor]:
        x = torch.randn(count, rows, features, generator=generator, dtype=F64)
        y = torch.randint(classes, (count, rows), generator=generator)
        return x, y

    def losses(w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(batch[0] @ w, batch[1], reduction="none")

    # Weights of the examples, as in data cleaning, and a strength.
    problem = problem_from(
        lambda w, x, batch: (
            (x[:rows].sigmoid() * losses(w, batch)).mean() + 0.5 * x[rows].exp() * (w**2).sum()
        ),
        lambda w, x, batch: losses(w, batch).mean(),
        initial_inner=lambda x, batch: x.new_zeros(features, classes),
        structure=Structure.POSITIVE_DEFINITE,
    )
    outer = torch.randn(rows + 1, generator=generator, dtype=F64)
    outer[rows] = -_uniform(generator, 2.0, 7.0)
    return problem, outer, TaskBatch(data(), data())


def _network(generator: torch.Generator, count: int) -> tuple[BilevelProblem, Tensor, TaskBatch]:
    rows, hidden = 12, int(torch.randint(3, 9, (), generator=generator))
    n = 3 * hidden + 1

    def net(z: Tensor, x: Tensor) -> Tensor:
        first, bias, last = z[:hidden], z[hidden : 2 * hidden], z[2 * hidden : 3 * hidden]
        return torch.tanh(x.unsqueeze(-1) * first + bias) @ last + z[-1]

    def data(shift: Tensor) -> tuple[Tensor, Tensor]:
        x = 4 * torch.rand(count, rows, generator=generator, dtype=F64) - 2
        return x, torch.sin(x + shift)

    def loss(z: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(net(z, batch[0]), batch[1])

    # An initialisation for all tasks; tasks that the regularizer leaves indefinite are dropped.
    strength = Proximal(math.exp(-_uniform(generator, -0.7, 2.3)))
    problem = problem_from(
        lambda z, x, batch: loss(z, batch), lambda z, x, batch: loss(z, batch), strength
    )
    outer = 0.5 * torch.randn(n, generator=generator, dtype=F64)
    shift = 3 * torch.rand(count, 1, generator=generator, dtype=F64)
    return problem, outer, TaskBatch(data(shift), data(shift))


def _scaled(generator: torch.Generator, count: int) -> tuple[BilevelProblem, Tensor, TaskBatch]:
    """Logistic regression on features of very different scale: condition numbers to 1e5."""
    problem, outer, tasks = _logistic(generator, count)
    n = len(outer)
    scales = 3.0 * torch.logspace(0, -2, n, dtype=F64)

    def data(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return batch[0] * scales, batch[1]

    outer = torch.full((n,), -_uniform(generator, 6.0, 9.0), dtype=F64)
    return problem, outer, TaskBatch(data(tasks.inner_batch), data(tasks.outer_batch))


FAMILIES: dict[str, Callable[[torch.Generator, int], tuple[BilevelProblem, Tensor, TaskBatch]]] = {
    "logistic": _logistic,
    "softmax": _softmax,
    "network": _network,
    "scaled": _scaled,
}


def draw(family: str, seed: int, count: int) -> Instance:
    """Draw ``count`` tasks; those whose Hessian is not positive definite are left out."""
    generator = torch.Generator().manual_seed(1000 * seed + list(FAMILIES).index(family))
    problem, outer, tasks = FAMILIES[family](generator, count)
    solver = LBFGS(max_steps=3000, tol=1e-11)
    method = DenseExact(correct=True)  # one Newton step: to rounding
    result = hypergradient(
        problem, outer, tasks, inner_solver=solver, method=method, reduction="none"
    )
    assert result.diagnostics.linear is not None
    eigenvalues = result.diagnostics.linear.curvature
    assert eigenvalues is not None
    residual = result.diagnostics.inner.residual
    index = ((eigenvalues[:, 0] > 0) & (residual < 1e-12)).nonzero().squeeze(-1)
    solution = result.state.inner[0][index]
    directions = torch.randn(solution.shape, generator=generator, dtype=F64)
    # Half of the errors are those of an unfinished descent: mostly along flat directions.
    tasks = tasks.select(index)
    flat = _flattened(problem, outer, tasks, solution, directions)
    half = torch.arange(len(index)).unsqueeze(1) % 2 == 0
    directions = torch.where(half, directions, flat)
    (gradient,) = tree_leaves(result.gradient)
    return Instance(
        problem,
        outer,
        tasks,
        solution,
        gradient[index].reshape(len(index), -1),
        eigenvalues[index],
        directions / directions.norm(dim=1, keepdim=True),
    )


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _flattened(
    problem: BilevelProblem, outer: Tensor, tasks: TaskBatch, solution: Tensor, directions: Tensor
) -> Tensor:
    """The directions multiplied by the inverse Hessian."""
    from bilevel.flat import FlatProblem, Outer
    from bilevel.linearised import linearise
    from bilevel.solvers import Dense

    flat = FlatProblem.of(problem, Outer.of(outer), tasks)
    return Dense()(linearise(flat, solution).operator, directions).value
