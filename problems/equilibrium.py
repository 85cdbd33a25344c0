r"""A deep-equilibrium layer: the hidden state is a fixed point (Bai, Kolter and Koltun, 2019).

$$z_s = \tanh(W z_s + U u_s + b) \ \text{for every input } u_s, \qquad
  f = \tfrac1{2N} \sum_s \|C z_s - y_s\|^2$$

With $\|W\|_2 = q < 1$ the map is a contraction: the fixed point is unique, and the Jacobian
$J_s = I - D_s W$ of $z_s - \tanh(\cdot)$, with $D_s = \mathrm{diag}(1 - z_s^2)$, satisfies
$\|J_s - I\| \le q$ everywhere. It is not symmetric. With $J_s^\top v_s = C^\top (C z_s - y_s) / N$

$$\frac{dF}{dW} = \sum_s D_s v_s z_s^\top, \quad \frac{dF}{dU} = \sum_s D_s v_s u_s^\top,$$

$$\frac{dF}{db} = \sum_s D_s v_s, \quad \frac{dF}{dC} = \frac1N \sum_s (C z_s - y_s) z_s^\top.$$
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.problem import BilevelProblem, Structure
from bilevel.registry import PROBLEMS
from bilevel.solvers import GradientDescent
from bilevel.task import Task, TaskBatch

from .analytic import mean_over_tasks
from .example import Example
from .seeding import generator

__all__ = ["Equilibrium"]

Parameters = dict[str, Tensor]
_FIXED_POINT_STEPS = 1000


@PROBLEMS.register("equilibrium")
class Equilibrium(BilevelProblem):
    """Regression by a layer whose output is the fixed point of a map.

    The inner variable is z ``[inputs, units]``, the fixed points of all inputs of a task. The outer
    variable is ``{"W": [units, units], "U": [units, features], "b": [units],
    "C": [outputs, units]}``. The inner batch is u ``[inputs, features]``, the outer batch
    y ``[inputs, outputs]``. `GradientDescent` with a learning rate of 1 is the plain fixed-point
    iteration; it converges where ‖W‖₂ < 1.

    Example:
        >>> example = Equilibrium.example()
        >>> example.problem.structure.name
        'GENERAL'
    """

    structure = Structure.GENERAL

    def __repr__(self) -> str:
        return "Equilibrium()"

    def layer(self, inner: Tensor, outer: Parameters, batch: Tensor) -> Tensor:
        """tanh(Wz + Uu + b) ``[inputs, units]``."""
        return torch.tanh(inner @ outer["W"].mT + batch @ outer["U"].mT + outer["b"])

    def stationarity(self, inner: Tensor, outer: Parameters, batch: Tensor) -> Tensor:
        """Z − tanh(Wz + Uu + b) ``[inputs, units]``."""
        return inner - self.layer(inner, outer, batch)

    def initial_inner(self, outer: Parameters, batch: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(batch @ outer["U"].mT)

    def outer_objective(self, inner: Tensor, outer: Parameters, batch: Tensor) -> Tensor:
        """Half the squared error of the read-out Cz, per input."""
        return 0.5 * ((inner @ outer["C"].mT - batch) ** 2).sum() / len(batch)

    def metrics(self, inner: Tensor, outer: Parameters, batch: Tensor) -> dict[str, Tensor]:
        """``mse``, the squared error per input."""
        return {"mse": 2 * self.outer_objective(inner, outer, batch)}

    def exact_hypergradient(self, outer: Parameters, task: Task | TaskBatch) -> Parameters:
        """The formula with dense float64 solves, the weighted mean over tasks."""
        x = {key: leaf.detach().double() for key, leaf in outer.items()}
        mean = mean_over_tasks(lambda one: self._hypergradient(x, one), task)
        return {key: leaf.to(outer[key].dtype) for key, leaf in mean.items()}

    def _hypergradient(self, x: Parameters, task: Task) -> Parameters:
        u, y = task.inner_batch.double(), task.outer_batch.double()
        z = self.initial_inner(x, u)
        for _ in range(_FIXED_POINT_STEPS):
            z = self.layer(z, x, u)
        slopes = 1 - z**2
        jacobians = torch.eye(z.shape[-1]).to(z) - slopes.unsqueeze(-1) * x["W"]
        gap = (z @ x["C"].mT - y) / len(y)
        dv = slopes * torch.linalg.solve(jacobians.mT, gap @ x["C"])
        return {"W": dv.mT @ z, "U": dv.mT @ u, "b": dv.sum(0), "C": gap.mT @ z}

    @classmethod
    def generated(
        cls,
        units: int = 16,
        features: int = 4,
        inputs: int = 10,
        outputs: int = 2,
        norm: float = 0.8,
        tasks: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> Example:
        """Random parameters; the targets are sines of random projections of the inputs.

        Args:
            units: Length of a hidden state.
            features: Length of an input.
            inputs: Inputs of one task, N.
            outputs: Length of a target.
            norm: ‖W‖₂, in (0, 1).
            tasks: Number of stacked tasks; None: one `Task`.
            seed: Seed of everything random; the global generator is not touched.
            dtype: Of data and outer variable. The exact hypergradient is that of the rounded data.

        Raises:
            ValueError: A setting is out of range; it is named.
        """
        sizes = {"units": units, "features": features, "inputs": inputs, "outputs": outputs}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1")
        if not 0.0 < norm < 1.0:
            raise ValueError(f"`norm` is {norm}; a contraction needs a norm in (0, 1)")

        def draw(name: str | int, *shape: int) -> Tensor:
            random = generator(seed, name, "equilibrium")
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        w = draw("W", units, units)
        outer = {
            "W": norm * w / torch.linalg.matrix_norm(w, 2),
            "U": draw("U", units, features) / features**0.5,
            "b": 0.1 * draw("b", units),
            "C": draw("C", outputs, units) / units**0.5,
        }
        outer = {key: leaf.to(dtype) for key, leaf in outer.items()}
        directions = draw("directions", features, outputs) / features**0.5
        data = []
        for i in range(1 if tasks is None else tasks):
            u = draw(i, inputs, features)
            data.append(Task(u.to(dtype), (2 * u @ directions).sin().to(dtype), key=i))
        task = data[0] if tasks is None else Task.stack(data)
        problem = cls()
        return Example(
            problem,
            outer,
            task,
            GradientDescent(
                lr=1.0, max_steps=_FIXED_POINT_STEPS, tol=1e-11 if dtype == torch.float64 else 3e-6
            ),
            # The rounding of W may lengthen it.
            lipschitz=1.0 + norm * (1 + 1e-6),
            mu=1.0 - norm * (1 + 1e-6),
            gradient=problem.exact_hypergradient(outer, task),
            note=f"deep-equilibrium layer, {inputs} inputs of {units} units, norm {norm:g}",
        )

    @classmethod
    def example(
        cls, *, tasks: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> Example:
        """A small instance; see `Example`."""
        return cls.generated(6, 3, 5, tasks=tasks, seed=seed, dtype=dtype)
