r"""Travel times of the Bureau of Public Roads (1964), and what is made of them.

$$t_a(v; c) = t^0_a \left[1 + b_a (v / c)^{p_a}\right], \qquad
  \int_0^v t_a = t^0_a \left[v + \frac{b_a v^{p_a + 1}}{(p_a + 1)\, c^{p_a}}\right]$$
"""

from __future__ import annotations

import torch
from torch import Tensor

from .network import RoadNetwork

__all__ = ["beckmann", "total_time", "travel_time", "travel_time_slope"]


def travel_time(network: RoadNetwork, flow: Tensor, capacity: Tensor | None = None) -> Tensor:
    """t(v) ``[..., links]``, without tolls, in the dtype of ``flow``.

    Args:
        network: The network.
        flow: v ``[..., links]``.
        capacity: c ``[links]``; default: the network's own.
    """
    t, c, b, p = _columns(network, flow, capacity)
    return t * (1.0 + b * (flow / c) ** p)


def travel_time_slope(network: RoadNetwork, flow: Tensor, capacity: Tensor | None = None) -> Tensor:
    """t'(v) ``[..., links]``; arguments as in `travel_time`."""
    t, c, b, p = _columns(network, flow, capacity)
    # A link of constant time has p = 0; 0 · v⁻¹ would be NaN at v = 0.
    return t * b * p / c * (flow / c) ** (p - 1.0).clamp_min(0.0)


def beckmann(
    network: RoadNetwork, flow: Tensor, capacity: Tensor | None = None, toll: Tensor | None = None
) -> Tensor:
    r"""Beckmann's objective $\sum_a \int_0^{v_a} (t_a + \tau_a)$, 0-d (Beckmann et al., 1956).

    Args:
        network: The network.
        flow: v ``[links]``.
        capacity: c ``[links]``; default: the network's own.
        toll: τ ``[links]`` in units of time; default: the network's own.
    """
    t, c, b, p = _columns(network, flow, capacity)
    fixed = network.toll.to(flow) if toll is None else toll
    return (flow * (t + fixed) + t * b / (p + 1.0) * c * (flow / c) ** (p + 1.0)).sum()


def total_time(network: RoadNetwork, flow: Tensor, capacity: Tensor | None = None) -> Tensor:
    r"""TSTT, the total travel time $\sum_a v_a t_a(v_a)$ without tolls, 0-d."""
    return (flow * travel_time(network, flow, capacity)).sum()


def _columns(
    network: RoadNetwork, flow: Tensor, capacity: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c = network.capacity.to(flow) if capacity is None else capacity
    t, b, p = (x.to(flow) for x in (network.free_flow_time, network.b, network.power))
    return t, torch.as_tensor(c), b, p
