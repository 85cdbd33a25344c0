r"""What is decided on a road network: capacities or tolls, and what that is worth.

Capacities (network design; Abdulaal and LeBlanc, 1979), with $y \ge 0$ on some links:

$$Z(y) = \sum_a t_a(v_a; c_a + y_a)\, v_a + \vartheta \sum_a d_a y_a^2.$$

Tolls on some or all links, which are transfers and no loss:

$$\mathrm{TSTT}(\tau) = \sum_a t_a(v_a)\, v_a.$$
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from .costs import travel_time
from .network import RoadNetwork

__all__ = ["CapacityDecision", "Decision", "TollDecision"]


class Decision(ABC):
    """What the outer variable, a tensor ``[k]``, does to k links of a network.

    Args:
        network: The network.
        links: The links, by number or by (tail, head); None: all.

    Attributes:
        links: Their numbers, in the order of the outer variable.
    """

    def __init__(
        self, network: RoadNetwork, links: Iterable[int | tuple[int, int]] | None = None
    ) -> None:
        self.network = network
        self.links = network.numbered(links)
        if not self.links:
            raise ValueError("`links` is empty; decide on at least one link")

    def __len__(self) -> int:
        return len(self.links)

    @cached_property
    def index(self) -> Tensor:
        """The numbers of the links ``[k]``, int64."""
        return torch.tensor(self.links, dtype=torch.int64)

    def capacity(self, outer: Tensor) -> Tensor:
        """Capacities ``[links]`` under a decision ``[k]``."""
        return self.network.capacity.to(outer)

    def toll(self, outer: Tensor) -> Tensor:
        """Tolls ``[links]`` under a decision ``[k]``, in units of time."""
        return self.network.toll.to(outer)

    @abstractmethod
    def objective(self, outer: Tensor, time: Tensor, flow: Tensor) -> Tensor:
        """What is minimised, 0-d, at travel times and flows ``[links]``."""

    def value(self, outer: Tensor, flow: Tensor) -> Tensor:
        """What is minimised, 0-d, at flows ``[links]``."""
        return self.objective(outer, travel_time(self.network, flow, self.capacity(outer)), flow)

    def zeros(self) -> Tensor:
        """The decision to do nothing, ``[k]``, float64."""
        return torch.zeros(len(self), dtype=torch.float64)

    def _spread(self, outer: Tensor, onto: Tensor) -> Tensor:
        if tuple(outer.shape) != (len(self),):
            raise ValueError(
                f"`outer` is {tuple(outer.shape)}, but {len(self)} links are decided on; pass a "
                f"tensor [{len(self)}]"
            )
        return onto.to(outer).index_add(0, self.index.to(outer.device), outer)


class CapacityDecision(Decision):
    """Capacity that is added to links, at quadratic cost.

    Args:
        network: The network.
        links: The links that can be widened.
        costs: d, the cost of each; default: 1.
        weight: ϑ, what a unit of cost is worth in units of Z.

    Raises:
        ValueError: A cost is negative, or their number is wrong.
    """

    def __init__(
        self,
        network: RoadNetwork,
        links: Iterable[int | tuple[int, int]] | None = None,
        costs: Sequence[float] | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__(network, links)
        self.costs = tuple(float(d) for d in (costs if costs is not None else [1.0] * len(self)))
        self.weight = float(weight)
        if len(self.costs) != len(self):
            raise ValueError(f"`costs` has {len(self.costs)} numbers for {len(self)} links")
        for name, value in (("weight", self.weight), *(("costs", d) for d in self.costs)):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"`{name}` holds {value}; a cost is finite and ≥ 0")

    def __repr__(self) -> str:
        return f"CapacityDecision({self.network.name}, {len(self)} links, weight={self.weight:g})"

    def capacity(self, outer: Tensor) -> Tensor:
        """C + y ``[links]``."""
        return self._spread(outer, self.network.capacity)

    def objective(self, outer: Tensor, time: Tensor, flow: Tensor) -> Tensor:
        """Z, 0-d."""
        d = torch.tensor(self.costs, dtype=outer.dtype, device=outer.device)
        return (time * flow).sum() + self.weight * (d * outer**2).sum()


class TollDecision(Decision):
    """Tolls on links; first-best where all links can be tolled, second-best otherwise.

    Args:
        network: The network.
        links: The links that can be tolled; None: all.
    """

    def __repr__(self) -> str:
        return f"TollDecision({self.network.name}, {len(self)} links)"

    def toll(self, outer: Tensor) -> Tensor:
        """The network's own tolls + τ ``[links]``."""
        return self._spread(outer, self.network.toll)

    def objective(self, outer: Tensor, time: Tensor, flow: Tensor) -> Tensor:
        """TSTT, 0-d."""
        return (time * flow).sum()
