r"""Cournot competition under taxes: the inner problem is a game (Cournot, 1838).

Firm $i$ sells $z_i$ at the price $p(Q) = a e^{-Q/s}$, $Q = \sum_j z_j$, and pays
$c_i z_i + \tfrac12 k_i z_i^2$ to make it and a tax of $x_i$ a piece. Nobody gains by moving alone
where

$$F_i(x, z) = -p(Q) - p'(Q) z_i + c_i + k_i z_i + x_i = 0 .$$

The regulator counts the harm of the emissions $e^\top z$, the surplus that the market makes, and
what it costs to collect:

$$f(x, z) = \tfrac{h}2 (e^\top z)^2 - \int_0^Q p + \sum_i \left(c_i z_i + \tfrac12 k_i z_i^2\right)
  + \tfrac\rho2 \|x\|^2 .$$

The Jacobian of the game, $J = D + u \mathbf 1^\top$ with $D_{ii} = k_i - p'$ and
$u_i = -p' - p'' z_i$, is not symmetric; and as $\partial_x F = I$ (Sherman and Morrison, 1950)

$$\frac{dF}{dx} = \rho x - J^{-\top} \partial_z f, \qquad
  J^{-\top} r = D^{-1} r - D^{-1} \mathbf 1\, \frac{u^\top D^{-1} r}{1 + u^\top D^{-1} \mathbf 1}.$$
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.problem import BilevelProblem, Structure
from bilevel.registry import PROBLEMS
from bilevel.solvers import GradientDescent
from bilevel.task import Task, TaskBatch

from .analytic import disc_bounds, mean_over_tasks, tasks_of
from .example import Example
from .seeding import generator

__all__ = ["Cournot"]

Market = dict[str, Tensor]
_NEWTON_STEPS = 50


@PROBLEMS.register("cournot")
class Cournot(BilevelProblem):
    """Taxes on the firms of a market in Cournot equilibrium.

    The inner variable is z ``[firms]``, the quantities; the outer variable x ``[firms]``, the taxes
    a piece (subsidies where negative). The inner batch is ``{"cost": c [firms],
    "slope": k [firms], "demand": a 0-d, "scale": s 0-d}``; the outer batch has these and
    ``"emissions"``: e ``[firms]``.

    Args:
        harm: h ≥ 0.
        collection: ρ ≥ 0.

    Example:
        >>> example = Cournot.generated(firms=4)
        >>> example.gradient.shape
        torch.Size([4])
    """

    structure = Structure.GENERAL

    def __init__(self, harm: float = 0.5, collection: float = 0.1) -> None:
        self.harm, self.collection = harm, collection

    def __repr__(self) -> str:
        return f"Cournot(harm={self.harm}, collection={self.collection})"

    def price(self, inner: Tensor, batch: Market) -> Tensor:
        """p(Q), 0-d."""
        return batch["demand"] * (-inner.sum() / batch["scale"]).exp()

    def stationarity(self, inner: Tensor, outer: Tensor, batch: Market) -> Tensor:
        """What each firm loses by one more piece ``[firms]``."""
        price = self.price(inner, batch)
        own = price / batch["scale"] * inner
        return own - price + batch["cost"] + batch["slope"] * inner + outer

    def initial_inner(self, outer: Tensor, batch: Market) -> Tensor:
        """Half a piece for each firm."""
        return torch.full_like(batch["cost"], 0.5)

    def outer_objective(self, inner: Tensor, outer: Tensor, batch: Market) -> Tensor:
        """Harm minus surplus plus the cost of collecting."""
        surplus = batch["scale"] * (batch["demand"] - self.price(inner, batch))
        costs = (batch["cost"] * inner + 0.5 * batch["slope"] * inner**2).sum()
        harm = 0.5 * self.harm * (batch["emissions"] @ inner) ** 2
        return harm - surplus + costs + 0.5 * self.collection * (outer**2).sum()

    def metrics(self, inner: Tensor, outer: Tensor, batch: Market) -> dict[str, Tensor]:
        """``price`` and ``emissions``."""
        return {
            "price": self.price(inner, batch),
            "emissions": batch["emissions"] @ inner,
        }

    def equilibrium(self, outer: Tensor, batch: Market) -> Tensor:
        """z*(x) ``[firms]`` of one task by Newton's method, float64."""
        x, market = outer.double(), _double(batch)
        z = self.initial_inner(x, market)
        for _ in range(_NEWTON_STEPS):
            z = z - torch.linalg.solve(self.jacobian(z, market), self.stationarity(z, x, market))
        return z

    def jacobian(self, inner: Tensor, batch: Market) -> Tensor:
        """J = D + u1ᵀ ``[firms, firms]``, float64."""
        diagonal, u = self._parts(inner.double(), _double(batch))
        return diagonal.diag() + u.unsqueeze(-1)

    def _parts(self, z: Tensor, market: Market) -> tuple[Tensor, Tensor]:
        """The diagonal of D and u, ``[firms]`` both."""
        slope = self.price(z, market) / market["scale"]
        return market["slope"] + slope, slope * (1 - z / market["scale"])

    def exact_hypergradient(self, outer: Tensor, task: Task | TaskBatch) -> Tensor:
        """dF/dx ``[firms]`` by the formula in float64, the weighted mean over tasks."""
        x = outer.detach().double()
        return mean_over_tasks(lambda one: self._hypergradient(x, one), task).to(outer.dtype)

    def _hypergradient(self, x: Tensor, task: Task) -> Tensor:
        z, market = self.equilibrium(x, task.inner_batch), _double(task.outer_batch)
        diagonal, u = self._parts(z, market)
        e = market["emissions"]
        rhs = self.harm * (e @ z) * e - self.price(z, market)
        rhs = (rhs + market["cost"] + market["slope"] * z) / diagonal
        v = rhs - (u @ rhs) / (1 + (u / diagonal).sum()) / diagonal
        return self.collection * x - v

    @classmethod
    def generated(
        cls,
        firms: int = 10,
        tasks: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        tax: float = 0.1,
    ) -> Example:
        """Random firms of different costs and emissions; the tasks are different markets.

        Args:
            firms: Number of firms.
            tasks: Number of stacked tasks; None: one `Task`.
            seed: Seed of everything random; the global generator is not touched.
            dtype: Of data and outer variable. The exact hypergradient is that of the rounded data.
            tax: Every entry of the outer variable.

        Raises:
            ValueError: ``firms`` is below 2.
        """
        if firms < 2:
            raise ValueError(f"`firms` is {firms}; a game needs at least 2")
        data = [_market(firms, seed, i, dtype) for i in range(1 if tasks is None else tasks)]
        task = data[0] if tasks is None else Task.stack(data)
        outer = torch.full((firms,), tax, dtype=dtype)
        problem = cls()
        jacobians = [
            problem.jacobian(point(outer, one.inner_batch), one.inner_batch)
            for one in tasks_of(task)
            for point in (problem.initial_inner, problem.equilibrium)
        ]
        mu, lipschitz = disc_bounds(jacobians)
        return Example(
            problem,
            outer,
            task,
            GradientDescent(
                lr=2 / (lipschitz + mu),
                max_steps=2000,
                tol=1e-11 if dtype == torch.float64 else 3e-6,
            ),
            lipschitz=lipschitz,
            mu=mu,
            gradient=problem.exact_hypergradient(outer, task),
            note=f"Cournot competition of {firms} firms under taxes",
        )

    @classmethod
    def example(
        cls, *, tasks: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> Example:
        """A small instance; see `Example`."""
        return cls.generated(8, tasks, seed, dtype)


def _market(firms: int, seed: int, position: int, dtype: torch.dtype) -> Task:
    random = generator(seed, position, "cournot")

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=random, dtype=torch.float64)

    inner = {
        "cost": uniform(0.5, 2.0, firms),
        "slope": uniform(1.0, 2.0, firms),
        "demand": uniform(15.0, 25.0),
        # Demand reaches as many firms as there are.
        "scale": uniform(1.8, 2.2) * firms / 8,
    }
    inner = {key: tensor.to(dtype) for key, tensor in inner.items()}
    outer = {**inner, "emissions": uniform(0.2, 1.0, firms).to(dtype)}
    return Task(inner, outer, key=position)


def _double(batch: Market) -> Market:
    return {key: tensor.double() for key, tensor in batch.items()}
