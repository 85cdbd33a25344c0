"""Road networks: links with their travel-time functions, and the demand between zones."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import networkx as nx
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .routes import Routes

__all__ = ["RoadNetwork"]

_POSITIVE = ("capacity",)
_NONNEGATIVE = ("free_flow_time", "b", "power", "length", "toll")
_DEFAULTS = {"b": 0.15, "power": 4.0, "length": 0.0, "toll": 0.0}


@dataclass(frozen=True, eq=False)
class RoadNetwork:
    r"""A directed road network and the trips that use it.

    A link's travel time is that of the Bureau of Public Roads (1964),
    $t_a(v_a) = t^0_a (1 + b_a (v_a / c_a)^{p_a})$. Times, flows and capacities are in whatever
    units the source has, as long as flow and capacity share one; tolls are in units of time.

    Links are numbered from 0 in the order in which they were given, which for a file is that of its
    lines. Nodes are numbered from 1, and the first of them are the zones.

    Args:
        graph: A `networkx.DiGraph` of nodes 1, 2, …; every link has the attributes
            ``free_flow_time``, ``capacity``, ``b``, ``power``, ``length`` and ``toll``, and its
            number as ``index``. Make it with `from_links`; it is frozen.
        demand: Trips from zone i + 1 to zone j + 1, ``[zones, zones]``, float64.
        first_through: No route passes through a node of a lower number; it may only begin or end
            there. 1: every node may be passed.
        name: What the network is called.
        coordinates: (x, y) of the nodes by number, or None.
        time_unit: Unit of time, for messages and axes.
        flow_unit: Unit of flow, likewise.

    Raises:
        ValueError: A link, the demand or a number is impossible; it is named.

    Example:
        >>> network = RoadNetwork.braess()
        >>> network
        RoadNetwork(Braess: 4 nodes, 5 links, 2 zones, demand 6)
        >>> network.link(3, 4)
        3
    """

    graph: nx.DiGraph
    demand: Tensor
    first_through: int = 1
    name: str = "network"
    coordinates: Mapping[int, tuple[float, float]] | None = None
    time_unit: str = "time"
    flow_unit: str = "flow"

    def __post_init__(self) -> None:
        _check_nodes(self.graph)
        for tail, head, link in self.graph.edges(data=True):
            _check_link(tail, head, link)
        numbers = sorted(link.get("index", -1) for _, _, link in self.graph.edges(data=True))
        if numbers != list(range(self.links)):
            raise ValueError(
                f"the links' `index` are not 0 to {self.links - 1}; make the graph with "
                "RoadNetwork.from_links"
            )
        _check_demand(self.demand, self.nodes)
        _check_coordinates(self.coordinates)
        if not 1 <= self.first_through <= self.nodes + 1:
            raise ValueError(
                f"`first_through` is {self.first_through}, but nodes are numbered from 1 to "
                f"{self.nodes}; pass 1 where every node may be passed"
            )
        stranded = self.stranded()
        if stranded:
            origin, destination = stranded[0]
            raise ValueError(
                f"`demand` has {float(self.demand[origin - 1, destination - 1]):g} trips from "
                f"{origin} to {destination}, but no route leads there; add links, or remove the "
                "trips"
            )

    @classmethod
    def from_links(
        cls,
        links: Iterable[tuple[int, int, Mapping[str, float]]],
        demand: Tensor | Sequence[Sequence[float]] | Mapping[tuple[int, int], float],
        *,
        zones: int | None = None,
        nodes: int | None = None,
        **settings: Any,
    ) -> RoadNetwork:
        """Build a network from links (tail, head, attributes).

        Args:
            links: ``free_flow_time`` and ``capacity`` are required of each; ``b`` is 0.15,
                ``power`` 4, ``length`` and ``toll`` 0 by default.
            demand: A matrix ``[zones, zones]``, or trips by (origin, destination).
            zones: Number of zones where ``demand`` is a mapping; default: the largest in it.
            nodes: Number of nodes; default: the largest of any link.
            settings: ``first_through``, ``name``, ``coordinates``, ``time_unit``, ``flow_unit``.

        Raises:
            ValueError: A link is given twice, lacks an attribute, or something is impossible; a
                node is no whole number.
        """
        graph = nx.DiGraph()
        rows = [(*_ends("`links` holds", (tail, head)), link) for tail, head, link in links]
        ends = [node for tail, head, _ in rows for node in (tail, head)]
        last = max([nodes or 0, zones or 0, *ends])
        graph.add_nodes_from(range(1, last + 1))
        for tail, head, link in rows:
            if graph.has_edge(tail, head):
                raise ValueError(
                    f"the link {tail} → {head} is given twice; join the two, or put a node on one"
                )
            missing = [key for key in ("free_flow_time", "capacity") if key not in link]
            unknown = sorted(set(link) - {"free_flow_time", "capacity", *_DEFAULTS})
            if missing or unknown:
                what = f"lacks {missing[0]!r}" if missing else f"has the attribute {unknown[0]!r}"
                raise ValueError(
                    f"the link {tail} → {head} {what}; give it 'free_flow_time' and 'capacity', "
                    f"and if you like any of {', '.join(map(repr, _DEFAULTS))}"
                )
            values = {key: float(value) for key, value in (_DEFAULTS | dict(link)).items()}
            graph.add_edge(tail, head, index=graph.number_of_edges(), **values)
        return cls(nx.freeze(graph), _matrix(demand, zones), **settings)

    @classmethod
    def from_tntp(cls, path: str | os.PathLike[str], **files: Any) -> RoadNetwork:
        """Read the TNTP files of a folder; see `read_tntp`.

        Args:
            path: The folder, or its ``…_net.tntp``.
            files: ``trips`` and ``nodes``: other files than those beside it.

        Raises:
            DataError: A file is missing or malformed; file and line are named.
        """
        from ..data.tntp import read_tntp

        return read_tntp(path, **files)

    # Small networks of known equilibria

    @classmethod
    def braess(cls, demand: float = 6.0) -> RoadNetwork:
        """Braess's network (1968), as in Transportation Networks for Research.

        Four nodes, five links; times 10v, 50 + v, 50 + v, 10 + v, 10v. At a demand of 6 all three
        routes take 92, the total time is 552; without the link 3 → 4 it is 498.
        """
        links = [(1, 3, 1e-8, 1e9), (1, 4, 50.0, 0.02), (3, 2, 50.0, 0.02), (3, 4, 10.0, 0.1)]
        links.append((4, 2, 1e-8, 1e9))
        return cls.from_links(
            [
                (i, j, {"free_flow_time": t, "capacity": 1.0, "b": b, "power": 1.0})
                for i, j, t, b in links
            ],
            {(1, 2): demand},
            name="Braess",
            coordinates={1: (0.0, 0.0), 3: (1.0, 1.0), 4: (1.0, -1.0), 2: (2.0, 0.0)},
        )

    @classmethod
    def hearn_ramana(cls) -> RoadNetwork:
        """The nine nodes and 18 links of Hearn and Ramana (1998).

        Four pairs of zones; the total time is 2455.87 at user equilibrium and 2253.92 at the
        system optimum.
        """
        links = [
            (int(i), int(j), {"free_flow_time": t, "capacity": c})
            for i, j, t, c in _HEARN_RAMANA_LINKS
        ]
        demand = {(1, 3): 10.0, (1, 4): 20.0, (2, 3): 30.0, (2, 4): 40.0}
        places = {1: (0, 2), 2: (0, 0), 5: (1, 2), 6: (1, 0), 9: (2, 1), 7: (3, 2), 8: (3, 0)}
        places |= {3: (4, 2), 4: (4, 0)}
        return cls.from_links(
            links,
            demand,
            name="Hearn-Ramana",
            coordinates={node: (float(x), float(y)) for node, (x, y) in places.items()},
        )

    # What there is of it

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return int(self.graph.number_of_nodes())

    @property
    def links(self) -> int:
        """Number of links."""
        return int(self.graph.number_of_edges())

    @property
    def zones(self) -> int:
        """Number of zones, which are the first nodes."""
        return len(self.demand)

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """The (origin, destination) pairs with trips, by number of node, in the order of rows."""
        where = (self.demand > 0).nonzero() + 1
        return [(i, j) for i, j in where.tolist()]

    @cached_property
    def rows(self) -> list[tuple[int, int, dict[str, float]]]:
        """(tail, head, attributes) of every link, by number of link."""
        return [
            (int(i), int(j), {key: link[key] for key in link if key != "index"})
            for i, j, link in sorted(
                self.graph.edges(data=True), key=lambda edge: int(edge[2]["index"])
            )
        ]

    @cached_property
    def ends(self) -> list[tuple[int, int]]:
        """(tail, head) of every link, by number of node."""
        return [(i, j) for i, j, _ in self.rows]

    @cached_property
    def tail(self) -> Tensor:
        """Where each link begins, number of node − 1, ``[links]``, int64."""
        return torch.tensor([i - 1 for i, _ in self.ends], dtype=torch.int64)

    @cached_property
    def head(self) -> Tensor:
        """Where each link ends, number of node − 1, ``[links]``, int64."""
        return torch.tensor([j - 1 for _, j in self.ends], dtype=torch.int64)

    @cached_property
    def free_flow_time(self) -> Tensor:
        """t⁰ ``[links]``, float64."""
        return self._column("free_flow_time")

    @cached_property
    def capacity(self) -> Tensor:
        """C ``[links]``, float64."""
        return self._column("capacity")

    @cached_property
    def b(self) -> Tensor:
        """The factor b ``[links]``, float64."""
        return self._column("b")

    @cached_property
    def power(self) -> Tensor:
        """The exponent p ``[links]``, float64."""
        return self._column("power")

    @cached_property
    def length(self) -> Tensor:
        """Lengths ``[links]``, float64."""
        return self._column("length")

    @cached_property
    def toll(self) -> Tensor:
        """What a link costs beside its time, in units of time, ``[links]``, float64."""
        return self._column("toll")

    @cached_property
    def routes(self) -> Routes:
        """Shortest routes in this network; see `Routes`."""
        from .routes import Routes

        return Routes.of(self)

    def link(self, tail: int, head: int) -> int:
        """The number of the link between two nodes.

        Raises:
            ValueError: There is no such link.
        """
        if not self.graph.has_edge(tail, head):
            out = sorted(self.graph.successors(tail)) if tail in self.graph else []
            known = f"from {tail} links lead to {out}" if out else f"no link leaves {tail}"
            raise ValueError(f"there is no link {tail} → {head}; {known}")
        return int(self.graph.edges[tail, head]["index"])

    def numbered(self, links: Iterable[int | tuple[int, int]] | None) -> tuple[int, ...]:
        """Numbers of links that are given by number or by (tail, head); None: all links.

        Raises:
            ValueError: There is no such link, it is given twice, or a number is no whole one.
        """
        if links is None:
            return tuple(range(self.links))
        found = []
        for one in links:
            whole = _whole(one)
            if isinstance(one, tuple):
                index = self.link(*_ends("`links` holds", one))
            elif whole is not None:
                index = whole
            else:
                raise ValueError(
                    f"`links` holds {one!r}, which is neither a whole number nor a pair (tail, "
                    "head); pass one of these"
                )
            if not 0 <= index < self.links:
                raise ValueError(
                    f"`links` holds {index}, but links are numbered from 0 to {self.links - 1}"
                )
            if index in found:
                raise ValueError(f"`links` holds {index} ({self.ends[index]}) twice; once will do")
            found.append(index)
        return tuple(found)

    def stranded(self) -> list[tuple[int, int]]:
        """The pairs with trips between which no route leads."""
        reaches = self.routes.reaches
        return [(i, j) for i, j in self.pairs if not bool(reaches[j - 1, i - 1])]

    # Changed copies

    def scaled(
        self,
        *,
        capacity: float = 1.0,
        time: float = 1.0,
        demand: float = 1.0,
        time_unit: str | None = None,
        flow_unit: str | None = None,
    ) -> RoadNetwork:
        """A copy in other units, or of other size; tolls go with the times.

        Raises:
            ValueError: A factor is not positive and finite.
        """
        for name, factor in (("capacity", capacity), ("time", time), ("demand", demand)):
            if not (factor > 0 and math.isfinite(factor)):
                raise ValueError(f"`{name}` is {factor}; a factor is finite and > 0")
        factors = {"capacity": capacity, "free_flow_time": time, "toll": time}
        links = [
            (i, j, {key: value * factors.get(key, 1.0) for key, value in link.items()})
            for i, j, link in self.rows
        ]
        copy = self._with(links, self.demand * demand)
        return replace(
            copy, time_unit=time_unit or self.time_unit, flow_unit=flow_unit or self.flow_unit
        )

    def with_links(self, changes: Mapping[tuple[int, int], Mapping[str, float]]) -> RoadNetwork:
        """A copy with some attributes of some links changed.

        Raises:
            ValueError: There is no such link or attribute, or the value is impossible.
        """
        for ends in changes:
            self.link(*ends)
        links = [(i, j, link | dict(changes.get((i, j), {}))) for i, j, link in self.rows]
        return self._with(links, self.demand)

    def without_links(self, links: Iterable[int | tuple[int, int]]) -> RoadNetwork:
        """A copy without some links; the others are numbered anew.

        Raises:
            ValueError: There is no such link, or trips have no route any more.
        """
        gone = set(self.numbered(links))
        rows = [row for index, row in enumerate(self.rows) if index not in gone]
        return self._with(rows, self.demand)

    def with_demand(self, changes: Mapping[tuple[int, int], float] | Tensor) -> RoadNetwork:
        """A copy with other trips: some changed, or the whole matrix.

        Raises:
            ValueError: The trips are impossible.
        """
        if isinstance(changes, Tensor):
            return replace(self, demand=changes.double())
        demand = self.demand.clone()
        for (origin, destination), trips in changes.items():
            if not (1 <= origin <= self.zones and 1 <= destination <= self.zones):
                raise ValueError(
                    f"`changes` holds trips {origin} → {destination}, but the zones are 1 to "
                    f"{self.zones}"
                )
            demand[origin - 1, destination - 1] = trips
        return replace(self, demand=demand)

    def _with(
        self, links: Iterable[tuple[int, int, Mapping[str, float]]], demand: Tensor
    ) -> RoadNetwork:
        return RoadNetwork.from_links(
            links,
            demand,
            nodes=self.nodes,
            first_through=self.first_through,
            name=self.name,
            coordinates=self.coordinates,
            time_unit=self.time_unit,
            flow_unit=self.flow_unit,
        )

    def _column(self, key: str) -> Tensor:
        values = [link[key] for _, _, link in self.rows]
        return torch.tensor(values, dtype=torch.float64)

    def __repr__(self) -> str:
        return (
            f"RoadNetwork({self.name}: {self.nodes} nodes, {self.links} links, {self.zones} zones, "
            f"demand {self.demand.sum().item():g})"
        )


_HEARN_RAMANA_LINKS = (
    (1, 5, 5, 12),
    (1, 6, 6, 18),
    (2, 5, 3, 35),
    (2, 6, 9, 35),
    (5, 6, 9, 20),
    (5, 7, 2, 11),
    (5, 9, 8, 26),
    (6, 5, 4, 11),
    (6, 8, 6, 33),
    (6, 9, 7, 32),
    (7, 3, 3, 25),
    (7, 4, 6, 24),
    (7, 8, 2, 19),
    (8, 3, 8, 39),
    (8, 4, 6, 43),
    (8, 7, 4, 36),
    (9, 7, 4, 26),
    (9, 8, 8, 30),
)


def _check_nodes(graph: nx.DiGraph) -> None:
    if not isinstance(graph, nx.DiGraph) or graph.is_multigraph():
        raise ValueError(
            f"`graph` is a {type(graph).__name__}; pass a networkx.DiGraph, such as "
            "RoadNetwork.from_links makes"
        )
    if graph.number_of_edges() == 0:
        raise ValueError("`graph` has no link; a network has at least one")
    if set(graph.nodes) != set(range(1, graph.number_of_nodes() + 1)):
        raise ValueError(
            f"the nodes of `graph` are not 1 to {graph.number_of_nodes()}; number them so, zones "
            "first"
        )


def _check_link(tail: int, head: int, link: Mapping[str, float]) -> None:
    name = f"the link {tail} → {head}"
    if tail == head:
        raise ValueError(f"{name} ends where it begins; remove it")
    for key in (*_POSITIVE, *_NONNEGATIVE):
        if key not in link:
            raise ValueError(f"{name} lacks {key!r}; make the graph with RoadNetwork.from_links")
        value = link[key]
        if not math.isfinite(value) or value < 0 or (key in _POSITIVE and value == 0):
            sign = "> 0" if key in _POSITIVE else "≥ 0"
            raise ValueError(f"{name} has {key} = {value:g}; it is finite and {sign}")
    if 0 < link["power"] < 1:
        raise ValueError(
            f"{name} has power = {link['power']:g}, with which its time has no slope at flow 0; "
            "pass 0, or at least 1"
        )


def _whole(value: Any) -> int | None:
    """The value as an int, where it is a whole number by its type; else None."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _ends(what: str, pair: tuple[Any, ...]) -> tuple[int, int]:
    ends = [_whole(node) for node in pair]
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        raise ValueError(
            f"{what} the link {' → '.join(map(repr, pair))}; a link is from one node to another, "
            "both whole numbers"
        )
    return ends[0], ends[1]


def _check_coordinates(coordinates: Mapping[int, tuple[float, float]] | None) -> None:
    for node, place in (coordinates or {}).items():
        try:
            x, y = place
            finite = math.isfinite(x) and math.isfinite(y)
        except (TypeError, ValueError, OverflowError):
            finite = False
        if not finite:
            raise ValueError(
                f"`coordinates` has {place!r} for node {node}; pass two finite numbers (x, y)"
            )


def _check_demand(demand: Tensor, nodes: int) -> None:
    if not isinstance(demand, Tensor) or demand.dtype != torch.float64:
        kind = demand.dtype if isinstance(demand, Tensor) else type(demand).__name__
        raise ValueError(f"`demand` is {kind}; pass a float64 tensor [zones, zones]")
    if demand.ndim != 2 or demand.shape[0] != demand.shape[1] or len(demand) > nodes:
        raise ValueError(
            f"`demand` is {list(demand.shape)}; it is [zones, zones] with at most {nodes} zones, "
            "one for each node"
        )
    bad = ~demand.isfinite() | (demand < 0)
    if bool(bad.any()):
        i, j = bad.nonzero()[0].tolist()
        raise ValueError(
            f"`demand` has {float(demand[i, j]):g} trips from {i + 1} to {j + 1}; trips are finite "
            "and ≥ 0"
        )
    within = demand.diagonal() > 0
    if bool(within.any()):
        zone = int(within.nonzero()[0]) + 1
        raise ValueError(
            f"`demand` has trips from zone {zone} to itself, which use no link; remove them"
        )
    if not bool((demand > 0).any()):
        raise ValueError("`demand` holds no trip; a network needs at least one")


def _matrix(
    demand: Tensor | Sequence[Sequence[float]] | Mapping[tuple[int, int], float], zones: int | None
) -> Tensor:
    if not isinstance(demand, Mapping):
        return torch.as_tensor(demand, dtype=torch.float64).clone()
    size = zones or max((max(pair) for pair in demand), default=1)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for (origin, destination), trips in demand.items():
        if not (1 <= origin <= size and 1 <= destination <= size):
            raise ValueError(
                f"`demand` has trips from {origin} to {destination}, but the zones are 1 to {size}"
            )
        matrix[origin - 1, destination - 1] = trips
    return matrix
