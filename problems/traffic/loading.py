r"""Logit loading over all walks, by one linear solve for each destination.

Travellers at node $i$ on their way to $d$ take the link $ij$ with probability
$W_{ij} z_j / z_i$ (Dial, 1971; Akamatsu, 1996; Baillon and Cominetti, 2008), where

$$W_{ij} = e^{-\theta (c_{ij} + \pi_j - \pi_i)}, \qquad (I - W) z = e_d, \qquad
  V_i = \pi_i - \tfrac1\theta \ln z_i$$

and $\pi$ are the least costs to $d$: any numbers cancel, these keep every $z_i$ above 1. The
expected cost $V$ has the flows as derivatives, $X = \sum_{od} q_{od}\, \partial V_{od} /
\partial c$. The sum over walks, cycles included, converges where the spectral radius of $W$ is
below 1, for which $\theta \min_a c_a > \ln(\text{largest out-degree})$ is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .network import RoadNetwork
from .routes import Routes

__all__ = ["LogitLoading"]


class LogitLoading:
    """The logit loading of one network.

    Args:
        network: The network; its pairs with trips say which destinations there are.
        dispersion: θ > 0 in 1 / time: the larger, the closer to shortest routes alone.

    Raises:
        ValueError: θ is not positive, or so small that the sum over walks diverges even though
            no cost is below the free-flow times.
    """

    def __init__(self, network: RoadNetwork, dispersion: float) -> None:
        if not (dispersion > 0 and math.isfinite(dispersion)):
            raise ValueError(f"`dispersion` is {dispersion}; it is finite and > 0")
        self.network = network
        self.dispersion = float(dispersion)
        self._check_convergence()

    @cached_property
    def destinations(self) -> Tensor:
        """The zones that trips lead to, number − 1, ``[destinations]``, int64."""
        return (self.network.demand > 0).any(0).nonzero().squeeze(-1)

    @cached_property
    def usable(self) -> Tensor:
        """Whether a link can lie on a walk to a destination ``[destinations, links]``, bool."""
        return self.network.routes.usable[self.destinations]

    @cached_property
    def reaches(self) -> Tensor:
        """Whether a walk leads from a node to a destination ``[destinations, nodes]``, bool."""
        return self.network.routes.reaches[self.destinations]

    def weights(self, cost: Tensor) -> tuple[Tensor, Tensor]:
        """W on the links ``[destinations, links]``, and π ``[destinations, nodes]``."""
        tail, head = self.network.tail.to(cost.device), self.network.head.to(cost.device)
        potential = _Potentials.apply(cost.detach(), self._potentials)
        exponent = cost + potential[:, head] - potential[:, tail]
        usable = self.usable.to(cost.device)
        # Masked before the exponential as well: inf · 0 would be a NaN in the derivative.
        exponent = torch.where(usable, exponent, 0.0)
        return torch.where(usable, (-self.dispersion * exponent).exp(), 0.0), potential

    def matrix(self, weights: Tensor) -> Tensor:
        """I − W ``[destinations, nodes, nodes]``."""
        n, count = self.network.nodes, len(self.destinations)
        place = (self.network.tail * n + self.network.head).to(weights.device)
        flat = torch.eye(n, dtype=weights.dtype, device=weights.device).reshape(-1)
        whole = flat.expand(count, n * n).index_add(1, place, -weights)
        return whole.reshape(count, n, n)

    def _values(self, cost: Tensor) -> tuple[Tensor, Tensor, Tensor, _Walks]:
        """W, π, z and the solver of systems with I − W."""
        weights, potential = self.weights(cost)
        lu, pivots = torch.linalg.lu_factor(self.matrix(weights.detach()))
        walks = _Walks(
            weights,
            lu,
            pivots,
            self.network.tail.to(cost.device),
            self.network.head.to(cost.device),
        )
        end = torch.zeros_like(potential).scatter(
            1, self.destinations.to(cost.device).unsqueeze(-1), 1.0
        )
        # Where no walk leads to the destination nobody travels, and z is 0.
        z = torch.where(self.reaches.to(cost.device), walks.solve(end), 1.0)
        return weights, potential, z, walks

    def expected_cost(self, cost: Tensor, demand: Tensor) -> Tensor:
        """Σ q V, the expected cost of all trips, 0-d.

        Args:
            cost: c ``[links]``, times with tolls.
            demand: q ``[zones, zones]``.
        """
        _, potential, z, _ = self._values(cost)
        return (self._trips(demand) * (potential - z.log() / self.dispersion)).sum()

    def flows(self, cost: Tensor, demand: Tensor) -> Tensor:
        """X, the flows ``[links]``; arguments as in `expected_cost`."""
        weights, _, z, walks = self._values(cost)
        visits = walks.solve(self._trips(demand) / z, transposed=True)
        return (visits[:, walks.tail] * weights * z[:, walks.head]).sum(0)

    def _trips(self, demand: Tensor) -> Tensor:
        """Trips to each destination from each node ``[destinations, nodes]``."""
        trips = demand[:, self.destinations.to(demand.device)].mT
        padded: Tensor = torch.nn.functional.pad(
            trips, (0, self.network.nodes - self.network.zones)
        )
        return padded

    def _potentials(self, cost: Tensor) -> Tensor:
        routes: Routes = self.network.routes
        found = torch.from_numpy(routes.to_zones(cost.double().cpu().numpy()))[self.destinations]
        return torch.where(found.isfinite(), found, 0.0).to(cost)

    def _check_convergence(self) -> None:
        cost = self.network.free_flow_time + self.network.toll
        weights, _ = self.weights(cost)
        ones = torch.ones(len(self.destinations), self.network.nodes, 1, dtype=torch.float64)
        found, failed = torch.linalg.solve_ex(self.matrix(weights), ones)
        # For W ≥ 0 the sum of its powers converges just where (I − W) x = 1 has a solution x ≥ 1.
        if bool((failed != 0).any()) or not bool((found >= 1.0 - 1e-9).all()):
            degree = max(degree for _, degree in self.network.graph.out_degree())
            least = float(cost.min())
            enough = math.log(max(degree, 1)) / least if least > 0 else math.inf
            raise ValueError(
                f"`dispersion` is {self.dispersion:g}, at which the sum over walks with cycles "
                f"diverges on {self.network.name}: I − W is singular, or has no positive inverse; "
                + (
                    f"raise it ({enough:.3g} is enough for certain)"
                    if math.isfinite(enough)
                    else "raise it, or give links of cost 0 a little time"
                )
            )


@dataclass(frozen=True)
class _Walks:
    """Systems with I − W, whose derivatives touch W on the links alone.

    Those of `torch.linalg.solve` are dense matrices, and factorised anew for each order.
    """

    weights: Tensor
    lu: Tensor
    pivots: Tensor
    tail: Tensor
    head: Tensor

    def solve(self, rhs: Tensor, *, transposed: bool = False) -> Tensor:
        """The solution ``[destinations, nodes]``, differentiable in W and in the right side."""
        found: Tensor = _Solve.apply(
            self.weights, rhs, self.lu, self.pivots, self.tail, self.head, transposed
        )
        return found


class _Solve(Function):
    """Z of (I − W) z = r, or of the transposed system, given the factors of I − W."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weights: Tensor,
        rhs: Tensor,
        lu: Tensor,
        pivots: Tensor,
        tail: Tensor,
        head: Tensor,
        transposed: bool,
    ) -> Tensor:
        found: Tensor = torch.linalg.lu_solve(lu, pivots, rhs.unsqueeze(-1), adjoint=transposed)
        return found.squeeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weights, _, lu, pivots, tail, head, ctx.transposed = inputs
        ctx.save_for_backward(weights, lu, pivots, tail, head, output)
        ctx.save_for_forward(weights, lu, pivots, tail, head, output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        weights, lu, pivots, tail, head, z = ctx.saved_tensors
        turned = not ctx.transposed
        u = _Solve.apply(weights, cotangent, lu, pivots, tail, head, turned)
        row, column = (head, tail) if ctx.transposed else (tail, head)
        return u[:, row] * z[:, column], u, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, weights_dot: Tensor | None, rhs_dot: Tensor | None, *_: Any) -> Tensor:
        weights, lu, pivots, tail, head, z = ctx.saved_tensors
        row, column = (head, tail) if ctx.transposed else (tail, head)
        rhs = torch.zeros_like(z) if rhs_dot is None else rhs_dot
        if weights_dot is not None:
            rhs = rhs.index_add(1, row, weights_dot * z[:, column])
        found: Tensor = _Solve.apply(weights, rhs, lu, pivots, tail, head, ctx.transposed)
        return found


class _Potentials(Function):
    """Least costs to the destinations, by Dijkstra's algorithm; constants for derivatives."""

    @staticmethod
    def forward(cost: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        return compute(cost)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, None]:
        return None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        return None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, None],
        cost: Tensor,
        compute: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, int]:
        costs = cost.movedim(in_dims[0] or 0, 0)
        return torch.stack([_Potentials.apply(one, compute) for one in costs]), 0
