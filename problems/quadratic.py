r"""A quadratic bilevel problem, built from its answer.

$$g(x, z) = \tfrac12 z^\top A z - z^\top (B x + c), \qquad
  f(x, z) = \tfrac12 \|z - t\|^2 + d^\top x$$

with $A$ symmetric positive definite of a chosen spectrum, so that

$$z^\star(x) = A^{-1}(Bx + c), \qquad \frac{dF}{dx} = d + B^\top A^{-1} (z^\star(x) - t).$$

With a proximal regularizer of strength $s$ and center $m(x)$ the matrix is $A + \mathrm{diag}(s)$
and $s \odot m(x)$ joins the right-hand side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel.certificate import Smoothness
from bilevel.problem import BilevelProblem, Structure
from bilevel.pytree import VectorSpec
from bilevel.registry import PROBLEMS
from bilevel.regularizer import Proximal
from bilevel.solvers import ClosedForm
from bilevel.task import Task, TaskBatch

from .analytic import eigenvalue_bounds, mean_over_tasks, tasks_of
from .example import Example
from .seeding import generator

__all__ = ["Quadratic"]


@PROBLEMS.register("quadratic")
class Quadratic(BilevelProblem):
    """Quadratic inner and outer objectives; every quantity has a formula.

    The inner variable is z ``[n]``, the outer variable x ``[m]``. A task's data are
    ``inner_batch = {"A": [n, n], "B": [n, m], "c": [n]}`` and
    ``outer_batch = {"t": [n], "d": [m]}``, so tasks of one size stack.

    Args:
        regularizer: An optional proximal regularizer; with its center at the identity, m = n.

    Example:
        >>> example = Quadratic.generated(n=5, outer_size=2, condition=10.0)
        >>> example.gradient.shape
        torch.Size([2])
    """

    structure = Structure.POSITIVE_DEFINITE

    def __init__(self, regularizer: Proximal | None = None) -> None:
        self.regularizer = regularizer

    def __repr__(self) -> str:
        return f"Quadratic(regularizer={self.regularizer})"

    def inner_objective(self, inner: Tensor, outer: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """½ zᵀAz − zᵀ(Bx + c)."""
        linear = batch["B"] @ outer + batch["c"]
        return 0.5 * inner @ (batch["A"] @ inner) - inner @ linear

    def outer_objective(self, inner: Tensor, outer: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """½‖z − t‖² + dᵀx."""
        return 0.5 * ((inner - batch["t"]) ** 2).sum() + batch["d"] @ outer

    def initial_inner(self, outer: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The regularizer's center, or zeros ``[n]`` without one."""
        if self.regularizer is None:
            return torch.zeros_like(batch["c"])
        start = self.regularizer.center_tree(outer)
        assert isinstance(start, Tensor)
        return start

    def solution(self, outer: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """z*(x) ``[n]`` of one task, for `ClosedForm`; in float64, differentiable."""
        outer, dtype = outer.double(), batch["c"].dtype
        batch = {key: tensor.double() for key, tensor in batch.items()}
        linear = batch["B"] @ outer + batch["c"]
        if self.regularizer is not None:
            strength, center = self._proximal(outer, linear)
            linear = linear + strength * center
        z: Tensor = torch.linalg.solve(self.hessian(outer, batch), linear)
        return z.to(dtype)

    def smoothness(self, outer: Tensor, task: Task) -> Smoothness:
        """The constants of a quadratic without regularizer, from its eigenvalues."""
        if self.regularizer is not None:
            return super().smoothness(outer, task)
        batch = task.inner_batch
        lowest = torch.linalg.eigvalsh(batch["A"].double())[0].item()
        cross = torch.linalg.matrix_norm(batch["B"].double(), 2).item()
        return Smoothness(cross_norm=cross, outer_gradient=1.0, strong_convexity=lowest)

    def hessian(self, outer: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The regularised inner Hessian A + diag(s) ``[n, n]``."""
        if self.regularizer is None:
            return batch["A"]
        return batch["A"] + self._proximal(outer, batch["c"])[0].diag()

    def exact_hypergradient(self, outer: Tensor, task: Task | TaskBatch) -> Tensor:
        """dF/dx ``[m]`` by dense float64 solves, the weighted mean over tasks, in outer's dtype."""
        x = outer.detach().double()
        return mean_over_tasks(lambda one: self._hypergradient(x, one), task).to(outer.dtype)

    def _hypergradient(self, x: Tensor, task: Task) -> Tensor:
        inner = {key: tensor.double() for key, tensor in task.inner_batch.items()}
        outer = {key: tensor.double() for key, tensor in task.outer_batch.items()}
        z = self.solution(x, inner)
        v: Tensor = torch.linalg.solve(self.hessian(x, inner), z - outer["t"])
        gradient: Tensor = outer["d"] + inner["B"].mT @ v
        if self.regularizer is None:
            return gradient

        def pull(x: Tensor) -> Tensor:
            strength, center = self._proximal(x, z)
            return v @ (strength * (center - z))

        through: Tensor = torch.func.grad(pull)(x)
        return gradient + through

    def _proximal(self, outer: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Strength and center, ``[n]`` both."""
        assert self.regularizer is not None
        vector = VectorSpec.of(like)
        strength = self.regularizer.strength_vector(outer, vector)
        return strength.expand_as(like), self.regularizer.center_vector(outer, vector)

    @classmethod
    def generated(
        cls,
        n: int = 20,
        outer_size: int = 5,
        condition: float = 100.0,
        tasks: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        regularizer: Proximal | None = None,
    ) -> Example:
        r"""Random data with a chosen spectrum: $A = Q \Lambda Q^\top$, eigenvalues from 1 up.

        Args:
            n: Length of the inner variable.
            outer_size: Length of the outer variable, m.
            condition: Largest eigenvalue of A, ≥ 1; eigenvalues are log-spaced from 1. Task i of
                k has ``condition ** ((i + 1) / k)``.
            tasks: Number of stacked tasks; None: one `Task`.
            seed: Seed of everything random; the global generator is not touched.
            dtype: Of data and outer variable. The exact hypergradient is that of the rounded data.
            regularizer: An optional proximal regularizer.

        Raises:
            ValueError: A size is not positive, or the condition number is below 1.
        """
        for name, value in (("n", n), ("outer_size", outer_size), ("tasks", tasks)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1")
        if not 1.0 <= condition < math.inf:
            raise ValueError(f"`condition` is {condition}; a condition number is finite and ≥ 1")
        count = 1 if tasks is None else tasks
        data = [
            _task(n, outer_size, condition ** ((i + 1) / count), seed, i, dtype)
            for i in range(count)
        ]
        task = data[0] if tasks is None else Task.stack(data)
        outer = _normal(outer_size, seed=(seed, "outer")).to(dtype)
        problem = cls(regularizer)
        bounds = eigenvalue_bounds(
            problem.hessian(outer, one.inner_batch) for one in tasks_of(task)
        )
        return Example(
            problem,
            outer,
            task,
            ClosedForm(problem.solution),
            lipschitz=bounds[1],
            mu=bounds[0],
            gradient=problem.exact_hypergradient(outer, task),
            note=f"random quadratic, n = {n}, condition number up to {condition:g}",
        )

    @classmethod
    def example(
        cls, *, tasks: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> Example:
        """A small instance; see `Example`."""
        return cls.generated(12, 5, 20.0, tasks, seed, dtype)


def _task(
    n: int, outer_size: int, condition: float, seed: int, position: int, dtype: torch.dtype
) -> Task:
    def draw(name: str, *shape: int) -> Tensor:
        return _normal(*shape, seed=(seed, position, name))

    basis, _ = torch.linalg.qr(draw("A", n, n))
    eigenvalues = torch.logspace(0.0, math.log10(condition), n, dtype=torch.float64)
    matrix = (basis * eigenvalues) @ basis.mT
    inner = {
        "A": (matrix + matrix.mT) / 2,
        "B": draw("B", n, outer_size),
        "c": draw("c", n),
    }
    outer = {"t": draw("t", n), "d": draw("d", outer_size)}
    return Task(
        {key: tensor.to(dtype) for key, tensor in inner.items()},
        {key: tensor.to(dtype) for key, tensor in outer.items()},
        key=position,
    )


def _normal(*shape: int, seed: tuple[int | str, ...]) -> Tensor:
    return torch.randn(*shape, generator=generator(*seed), dtype=torch.float64)
