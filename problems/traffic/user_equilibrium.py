r"""Exact user equilibrium: routes by column generation, their flows by projected Newton.

Nobody gains by another route (Wardrop, 1952) where Beckmann's objective is least (Beckmann et al.,
1956):

$$\min_{f \ge 0} \sum_a \int_0^{v_a} (t_a(w) + \tau_a)\, dw, \qquad v = \Delta f, \quad
  \Lambda f = q.$$

Each round asks Dijkstra for routes that are shorter than those known, then minimises on the routes
known: by Newton's method in the flows relative to one basic route of each pair, projected on
$f \ge 0$ (Bertsekas, 1982), and, where that fails to descend, by moving flow pair by pair from
dearer routes to the cheapest (Jayakrishnan et al., 1994).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.sparse import csr_matrix
from torch import Tensor

from bilevel.errors import SolveError

from .costs import beckmann, travel_time
from .network import RoadNetwork

__all__ = ["UserEquilibrium", "system_optimum", "user_equilibrium"]

Numbers = NDArray[np.float64]
Indices = NDArray[np.int64]

_NEWTON_STEPS = 30
_HALVINGS = 12
_NEAR = 1e-3
_JITTER = 1e-9
_USED = 1e-11


@dataclass(frozen=True, eq=False)
class UserEquilibrium:
    """A user equilibrium: link flows, and the routes that carry them.

    Attributes:
        network: The network.
        flow: v ``[links]``, float64.
        time: t(v) without tolls ``[links]``.
        cost: t(v) + τ ``[links]``.
        capacity: c + y ``[links]``.
        toll: τ ``[links]``, the network's own included.
        gap: Σ f (cost − least cost) / Σ v · cost, over all routes.
        rounds: Shortest-route searches.
        paths: The routes known, each an array of links.
        pair: For each route the number of its pair in ``network.pairs``, ``[routes]``.
        path_flow: f ``[routes]``.
    """

    network: RoadNetwork
    flow: Tensor
    time: Tensor
    cost: Tensor
    capacity: Tensor
    toll: Tensor
    gap: float
    rounds: int
    paths: list[Indices] = field(repr=False)
    pair: Indices = field(repr=False)
    path_flow: Numbers = field(repr=False)

    @property
    def total_time(self) -> float:
        """TSTT, the total travel time without tolls."""
        return float((self.flow * self.time).sum())

    @property
    def beckmann(self) -> float:
        """Beckmann's objective, tolls included."""
        return float(beckmann(self.network, self.flow, self.capacity, self.toll))

    @property
    def revenue(self) -> float:
        """Σ v τ."""
        return float((self.flow * self.toll).sum())

    def __repr__(self) -> str:
        return (
            f"UserEquilibrium({self.network.name}: total time {self.total_time:.10g}, gap "
            f"{self.gap:.1e}, {len(self.paths)} routes)"
        )


def user_equilibrium(
    network: RoadNetwork,
    *,
    capacity: Tensor | None = None,
    toll: Tensor | None = None,
    start: UserEquilibrium | None = None,
    tol: float = 1e-13,
    max_rounds: int = 200,
) -> UserEquilibrium:
    """The user equilibrium of a network, to a relative gap.

    Args:
        network: The network.
        capacity: c + y ``[links]``; default: the network's own.
        toll: τ ``[links]`` in units of time; default: the network's own.
        start: An equilibrium of the same network and demand to start from, at other capacities or
            tolls.
        tol: The gap to reach; 1e-14 is about what rounding leaves.
        max_rounds: The most shortest-route searches.

    Raises:
        SolveError: The gap is not reached.
        ValueError: A capacity is not positive, or t⁰ + τ is negative on some link.

    Example:
        >>> found = user_equilibrium(RoadNetwork.braess())
        >>> round(found.total_time, 6), len(found.paths)
        (552.0, 3)
    """
    model = _Model.of(network, capacity, toll)
    routes = _RouteSet(network, start)
    gap, rounds = np.inf, 0
    while rounds < max_rounds and not gap <= tol:
        rounds += 1
        gap, new = routes.extend(model, routes.flow())
        if not gap <= tol:
            # On too few routes, accuracy beyond the gap is wasted.
            routes.equilibrate(model, max(0.1 * tol, 1e-3 * gap if new else 0.0))
    if not gap <= tol:
        raise SolveError(
            f"the user equilibrium of {network.name} has a relative gap of {gap:.1e} after "
            f"{rounds} rounds, above `tol` = {tol:.1e}; raise `max_rounds`, or `tol`"
        )
    routes.forget(model)
    found = torch.from_numpy(routes.flow())
    time = travel_time(network, found, model.capacity_tensor)
    return UserEquilibrium(
        network,
        found,
        time,
        time + model.toll_tensor,
        model.capacity_tensor,
        model.toll_tensor,
        float(gap),
        rounds,
        routes.paths,
        routes.pair,
        routes.f,
    )


def system_optimum(
    network: RoadNetwork,
    *,
    capacity: Tensor | None = None,
    start: UserEquilibrium | None = None,
    tol: float = 1e-13,
) -> tuple[UserEquilibrium, Tensor]:
    """The least total travel time, and the tolls v t'(v) whose user equilibrium it is.

    It is the user equilibrium of the marginal times t + v t' (Pigou, 1920), which for this kind of
    travel time have b (p + 1) in place of b. The network's own tolls play no part.

    Args:
        network: The network.
        capacity: c + y ``[links]``; default: the network's own.
        start: As in `user_equilibrium`, of an earlier system optimum.
        tol: The gap to reach.

    Returns:
        The flows, with the travel times and tolls of the network itself, and those tolls
        ``[links]``.

    Raises:
        SolveError: The gap is not reached.

    Example:
        >>> best, toll = system_optimum(RoadNetwork.braess())
        >>> round(best.total_time, 6), round(best.revenue, 3)
        (498.0, 198.0)
    """
    marginal = network.with_links(
        {
            (i, j): {"b": link["b"] * (link["power"] + 1.0), "toll": 0.0}
            for i, j, link in network.rows
        }
    )
    if start is not None and start.network is not network:
        raise ValueError("`start` is of another network; pass an optimum of the same one, or None")
    found = user_equilibrium(marginal, capacity=capacity, start=start, tol=tol)
    time = travel_time(network, found.flow, found.capacity)
    toll = found.cost - time
    best = UserEquilibrium(
        network,
        found.flow,
        time,
        time + toll,
        found.capacity,
        toll,
        found.gap,
        found.rounds,
        found.paths,
        found.pair,
        found.path_flow,
    )
    return best, toll


@dataclass(frozen=True, eq=False)
class _Model:
    """Travel times in NumPy, at given capacities and tolls."""

    t: Numbers
    c: Numbers
    b: Numbers
    p: Numbers
    toll: Numbers
    capacity_tensor: Tensor
    toll_tensor: Tensor

    @classmethod
    def of(cls, network: RoadNetwork, capacity: Tensor | None, toll: Tensor | None) -> _Model:
        c = _column("capacity", capacity, network.capacity)
        fixed = _column("toll", toll, network.toll)
        if bool((c <= 0).any()):
            link = int((c <= 0).nonzero()[0])
            raise ValueError(
                f"`capacity` of the link {network.ends[link]} is {float(c[link]):g}; it is > 0"
            )
        low = network.free_flow_time + fixed < 0
        if bool(low.any()):
            link = int(low.nonzero()[0])
            raise ValueError(
                f"`toll` of the link {network.ends[link]} is {float(fixed[link]):g}, below its "
                "free-flow time with the sign changed: a route could pay for itself; raise it"
            )
        t, b, p = (x.numpy() for x in (network.free_flow_time, network.b, network.power))
        return cls(t, c.numpy(), b, p, fixed.numpy(), c, fixed)

    def cost(self, v: Numbers) -> Numbers:
        value: Numbers = self.t * (1.0 + self.b * (v / self.c) ** self.p) + self.toll
        return value

    def slope(self, v: Numbers) -> Numbers:
        power = np.maximum(self.p - 1.0, 0.0)
        value: Numbers = self.t * self.b * self.p / self.c * (v / self.c) ** power
        return value

    def objective(self, v: Numbers) -> float:
        whole = v * (self.t + self.toll)
        whole = whole + self.t * self.b / (self.p + 1.0) * self.c * (v / self.c) ** (self.p + 1.0)
        return float(whole.sum())


def _column(name: str, given: Tensor | None, own: Tensor) -> Tensor:
    if given is None:
        return own
    found = torch.as_tensor(given).detach().double().cpu()
    if found.shape != own.shape or not bool(found.isfinite().all()):
        raise ValueError(
            f"`{name}` is {list(found.shape)} with {int((~found.isfinite()).sum())} entries that "
            f"are not finite; pass one finite number for each of the {len(own)} links"
        )
    return found


def _relative(excess: Any, total: Any) -> float:
    """The gap; routes that cost nothing leave none."""
    if total > 0.0:
        return float(excess / total)
    return 0.0 if excess <= 0.0 else float("inf")


class _RouteSet:
    """The routes known so far and their flows."""

    def __init__(self, network: RoadNetwork, start: UserEquilibrium | None) -> None:
        self.network = network
        pairs = np.array(network.pairs, dtype=np.int64) - 1
        self.pairs = pairs
        self.demand: Numbers = network.demand.numpy()[pairs[:, 0], pairs[:, 1]]
        self.origins, self.row = np.unique(pairs[:, 0], return_inverse=True)
        self.paths: list[Indices] = []
        self.pair: Indices = np.zeros(0, dtype=np.int64)
        self.f: Numbers = np.zeros(0)
        self.known: set[tuple[int, bytes]] = set()
        self.P: Any = None
        if start is not None:
            self._take(start)

    def _take(self, start: UserEquilibrium) -> None:
        own, other = self.network, start.network
        if own.ends != other.ends or own.pairs != other.pairs:
            raise ValueError(
                "`start` is of another network or of other pairs; pass an equilibrium of the same, "
                "or None"
            )
        self._add(start.paths, start.pair)
        total = np.bincount(self.pair, start.path_flow, len(self.pairs))
        self.f = start.path_flow * (self.demand / total)[self.pair]

    def _add(self, paths: list[Indices], pair: Indices) -> None:
        self.paths = self.paths + paths
        self.pair = np.concatenate([self.pair, pair])
        self.f = np.concatenate([self.f, np.zeros(len(paths))])
        self.known.update((int(k), path.tobytes()) for k, path in zip(pair, paths, strict=True))
        lengths = np.array([len(path) for path in self.paths])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        links = np.concatenate(self.paths)
        shape = (len(self.paths), self.network.links)
        self.P = csr_matrix((np.ones(len(links)), links, starts), shape=shape)

    def flow(self) -> Numbers:
        """Link flows."""
        if self.P is None:
            return np.zeros(self.network.links)
        return np.asarray(self.P.T @ self.f)

    def extend(self, model: _Model, v: Numbers) -> tuple[float, int]:
        """Add the routes that are shorter than those known; the gap, and how many they are."""
        cost = model.cost(v)
        routes = self.network.routes
        distance, link = routes.from_origins(cost, self.origins)
        least = distance[self.row, self.pairs[:, 1]]
        gap = np.inf
        if self.P is not None:
            over = np.maximum(self.P @ cost - least[self.pair], 0.0)
            gap = _relative(self.f @ over, v @ cost)
            best = np.full(len(self.pairs), np.inf)
            np.minimum.at(best, self.pair, self.P @ cost)
        else:
            best = np.full(len(self.pairs), np.inf)
        paths, pair = [], []
        for k in np.nonzero(best > least)[0]:
            path = routes.trace(link[self.row[k]], int(self.pairs[k, 1]))
            if (int(k), path.tobytes()) not in self.known:
                paths.append(path)
                pair.append(k)
        if paths:
            first = self.P is None
            self._add(paths, np.array(pair, dtype=np.int64))
            if first:
                self.f = self.demand[self.pair]
        return gap, len(paths)

    def forget(self, model: _Model) -> None:
        """Drop routes without flow; the rest stays as it is."""
        share = self.f / self.demand[self.pair]
        keep = np.nonzero(share > _USED)[0]
        paths, pair, f = [self.paths[k] for k in keep], self.pair[keep], self.f[keep]
        total = np.bincount(pair, f, len(self.pairs))
        self.paths, self.pair, self.f = [], np.zeros(0, dtype=np.int64), np.zeros(0)
        self.known = set()
        self._add(paths, pair)
        self.f = f * (self.demand / total)[pair]

    # On the routes known

    def basic(self) -> Indices:
        """For each pair its route with most flow."""
        order = np.lexsort((self.f, self.pair))
        last = np.append(self.pair[order][1:] != self.pair[order][:-1], True)
        return np.asarray(order[last])

    def equilibrate(self, model: _Model, tol: float) -> None:
        """Newton steps until the gap among the routes known is small."""
        before = np.inf
        for _ in range(_NEWTON_STEPS):
            v = self.flow()
            cost, slope = model.cost(v), model.slope(v)
            path_cost = self.P @ cost
            least = np.full(len(self.pairs), np.inf)
            np.minimum.at(least, self.pair, path_cost)
            gap = _relative(self.f @ (path_cost - least[self.pair]), v @ cost)
            if gap <= tol or (gap > 0.9 * before > 0 and gap < 1e-13):
                return
            before = gap
            if not self._newton(model, v, path_cost, slope, gap):
                self._sweep(model)

    def _newton(
        self, model: _Model, v: Numbers, path_cost: Numbers, slope: Numbers, gap: float
    ) -> bool:
        basic = self.basic()
        mine = basic[self.pair] == np.arange(len(self.f))
        over = path_cost - path_cost[basic][self.pair]
        moves = np.nonzero(~mine & ((self.f > 0) | (over < 0)))[0]
        if not len(moves):
            return True
        E = (self.P - self.P[basic[self.pair]])[moves]
        H = np.asarray((E.multiply(slope) @ E.T).todense())
        # The flows on routes are not unique, so that H is singular: the right-hand side lies in its
        # range, and a little damping picks one solution.
        H[np.diag_indices_from(H)] += _JITTER * H.diagonal().max() + 1e-300
        room = _Room(self.f[moves], self.f[basic], self.pair[moves])
        try:
            # Far away the active set changes at every step anyhow: there projecting is enough.
            step = room.minimise(H, over[moves]) if gap < _NEAR else -_solved(H, over[moves])
        except LinAlgError:
            return False
        value, length = model.objective(v), 1.0
        whole = np.zeros(len(self.f))
        whole[moves] = step
        for _ in range(_HALVINGS):
            f = self._projected(self.f + length * whole, mine, basic)
            w = np.asarray(self.P.T @ f)
            if model.objective(w) < value or self._gap(model, f, w) < 0.9 * gap:
                self.f = f
                return True
            length *= 0.5
        return False

    def _gap(self, model: _Model, f: Numbers, v: Numbers) -> float:
        cost = model.cost(v)
        path_cost = self.P @ cost
        least = np.full(len(self.pairs), np.inf)
        np.minimum.at(least, self.pair, path_cost)
        return _relative(f @ (path_cost - least[self.pair]), v @ cost)

    def _projected(self, f: Numbers, mine: NDArray[np.bool_], basic: Indices) -> Numbers:
        f = np.where(mine, 0.0, np.maximum(f, 0.0))
        total = np.bincount(self.pair, f, len(self.pairs))
        scale = np.where(total > self.demand, self.demand / np.maximum(total, 1e-300), 1.0)
        f = f * scale[self.pair]
        f[basic] = np.maximum(self.demand - np.bincount(self.pair, f, len(self.pairs)), 0.0)
        return f

    def _sweep(self, model: _Model) -> None:
        """For one pair after the other, move flow from dearer routes to the cheapest."""
        order = np.argsort(self.pair, kind="stable")
        bounds = np.searchsorted(self.pair[order], np.arange(len(self.pairs) + 1))
        v = self.flow()
        for k in range(len(self.pairs)):
            mine = order[bounds[k] : bounds[k + 1]]
            if len(mine) < 2:
                continue
            cost, slope = model.cost(v), model.slope(v)
            costs = [float(cost[self.paths[i]].sum()) for i in mine]
            best = int(np.argmin(costs))
            for i, dear in zip(mine, costs, strict=True):
                if i == mine[best] or self.f[i] <= 0.0 or dear <= costs[best]:
                    continue
                only = np.setxor1d(self.paths[i], self.paths[mine[best]])
                curve = float(slope[only].sum())
                moved = min(self.f[i], (dear - costs[best]) / curve if curve > 0 else self.f[i])
                self.f[i] -= moved
                self.f[mine[best]] += moved
                v[self.paths[i]] -= moved
                v[self.paths[mine[best]]] += moved
            np.maximum(v, 0.0, out=v)


@dataclass(frozen=True, eq=False)
class _Room:
    """How far flows can move: those of some routes, and of the basic route of each pair."""

    f: Numbers
    basic: Numbers
    pair: Indices

    def minimise(self, H: Numbers, slope: Numbers) -> Numbers:
        """The step d that minimises slopeᵀd + ½ dᵀHd with f + d ≥ 0, by an active set.

        It stops early where a basic route runs empty.
        """
        d = np.zeros_like(self.f)
        free = np.ones(len(d), dtype=bool)
        for _ in range(4 * len(d) + 10):
            gradient = slope + H @ d
            # A route at zero comes back where that pays, unless it left in this very place.
            inner = np.nonzero(free)[0]
            move = np.zeros_like(d)
            if len(inner):
                move[inner] = -_solved(H[np.ix_(inner, inner)], gradient[inner])
            length, hit = 1.0, -1
            down = np.nonzero(move < 0)[0]
            if len(down):
                ratio = (self.f[down] + d[down]) / -move[down]
                at = int(ratio.argmin())
                if ratio[at] < length:
                    length, hit = max(float(ratio[at]), 0.0), int(down[at])
            shift = np.bincount(self.pair, move, len(self.basic))
            left = self.basic - np.bincount(self.pair, d, len(self.basic))
            up = np.nonzero(shift > 0)[0]
            if len(up):
                ratio = left[up] / shift[up]
                if ratio.min() < length:
                    return d + max(float(ratio.min()), 0.0) * move
            d = d + length * move
            if hit >= 0:
                d[hit] = -self.f[hit]
                free[hit] = False
                continue
            gradient = slope + H @ d
            back = np.nonzero(~free & (gradient < -1e-9 * np.abs(slope).max()))[0]
            if not len(back):
                return d
            free[back[gradient[back].argmin()]] = True
        return d


def _solved(H: Numbers, rhs: Numbers) -> Numbers:
    return np.asarray(cho_solve(cho_factor(H), rhs))
