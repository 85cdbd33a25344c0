r"""Stochastic user equilibrium in link space: a smooth inner problem (Sheffi and Powell, 1982).

Travellers choose among all walks by the logit of `LogitLoading`. At equilibrium the flows are those
that their own travel times call forth, $v = X(t(v) + \tau)$, which is where

$$g(y, v) = \sum_a \Big[v_a t_a(v_a) - \int_0^{v_a} t_a\Big]
  - \sum_{od} q_{od} V_{od}(t(v) + \tau)$$

is stationary: $\nabla g = D (v - X)$ with $D = \mathrm{diag}(t'_a)$. It is not convex in $v$, but
is in $t(v)$, and its Hessian at the solution, $D + D M D$ with
$M = -\partial X / \partial t \succeq 0$, is positive definite.

The inner variable $s$ has $ds = \sqrt{D}\, dv$ at the capacities that the network began with, so
that $s^2 \propto v^{p+1}$ and the Hessian is about $I + \sqrt D M \sqrt D$, whose eigenvalues are
at least 1. In it the first sum of $g$ is a plain square. $g$ is divided by the total travel time
of the empty roads, so that tolerances are relative.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from bilevel.inner_solver import InnerSolver
from bilevel.problem import BilevelProblem, Structure
from bilevel.solvers import HessianFree
from bilevel.task import Task

from .decisions import Decision
from .loading import LogitLoading

__all__ = ["StochasticEquilibrium"]

_FLOOR = 1e-30  # of s² / κ: a flow of 1e-6 of the capacity for p = 4
_START = 1e-3


class StochasticEquilibrium(BilevelProblem):
    """A decision on a road network whose travellers choose by logit, as a bilevel problem.

    The inner variable is s ``[congestible links]``; `flows` and `times` read it. The outer variable
    is that of the decision, ``[k]``. The inner and the outer batch are both ``{"demand": q
    [zones, zones]}``, see `task`: tasks are hours of the day, or scenarios, whose pairs are among
    the network's own.

    The outer objective is evaluated at the times t(v) and the flows X(t(v)) that they call forth,
    which are v itself at equilibrium. It then depends on v through the times alone, as it should:
    what flows on a link whose time does not change with it, no inner solver finds exactly.

    Args:
        decision: What the outer variable does, and what it is worth.
        dispersion: θ, in 1 / time. Walks with cycles make the sum over walks diverge where it is
            too small; θ · min t⁰ > ln(largest out-degree) is enough.

    Raises:
        ValueError: θ is not positive, or the sum over walks diverges.
    """

    structure = Structure.SYMMETRIC

    def __init__(self, decision: Decision, dispersion: float) -> None:
        self.decision = decision
        self.network = decision.network
        self.dispersion = float(dispersion)
        self.loading = LogitLoading(self.network, dispersion)
        if not len(self.live):
            raise ValueError(
                f"no link's time depends on its flow in {self.network.name}: `b` or `power` is 0 "
                "everywhere, so that there is no equilibrium to find"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.decision!r}, dispersion={self.dispersion:g})"

    def with_dispersion(self, dispersion: float) -> StochasticEquilibrium:
        """The same problem at another θ; its inner variable means the same.

        Raises:
            ValueError: θ is not positive, or the sum over walks diverges.
        """
        return StochasticEquilibrium(self.decision, dispersion)

    # The inner variable

    @cached_property
    def live(self) -> Tensor:
        """Numbers of the links whose time depends on their flow, if any can come, int64."""
        net = self.network
        moves = net.free_flow_time * net.b * net.power > 0
        return (moves & self.loading.usable.any(0)).nonzero().squeeze(-1)

    @cached_property
    def scale(self) -> float:
        """The total travel time of the empty roads, by which g is divided."""
        net = self.network
        costs = net.routes.to_zones((net.free_flow_time + net.toll).numpy())[:, : net.zones]
        least = torch.from_numpy(costs).mT
        total = float(torch.where(net.demand > 0, net.demand * least, 0.0).sum())
        return total or 1.0

    @cached_property
    def _columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """T⁰b, c, p and κ = s² / (v / c)^(p+1) of the live links, float64."""
        net = self.network
        t, b, p, c = (x[self.live] for x in (net.free_flow_time, net.b, net.power, net.capacity))
        kappa = t * b * p * c * 4.0 / ((p + 1.0) ** 2 * self.scale)
        return t * b, c, p, kappa

    def coordinates(self, flow: Tensor) -> Tensor:
        """The inner variable s ``[congestible links]`` of flows ``[links]``."""
        _, c, p, kappa = (x.to(flow) for x in self._columns)
        share = flow[self.live.to(flow.device)] / c
        return kappa.sqrt() * share ** ((p + 1.0) / 2.0)

    def times(self, inner: Tensor, outer: Tensor) -> Tensor:
        """t(v) ``[links]``, without tolls."""
        tb, c, p, kappa = (x.to(inner) for x in self._columns)
        live = self.live.to(inner.device)
        # (v / c)^(p+1), kept off 0, where its powers have no derivative.
        share = inner**2 / kappa + _FLOOR
        wider = (c / self.decision.capacity(outer)[live]) ** p
        late = tb * wider * share ** (p / (p + 1.0))
        return self.network.free_flow_time.to(inner).index_add(0, live, late)

    def flows(self, inner: Tensor, outer: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """X(t(v) + τ) ``[links]``: at equilibrium the flows on all links."""
        cost = self.times(inner, outer) + self.decision.toll(outer)
        return self.loading.flows(cost, batch["demand"])

    # The problem

    def inner_objective(self, inner: Tensor, outer: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """G(s), Sheffi and Powell's objective over `scale`."""
        tb, c, p, kappa = (x.to(inner) for x in self._columns)
        share = inner**2 / kappa + _FLOOR
        wider = (c / self.decision.capacity(outer)[self.live.to(inner.device)]) ** p
        stored = (tb * p / (p + 1.0) * c * wider * share).sum()
        cost = self.times(inner, outer) + self.decision.toll(outer)
        return (stored - self.loading.expected_cost(cost, batch["demand"])) / self.scale

    def outer_objective(self, inner: Tensor, outer: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """What the decision is worth at the times and the flows that they call forth."""
        time = self.times(inner, outer)
        cost = time + self.decision.toll(outer)
        flow = self.loading.flows(cost, batch["demand"])
        return self.decision.objective(outer, time, flow)

    def initial_inner(self, outer: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The loading of the empty roads."""
        demand = batch["demand"]
        cost = (self.network.free_flow_time + self.network.toll).to(demand)
        flow = self.loading.flows(cost, demand)
        # At s = 0 the slope of g vanishes whatever flow the link ought to carry.
        return self.coordinates(torch.maximum(flow, _START * self.network.capacity.to(flow)))

    def metrics(self, inner: Tensor, outer: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``total_time`` and ``revenue``."""
        time = self.times(inner, outer)
        toll = self.decision.toll(outer)
        flow = self.loading.flows(time + toll, batch["demand"])
        return {"total_time": (time * flow).sum(), "revenue": (toll * flow).sum()}

    def task(self, demand: Tensor | None = None) -> Task:
        """The task of a demand ``[zones, zones]``; default: the network's own.

        Raises:
            ValueError: It has trips between zones where the network has none.
        """
        own = self.network.demand
        demand = own if demand is None else demand
        if demand.shape != own.shape or bool(((demand > 0) & (own == 0)).any()):
            raise ValueError(
                f"`demand` is {list(demand.shape)}, or has trips between zones where the network, "
                f"{list(own.shape)}, has none; add the pair with `network.with_demand`"
            )
        return Task({"demand": demand}, {"demand": demand})

    def solver(self, tol: float = 1e-10, max_steps: int = 100) -> InnerSolver:
        """Newton's method from the loading of the empty roads, which solves the inner problem.

        Args:
            tol: In ‖∂_s g‖, relative by the scale of g.
            max_steps: The most Newton steps.
        """
        return HessianFree(max_steps=max_steps, tol=tol, cg_steps=200, cg_rtol=1e-2)
