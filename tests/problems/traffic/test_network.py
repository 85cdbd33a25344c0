"""Road networks: what they hold, what is refused, and shortest routes."""

import networkx as nx
import numpy as np
import pytest
import torch

from bilevel.problems import RoadNetwork, beckmann, travel_time, travel_time_slope

ROAD = {"free_flow_time": 1.0, "capacity": 2.0}


def two(**changes):
    return RoadNetwork.from_links([(1, 2, ROAD | changes), (2, 1, ROAD)], {(1, 2): 1.0})


def test_links_are_numbered_in_order_and_carry_their_attributes():
    network = RoadNetwork.braess()
    assert network.ends == [(1, 3), (1, 4), (3, 2), (3, 4), (4, 2)]
    assert [network.link(*ends) for ends in network.ends] == [0, 1, 2, 3, 4]
    assert network.free_flow_time.tolist() == [1e-8, 50, 50, 10, 1e-8]
    assert network.graph.edges[3, 4]["b"] == 0.1
    assert (network.tail.tolist(), network.head.tolist()) == ([0, 0, 2, 2, 3], [2, 3, 1, 3, 1])
    assert network.pairs == [(1, 2)]
    assert network.numbered([(3, 4), 0]) == (3, 0)
    assert RoadNetwork.hearn_ramana().links == 18


def test_numbers_are_those_of_the_order_given_and_not_of_the_graph():
    network = RoadNetwork.from_links(
        [(2, 3, ROAD), (1, 2, ROAD | {"capacity": 7.0}), (3, 1, ROAD)], {(1, 3): 1.0}
    )
    assert network.ends == [(2, 3), (1, 2), (3, 1)]
    assert network.capacity.tolist() == [2, 7, 2]
    assert network.scaled(time=2.0).ends == network.ends
    assert network.with_links({(3, 1): {"b": 0.0}}).b.tolist() == [0.15, 0.15, 0.0]
    assert network.without_links([2]).ends == network.ends[:2]


def test_the_graph_cannot_be_changed_behind_its_back():
    with pytest.raises(nx.NetworkXError):
        RoadNetwork.braess().graph.add_edge(1, 2)


def test_travel_time_its_integral_and_its_slope():
    network = RoadNetwork.from_links(
        [
            (1, 2, {"free_flow_time": 2.0, "capacity": 3.0, "b": 0.5, "power": 4.0}),
            (2, 1, {"free_flow_time": 2.0, "capacity": 3.0, "b": 0.0, "power": 0.0, "toll": 0.5}),
        ],
        {(1, 2): 1.0},
    )
    flow = torch.tensor([6.0, 0.0], dtype=torch.float64, requires_grad=True)
    assert travel_time(network, flow).tolist() == [2 * (1 + 0.5 * 16), 2.0]
    (cost,) = torch.autograd.grad(beckmann(network, flow), flow, create_graph=True)
    torch.testing.assert_close(cost, travel_time(network, flow) + network.toll)
    (slope,) = torch.autograd.grad(cost.sum(), flow)
    torch.testing.assert_close(slope, travel_time_slope(network, flow.detach()))
    wider = network.capacity + torch.tensor([3.0, 0.0], dtype=torch.float64)
    assert travel_time(network, flow.detach(), wider)[0].item() == pytest.approx(3.0)


def test_changed_copies():
    network = RoadNetwork.hearn_ramana()
    other = network.scaled(capacity=2.0, time=3.0, demand=0.5, time_unit="h")
    assert torch.equal(other.capacity, 2 * network.capacity)
    assert torch.equal(other.free_flow_time, 3 * network.free_flow_time)
    assert torch.equal(other.demand, 0.5 * network.demand)
    assert (other.time_unit, other.name, other.ends) == ("h", network.name, network.ends)
    changed = network.with_links({(7, 3): {"capacity": 99.0}})
    assert changed.capacity[network.link(7, 3)] == 99.0
    assert changed.capacity.sum() == network.capacity.sum() + 99.0 - 25.0
    more = network.with_demand({(3, 1): 0.0, (1, 3): 11.0})
    assert more.demand.sum() == 101.0
    assert network.demand.sum() == 100.0
    assert RoadNetwork.braess().without_links([(3, 4)]).ends == [(1, 3), (1, 4), (3, 2), (4, 2)]


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"capacity": -2.0}, "link 1 → 2 has capacity = -2; it is finite and > 0"),
        ({"capacity": 0.0}, "has capacity = 0"),
        ({"free_flow_time": -1.0}, "has free_flow_time = -1; it is finite and ≥ 0"),
        ({"b": float("nan")}, "has b = nan"),
        ({"power": 0.5}, "power = 0.5"),
        ({"speed": 3.0}, "has the attribute 'speed'"),
    ],
)
def test_impossible_links_are_refused(changes, finding):
    with pytest.raises(ValueError, match=finding):
        two(**changes)


def test_impossible_networks_are_refused():
    make = RoadNetwork.from_links
    with pytest.raises(ValueError, match="1 → 2 is given twice"):
        make([(1, 2, ROAD), (1, 2, ROAD)], {(1, 2): 1.0})
    with pytest.raises(ValueError, match="lacks 'capacity'"):
        make([(1, 2, {"free_flow_time": 1.0})], {(1, 2): 1.0})
    with pytest.raises(ValueError, match="ends where it begins"):
        make([(1, 1, ROAD)], {(1, 2): 1.0}, nodes=2)
    with pytest.raises(ValueError, match="no route leads there"):
        make([(1, 2, ROAD)], {(2, 1): 1.0})
    with pytest.raises(ValueError, match="-3 trips from 1 to 2"):
        make([(1, 2, ROAD)], {(1, 2): -3.0})
    with pytest.raises(ValueError, match="from zone 1 to itself"):
        make([(1, 2, ROAD)], {(1, 1): 1.0})
    with pytest.raises(ValueError, match="holds no trip"):
        make([(1, 2, ROAD)], {(1, 2): 0.0})
    with pytest.raises(ValueError, match="has no link"):
        make([], {(1, 2): 1.0})
    with pytest.raises(ValueError, match="at most 2 zones"):
        make([(1, 2, ROAD)], torch.ones(3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="`first_through` is 7"):
        make([(1, 2, ROAD)], {(1, 2): 1.0}, first_through=7)
    graph = nx.DiGraph()
    graph.add_edge("a", "b", **ROAD)
    with pytest.raises(ValueError, match=r"the nodes of `graph` are not 1 to 2"):
        RoadNetwork(graph, torch.zeros(1, 1, dtype=torch.float64))
    network = two()
    with pytest.raises(ValueError, match=r"no link 1 → 7; from 1 links lead to \[2\]"):
        network.link(1, 7)
    with pytest.raises(ValueError, match=r"holds 0 .* twice"):
        network.numbered([(1, 2), 0])
    with pytest.raises(ValueError, match="numbered from 0 to 1"):
        network.numbered([2])
    with pytest.raises(ValueError, match="`time` is 0"):
        network.scaled(time=0.0)
    with pytest.raises(ValueError, match="the zones are 1 to 2"):
        network.with_demand({(1, 9): 1.0})


@pytest.mark.parametrize("place", [(0.0, float("nan")), (float("inf"), 0.0), (1.0,), ("a", 1), 3])
def test_coordinates_are_finite(place):
    with pytest.raises(ValueError, match=r"`coordinates` has .* for node 2; pass two finite"):
        RoadNetwork.from_links([(1, 2, ROAD)], {(1, 2): 1.0}, coordinates={1: (0.0, 0.0), 2: place})


@pytest.mark.parametrize("one", [1.0, 0.5, True, "1", None, np.bool_(True), torch.tensor(True)])
def test_numbers_of_links_are_whole(one):
    with pytest.raises(ValueError, match=r"`links` holds .*, which is neither a whole number nor"):
        two().numbered([one])
    with pytest.raises(ValueError, match=r"`links` holds the link .*, both whole numbers"):
        two().numbered([(one, 2)])
    with pytest.raises(ValueError, match=r"`links` holds the link .*, both whole numbers"):
        RoadNetwork.from_links([(1, 2, ROAD), (2, one, ROAD)], {(1, 2): 1.0})


def test_whole_numbers_of_any_type_are_numbers_of_links():
    assert two().numbered([np.int64(1), torch.tensor(0)]) == (1, 0)
    assert two().numbered([(np.int32(2), 1)]) == (1,)
    with pytest.raises(ValueError, match="the link 1 → 2 → 1; a link is from one node to another"):
        two().numbered([(1, 2, 1)])
    network = RoadNetwork.from_links([(np.int64(1), 2, ROAD)], {(1, 2): 1.0})
    assert type(network.ends[0][0]) is int


def test_no_route_passes_a_zone_below_the_first_through_node():
    # 1 → 2 → 3 would be short, but 2 is a zone.
    links = [(1, 2, ROAD), (2, 3, ROAD), (1, 4, ROAD | {"free_flow_time": 5.0}), (4, 3, ROAD)]
    free = RoadNetwork.from_links(links, {(1, 3): 1.0, (2, 3): 1.0})
    closed = RoadNetwork.from_links(links, {(1, 3): 1.0, (2, 3): 1.0}, first_through=4)
    times = free.free_flow_time.numpy()
    assert free.routes.to_zones(times)[2].tolist() == [2.0, 1.0, 0.0, 1.0]
    assert closed.routes.to_zones(times)[2].tolist() == [6.0, 1.0, 0.0, 1.0]
    assert closed.routes.usable[2].tolist() == [False, True, True, True]
    with pytest.raises(ValueError, match="trips from 1 to 3, but no route"):
        RoadNetwork.from_links(links[:2], {(1, 3): 1.0}, first_through=4, nodes=4)


def test_routes_are_those_of_networkx():
    network = RoadNetwork.hearn_ramana()
    found = network.routes.to_zones(network.free_flow_time.numpy())
    for zone in range(1, 5):
        wanted = nx.single_source_dijkstra_path_length(
            network.graph.reverse(), zone, weight="free_flow_time"
        )
        for node in range(1, 10):
            assert found[zone - 1, node - 1] == wanted.get(node, float("inf"))
