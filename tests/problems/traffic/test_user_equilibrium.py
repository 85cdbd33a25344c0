"""Exact user equilibrium: analytic and published figures, and what defines it."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import SolveError
from bilevel.problems import (
    RoadNetwork,
    read_tntp_flow,
    system_optimum,
    total_time,
    travel_time,
    user_equilibrium,
)


def toll_on(network, ends, toll):
    tolls = torch.zeros(network.links, dtype=torch.float64)
    tolls[network.link(*ends)] = toll
    return tolls


@pytest.mark.parametrize("toll", [0.0, 1.0, 5.0, 12.9, 13.1, 20.0])
def test_braess_under_a_toll(toll):
    """TSTT = 552 − 80τ/13 + 2τ²/13 up to τ = 13, then 498."""
    network = RoadNetwork.braess()
    found = user_equilibrium(network, toll=toll_on(network, (3, 4), toll))
    expected = 552 - 80 * toll / 13 + 2 * toll**2 / 13 if toll < 13 else 498.0
    # The two links of time 10v have t⁰ = 1e-8 in the file.
    assert found.total_time == pytest.approx(expected, abs=1e-7)
    assert found.gap <= 1e-13


def test_braess_is_a_paradox():
    network = RoadNetwork.braess()
    assert user_equilibrium(network.without_links([(3, 4)])).total_time == pytest.approx(498)
    best, toll = system_optimum(network)
    assert best.total_time == pytest.approx(498)
    assert user_equilibrium(network, toll=toll).total_time == pytest.approx(498)


def test_hearn_ramana():
    network = RoadNetwork.hearn_ramana()
    assert user_equilibrium(network).total_time == pytest.approx(2455.8699, abs=5e-5)
    best, toll = system_optimum(network)
    assert best.total_time == pytest.approx(2253.9179, abs=5e-5)
    again = user_equilibrium(network, toll=toll)
    torch.testing.assert_close(again.flow, best.flow, rtol=0, atol=1e-9)


def check(network, found):
    """Flows meet the demand, and no used route is longer than the shortest."""
    pairs = np.array(network.pairs) - 1
    demand = network.demand.numpy()[pairs[:, 0], pairs[:, 1]]
    carried = np.bincount(found.pair, found.path_flow, len(pairs))
    np.testing.assert_allclose(carried, demand, rtol=1e-12)
    flow = np.zeros(network.links)
    for path, amount in zip(found.paths, found.path_flow, strict=True):
        np.add.at(flow, path, amount)
    np.testing.assert_allclose(flow, found.flow.numpy(), rtol=1e-11, atol=1e-12)
    cost = found.cost.numpy()
    least = network.routes.to_zones(cost)
    for path, k in zip(found.paths, found.pair, strict=True):
        origin, destination = pairs[k]
        assert network.tail[path[0]] == origin
        assert network.head[path[-1]] == destination
        assert cost[path].sum() <= least[destination, origin] * (1 + 1e-9)
    return flow


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), zones=st.integers(2, 4))
def test_random_networks_are_in_equilibrium(ring, seed, zones):
    network = ring(seed, zones=zones)
    found = user_equilibrium(network)
    check(network, found)
    toll = found.time * 0.3
    moved = user_equilibrium(network, toll=toll, start=found)
    check(network, moved)
    cold = user_equilibrium(network, toll=toll)
    torch.testing.assert_close(moved.flow, cold.flow, rtol=1e-7, atol=1e-7)
    best, _ = system_optimum(network)
    assert best.total_time <= found.total_time * (1 + 1e-12)


def test_impossible_arguments_are_refused():
    network = RoadNetwork.braess()
    with pytest.raises(ValueError, match=r"`toll` of the link \(3, 4\) is -11"):
        user_equilibrium(network, toll=toll_on(network, (3, 4), -11.0))
    with pytest.raises(ValueError, match=r"`capacity` of the link \(1, 3\) is 0"):
        user_equilibrium(network, capacity=torch.zeros(5))
    with pytest.raises(ValueError, match=r"`capacity` is \[4\]"):
        user_equilibrium(network, capacity=torch.ones(4))
    with pytest.raises(ValueError, match="`start` is of another network"):
        user_equilibrium(network, start=user_equilibrium(RoadNetwork.hearn_ramana()))
    with pytest.raises(SolveError, match="raise `max_rounds`"):
        user_equilibrium(network, max_rounds=1)


def test_sioux_falls(real_network):
    network = real_network("SiouxFalls")
    found = user_equilibrium(network)
    check(network, found)
    assert found.beckmann == pytest.approx(42.31335287107440e5, rel=1e-13)
    assert found.total_time == pytest.approx(7480225.3449, abs=1e-4)
    best, toll = system_optimum(network)
    assert best.total_time == pytest.approx(7194256.0529, abs=1e-4)
    assert best.revenue == pytest.approx(14492931.3, abs=0.05)
    again = user_equilibrium(network, toll=toll, start=found)
    assert again.total_time == pytest.approx(7194256.0529, abs=1e-4)
    torch.testing.assert_close(again.flow, best.flow, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["SiouxFalls", "Anaheim"])
def test_published_flows(real_network, name):
    network = real_network(name)
    folder = os.path.join(os.environ["BILEVEL_DATA"], "transportation", name)
    flow, cost = read_tntp_flow(folder, network)
    torch.testing.assert_close(travel_time(network, flow), cost, rtol=1e-12, atol=1e-12)
    found = user_equilibrium(network)
    assert (found.flow - flow).abs().max() <= 1e-4
    assert found.total_time == pytest.approx(total_time(network, flow).item(), rel=1e-10)


def test_anaheim_respects_its_zones(real_network):
    network = real_network("Anaheim")
    assert network.first_through == 39
    found = user_equilibrium(network)
    check(network, found)
    for path in found.paths:
        assert (network.tail[path[1:]] + 1 >= 39).all()
    assert found.beckmann == pytest.approx(1286032.171096, abs=1e-5)
    assert system_optimum(network)[0].total_time == pytest.approx(1395015.0867, abs=1e-3)


def test_roads_that_take_no_time_are_in_equilibrium():
    links = [(1, 2, {"free_flow_time": 0.0, "capacity": 1.0}), (2, 1, _LINK), (1, 3, _LINK)]
    links.append((3, 2, _LINK))
    network = RoadNetwork.from_links(links, {(1, 2): 4.0}, zones=2)
    found = user_equilibrium(network)
    assert found.gap == 0.0
    assert found.total_time == 0.0
    assert found.flow.tolist() == [4.0, 0.0, 0.0, 0.0]


_LINK = {"free_flow_time": 1.0, "capacity": 1.0}
