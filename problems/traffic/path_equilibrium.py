r"""The exact user equilibrium as an inner problem: flows on the routes in use.

With one basic route for each pair and $h$ the flows on the others that are used,
$v = v_0 + E h$, Beckmann's objective is stationary in $h$ where all used routes of a pair cost the
same. As long as the same routes are used, this is the whole equilibrium, and

$$\lambda = (E^\top D E)^+ E^\top \partial_v f, \qquad
  \frac{dF}{dx} = \partial_x f - (\partial_x (t + \tau))^\top E \lambda, \qquad
  D = \mathrm{diag}(t'_a)$$

(Tobin and Friesz, 1988; Patriksson, 2004), which for added capacity is $(v_a - (E\lambda)_a)\,
\partial t_a / \partial y_a + 2 \vartheta d_a y_a$ and for tolls $-(E\lambda)_a$. Flows on routes
are not unique: $E^\top D E$ is singular, but the right-hand side lies in its range, so that
conjugate gradients from zero reach a solution, and $E\lambda$ is the same for all. Where a route is
as short as those in use without being used, the equilibrium has a kink, and this is the slope on
one side at best.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bilevel.problem import BilevelProblem, Structure
from bilevel.registry import PROBLEMS
from bilevel.solvers import GradientDescent
from bilevel.task import Task

from ..analytic import eigenvalue_bounds, mean_over_tasks
from ..example import Example
from ..seeding import generator
from .costs import beckmann, travel_time, travel_time_slope
from .decisions import Decision, TollDecision
from .network import RoadNetwork
from .user_equilibrium import UserEquilibrium, user_equilibrium

__all__ = ["PathEquilibrium", "equilibrium_under", "exact_hypergradient"]

_RANK = 1e-11


@PROBLEMS.register("path-equilibrium")
class PathEquilibrium(BilevelProblem):
    """A decision on a road network in user equilibrium, on the routes that are in use.

    The inner variable is h ``[routes − pairs]``, the flows on the routes in use other than the
    basic one of each pair; the outer variable is that of the decision. The inner and the outer
    batch are ``{"demand": q [zones, zones]}``.

    It holds near the equilibrium that it was made from: at another outer point, make it anew from
    the equilibrium there (`equilibrium_under`).

    Args:
        decision: What the outer variable does, and what it is worth.
        equilibrium: The user equilibrium whose routes are in use.

    Example:
        >>> import torch
        >>> from bilevel import hypergradient
        >>> from bilevel.solvers import ImplicitCG
        >>> decision = TollDecision(RoadNetwork.braess(), [(3, 4)])
        >>> toll = torch.tensor([5.0], dtype=torch.float64)
        >>> problem = PathEquilibrium(decision, equilibrium_under(decision, toll))
        >>> found = hypergradient(
        ...     problem,
        ...     toll,
        ...     problem.task(),
        ...     inner_solver=None,
        ...     inner=problem.path_flow,
        ...     method=ImplicitCG(),
        ... )
        >>> round(float(found.gradient) * 13, 6)
        -60.0
    """

    structure = Structure.SYMMETRIC

    def __init__(self, decision: Decision, equilibrium: UserEquilibrium) -> None:
        network = self.network = decision.network
        if equilibrium.network.ends != network.ends or equilibrium.network.pairs != network.pairs:
            raise ValueError(
                "`equilibrium` is of another network than `decision`; solve that of its own"
            )
        self.decision = decision
        self.equilibrium = equilibrium
        routes = torch.zeros(len(equilibrium.paths), network.links, dtype=torch.float64)
        for row, path in zip(routes, equilibrium.paths, strict=True):
            row[torch.from_numpy(path)] = 1.0
        flow, pair = equilibrium.path_flow, equilibrium.pair
        order = np.lexsort((flow, pair))
        last = np.append(pair[order][1:] != pair[order][:-1], True)
        basic = torch.from_numpy(order[last])
        others = torch.from_numpy(np.sort(order[~last]))
        self.basic = routes[basic]
        self.pair = torch.from_numpy(pair)[others]
        self.exchange = routes[others] - self.basic[self.pair]
        self.path_flow = torch.from_numpy(flow)[others]

    def __repr__(self) -> str:
        return f"PathEquilibrium({self.decision!r}, {len(self.path_flow)} exchanges)"

    def flows(self, inner: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """V ``[links]``."""
        pairs = torch.tensor(self.network.pairs, device=inner.device) - 1
        trips = batch["demand"][pairs[:, 0], pairs[:, 1]]
        return trips @ self.basic.to(inner) + inner @ self.exchange.to(inner)

    def inner_objective(self, inner: Tensor, outer: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Beckmann's objective."""
        flow = self.flows(inner, batch)
        capacity, toll = self.decision.capacity(outer), self.decision.toll(outer)
        return beckmann(self.network, flow, capacity, toll)

    def outer_objective(self, inner: Tensor, outer: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """What the decision is worth."""
        return self.decision.value(outer, self.flows(inner, batch))

    def initial_inner(self, outer: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The trips of each pair in equal parts on its routes."""
        pairs = torch.tensor(self.network.pairs) - 1
        trips = batch["demand"][pairs[:, 0], pairs[:, 1]]
        count = torch.bincount(self.pair, minlength=len(pairs)) + 1
        return (trips / count.to(trips))[self.pair]

    def metrics(self, inner: Tensor, outer: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``total_time`` and ``revenue``."""
        flow = self.flows(inner, batch)
        time = travel_time(self.network, flow, self.decision.capacity(outer))
        return {
            "total_time": (time * flow).sum(),
            "revenue": (self.decision.toll(outer) * flow).sum(),
        }

    def task(self, demand: Tensor | None = None) -> Task:
        """The task of a demand ``[zones, zones]``; default: the network's own."""
        demand = self.network.demand if demand is None else demand
        return Task({"demand": demand}, {"demand": demand})

    def exact_hypergradient(self, outer: Tensor, inner: Tensor, task: Task) -> Tensor:
        """dF/dx ``[k]`` at an equilibrium h by the formula, float64."""
        x = outer.detach().double().requires_grad_()
        batch = {key: value.double() for key, value in task.outer_batch.items()}
        flow = self.flows(inner.detach().double(), batch).requires_grad_()
        value = self.decision.value(x, flow)
        direct, slope = torch.autograd.grad(
            value, (x, flow), allow_unused=True, materialize_grads=True
        )
        capacity = self.decision.capacity(x)
        weight = travel_time_slope(self.network, flow.detach(), capacity.detach())
        shift = self._shift(weight, slope)
        cost = travel_time(self.network, flow.detach(), capacity) + self.decision.toll(x)
        (through,) = torch.autograd.grad((cost * shift).sum(), x)
        return direct - through

    def _shift(self, weight: Tensor, slope: Tensor) -> Tensor:
        """Eλ ``[links]``."""
        if not len(self.exchange):
            return torch.zeros_like(slope)
        H = (self.exchange * weight) @ self.exchange.mT
        values, vectors = torch.linalg.eigh(H)
        keep = values > _RANK * values[-1]
        part = vectors[:, keep]
        multipliers: Tensor = part @ ((part.mT @ (self.exchange @ slope)) / values[keep])
        return multipliers @ self.exchange

    @classmethod
    def example(
        cls, *, tasks: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> Example:
        """Tolls on all links of Braess's network, where all three routes are in use."""
        # In units in which the times are about 1.
        network = RoadNetwork.braess().scaled(time=0.02)
        decision = TollDecision(network)
        draws = torch.rand(tasks or 1, generator=generator(seed, "path-equilibrium"))
        data = []
        for i, draw in enumerate(draws.double().tolist()):
            demand = network.demand * (0.9 + 0.3 * draw)
            batch = {"demand": demand.to(dtype)}
            data.append(Task(batch, batch, key=i))
        task = data[0] if tasks is None else Task.stack(data)
        outer = torch.tensor([0.02, 0.0, 0.01, 0.05, 0.0], dtype=dtype)
        problem = cls(decision, equilibrium_under(decision, outer))
        H = (problem.exchange * travel_time_slope(network, network.capacity)) @ problem.exchange.mT
        mu, lipschitz = eigenvalue_bounds([H])

        def gradient(one: Task) -> Tensor:
            batch = {key: value.double() for key, value in one.inner_batch.items()}
            h = problem.initial_inner(outer, batch).requires_grad_()
            # The times are linear, so that one step of Newton's method is exact.
            value = problem.inner_objective(h, outer.double(), batch)
            (slope,) = torch.autograd.grad(value, h)
            return problem.exact_hypergradient(
                outer, h.detach() - torch.linalg.solve(H, slope), one
            )

        return Example(
            problem,
            outer,
            task,
            GradientDescent(
                lr=2 / (lipschitz + mu),
                max_steps=500,
                tol=1e-12 if dtype == torch.float64 else 3e-6,
            ),
            lipschitz=lipschitz * (1 + 1e-6),
            mu=mu * (1 - 1e-6),
            gradient=mean_over_tasks(gradient, task).to(dtype),
            note="tolls on Braess's network in user equilibrium, all three routes in use",
        )


def equilibrium_under(
    decision: Decision,
    outer: Tensor,
    *,
    start: UserEquilibrium | None = None,
    tol: float = 1e-13,
) -> UserEquilibrium:
    """The exact user equilibrium under a decision.

    Args:
        decision: What the outer variable does.
        outer: The outer variable ``[k]``.
        start: An equilibrium to start from.
        tol: The relative gap to reach.

    Raises:
        SolveError: The gap is not reached.
        ValueError: A capacity or a cost is impossible.
    """
    x = outer.detach().double().cpu()
    return user_equilibrium(
        decision.network,
        capacity=decision.capacity(x),
        toll=decision.toll(x),
        start=start,
        tol=tol,
    )


def exact_hypergradient(
    decision: Decision, outer: Tensor, *, start: UserEquilibrium | None = None
) -> tuple[float, Tensor, UserEquilibrium]:
    """What a decision is worth in exact user equilibrium, and its slope by the formula.

    Args:
        decision: The decision.
        outer: The outer variable ``[k]``.
        start: An equilibrium to start from.

    Returns:
        The value, the hypergradient ``[k]`` in float64, and the equilibrium.

    Raises:
        SolveError: The equilibrium is not reached.

    Example:
        >>> decision = TollDecision(RoadNetwork.braess(), [(3, 4)])
        >>> value, slope, _ = exact_hypergradient(decision, torch.tensor([0.0]))
        >>> round(value, 6), round(float(slope) * 13, 6)
        (552.0, -80.0)
    """
    found = equilibrium_under(decision, outer, start=start)
    problem = PathEquilibrium(decision, found)
    gradient = problem.exact_hypergradient(outer, problem.path_flow, problem.task())
    value = decision.value(outer.detach().double().cpu(), found.flow)
    return float(value), gradient, found
