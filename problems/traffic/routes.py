"""Shortest routes between zones, and which links can lie on a route at all.

A route may begin or end at a node below the network's first through node, but not pass it: each
such node is split in two, one that links leave and one that they enter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra
from torch import Tensor

if TYPE_CHECKING:
    from .network import RoadNetwork

__all__ = ["Routes"]

Numbers = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Routes:
    """Dijkstra's algorithm on one network, for costs that change.

    Attributes:
        tail: Where each link begins, in the split graph, ``[links]``.
        head: Where each link ends, in the split graph, ``[links]``.
        nodes: Number of nodes of the network.
        size: Number of nodes of the split graph.
        entry: For each zone the node at which routes to it end, ``[zones]``.
    """

    tail: Indices
    head: Indices
    nodes: int
    size: int
    entry: Indices

    @classmethod
    def of(cls, network: RoadNetwork) -> Routes:
        """The split graph of a network."""
        tail, head = network.tail.numpy(), network.head.numpy()
        split = network.first_through - 1
        entry = np.arange(network.zones)
        entry = np.where(entry < split, entry + network.nodes, entry)
        entered = np.where(head < split, head + network.nodes, head)
        return cls(tail, entered, network.nodes, network.nodes + split, entry)

    def _matrix(self, costs: Numbers, *, backwards: bool = False) -> Any:
        ends = (self.head, self.tail) if backwards else (self.tail, self.head)
        return csr_matrix((costs, ends), shape=(self.size, self.size))

    def to_zones(self, costs: Numbers) -> Numbers:
        """The least cost from every node to every zone ``[zones, nodes]``; inf without a route."""
        matrix = self._matrix(np.maximum(costs, 0.0), backwards=True)
        found = np.asarray(dijkstra(matrix, indices=self.entry))[:, : self.nodes]
        zones = np.arange(len(self.entry))
        found[zones, zones] = 0.0
        return found

    def from_origins(self, costs: Numbers, origins: Indices) -> tuple[Numbers, Indices]:
        """The least cost to every zone, and the link by which each split node is reached.

        Args:
            costs: ``[links]``, ≥ 0.
            origins: Zones to start from, ``[origins]``.

        Returns:
            Costs ``[origins, zones]`` and links ``[origins, size]``, −1 where there is none.
        """
        distance, before = dijkstra(self._matrix(costs), indices=origins, return_predecessors=True)
        link = np.full(before.shape, -1, dtype=np.int64)
        reached = before >= 0
        row, node = np.nonzero(reached)
        keys, links = self._sorted
        wanted = before[row, node].astype(np.int64) * self.size + node
        link[row, node] = links[np.searchsorted(keys, wanted)]
        return np.asarray(distance)[:, self.entry], link

    def trace(self, link: Indices, destination: int) -> Indices:
        """The links of a route to a zone, from one row of links of `from_origins`."""
        found, node = [], int(self.entry[destination])
        while link[node] >= 0:
            found.append(int(link[node]))
            node = int(self.tail[link[node]])
        return np.array(found[::-1], dtype=np.int64)

    @cached_property
    def _sorted(self) -> tuple[Indices, Indices]:
        """Tail · size + head in order, and the links in that order."""
        keys = self.tail * self.size + self.head
        order = np.argsort(keys)
        return keys[order], order

    @cached_property
    def reaches(self) -> Tensor:
        """Whether a route leads from each node to each zone ``[zones, nodes]``, bool."""
        return torch.from_numpy(np.isfinite(self.to_zones(np.ones(len(self.tail)))))

    @cached_property
    def usable(self) -> Tensor:
        """Whether a route to a zone may use a link ``[zones, links]``, bool."""
        reaches = self.reaches.numpy()
        zones = np.arange(len(self.entry))
        ends_here = self.head[None, :] == self.entry[:, None]
        through = (self.head < self.nodes)[None, :]
        useful = np.zeros((len(zones), len(self.tail)), dtype=bool)
        heads = np.minimum(self.head, self.nodes - 1)
        useful |= through & reaches[:, heads]
        useful |= ends_here
        # Whoever has arrived stays.
        useful &= self.tail[None, :] != zones[:, None]
        return torch.from_numpy(useful)
