"""Logit loading and stochastic equilibrium: conservation, derivatives, limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import Task, hypergradient, solve_inner
from bilevel.problems import (
    CapacityDecision,
    LogitLoading,
    NetworkDesign,
    RoadNetwork,
    RoadTolls,
    StochasticEquilibrium,
    TollDecision,
    travel_time,
    travel_time_slope,
    user_equilibrium,
)
from bilevel.solvers import ImplicitCG

seeds = st.integers(0, 10**6)
METHOD = ImplicitCG(max_steps=2000, rtol=1e-12)


def solved(problem, outer, task=None, inner=None):
    found = solve_inner(
        problem,
        outer,
        task or problem.task(),
        inner_solver=problem.solver(tol=1e-12),
        inner=inner,
    )
    assert found.ok, found
    return found.inner


def balance(network, flow):
    """What leaves each node minus what enters it."""
    out = torch.zeros(network.nodes, dtype=flow.dtype)
    return out.index_add(0, network.tail, flow).index_add(0, network.head, -flow)


def wanted(network):
    whole = torch.zeros(network.nodes, dtype=torch.float64)
    whole[: network.zones] = network.demand.sum(1) - network.demand.sum(0)
    return whole


def enough(network):
    """A dispersion at which the sum over walks converges for certain, and a little more."""
    degree = max(degree for _, degree in network.graph.out_degree())
    return 1.2 * math.log(degree) / network.free_flow_time.min().item()


@settings(max_examples=20)
@given(seed=seeds, times=st.floats(1.0, 30.0))
def test_loading_conserves_flow(ring, seed, times):
    network = ring(seed)
    loading = LogitLoading(network, times * enough(network))
    flow = loading.flows(network.free_flow_time, network.demand)
    assert flow.min() >= -1e-12
    torch.testing.assert_close(balance(network, flow), wanted(network), rtol=1e-9, atol=1e-9)


@settings(max_examples=20)
@given(seed=seeds)
def test_flows_are_the_slope_of_the_expected_cost(ring, seed):
    network = ring(seed)
    loading = LogitLoading(network, enough(network))
    cost = (network.free_flow_time * 1.3).requires_grad_()
    (slope,) = torch.autograd.grad(loading.expected_cost(cost, network.demand), cost)
    torch.testing.assert_close(slope, loading.flows(cost.detach(), network.demand))
    # −∂X/∂c is symmetric and positive semidefinite.
    M = -torch.autograd.functional.jacobian(
        lambda c: loading.flows(c, network.demand), cost.detach()
    )
    torch.testing.assert_close(M, M.mT, rtol=1e-9, atol=1e-10)
    assert torch.linalg.eigvalsh(M)[0] >= -1e-9 * M.abs().max()


def test_two_routes_share_by_logit():
    road = {"capacity": 1.0, "b": 0.0}
    network = RoadNetwork.from_links(
        [
            (1, 2, road | {"free_flow_time": 3.0}),
            (1, 3, road | {"free_flow_time": 1.0}),
            (3, 2, road | {"free_flow_time": 1.5}),
        ],
        {(1, 2): 10.0},
    )
    flow = LogitLoading(network, 0.7).flows(network.free_flow_time, network.demand)
    share = 1 / (1 + math.exp(-0.7 * 0.5))
    torch.testing.assert_close(flow[1], torch.tensor(10 * share, dtype=torch.float64))
    # A great dispersion takes the shortest route alone, without underflow.
    flow = LogitLoading(network, 1e5).flows(1e3 * network.free_flow_time, network.demand)
    assert flow.tolist() == [0.0, 10.0, 10.0]


def test_zones_are_not_passed():
    road = {"capacity": 1.0, "free_flow_time": 1.0}
    links = [(1, 2, road), (2, 3, road), (1, 4, road | {"free_flow_time": 5.0}), (4, 3, road)]
    network = RoadNetwork.from_links(links, {(1, 3): 2.0, (2, 3): 1.0}, first_through=4)
    flow = LogitLoading(network, 0.1).flows(network.free_flow_time, network.demand)
    torch.testing.assert_close(flow, torch.tensor([0.0, 1.0, 2.0, 2.0], dtype=torch.float64))


def test_walks_that_never_end_are_refused(ring):
    network = ring(0)
    with pytest.raises(ValueError, match=r"sum over walks with cycles diverges .* raise it \("):
        LogitLoading(network, 0.05)
    for wrong in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="finite and > 0"):
            RoadTolls(network, dispersion=wrong)
    LogitLoading(network, enough(network))


@settings(max_examples=15)
@given(seed=seeds, data=st.integers(0, 1000))
def test_slope_is_the_excess_flow(ring, seed, data):
    """∂g/∂v = D (v − X), by the chain rule through s."""
    network = ring(seed)
    decision = CapacityDecision(network, [0, 3])
    problem = StochasticEquilibrium(decision, 1.5 * enough(network))
    outer = torch.tensor([0.3, 0.0], dtype=torch.float64)
    random = torch.Generator().manual_seed(data)
    flow = 0.3 + 3 * torch.rand(network.links, generator=random, dtype=torch.float64)
    batch = problem.task().inner_batch
    s = problem.coordinates(flow).requires_grad_()
    (slope,) = torch.autograd.grad(problem.inner_objective(s, outer, batch), s)
    capacity = decision.capacity(outer)
    time = travel_time(network, flow, capacity)
    torch.testing.assert_close(problem.times(s, outer), time, rtol=1e-12, atol=1e-12)
    excess = flow - problem.loading.flows(time, network.demand)
    D = travel_time_slope(network, flow, capacity)
    # ds = √D₀ dv, with D₀ at the network's own capacities.
    D0 = travel_time_slope(network, flow)
    expected = D * excess / D0.sqrt() / problem.scale**0.5
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-11)


@settings(max_examples=10)
@given(seed=seeds, tolls=st.booleans())
def test_hypergradient_is_that_of_finite_differences(ring, seed, tolls):
    network = ring(seed)
    decision = (
        TollDecision(network, [0, 2, 5])
        if tolls
        else CapacityDecision(network, [0, 2, 5], [1.0, 2.0, 3.0], 0.1)
    )
    problem = StochasticEquilibrium(decision, 1.5 * enough(network))
    outer = torch.tensor([0.1, 0.4, 0.2], dtype=torch.float64)
    start = solved(problem, outer)
    found = hypergradient(
        problem,
        outer,
        problem.task(),
        inner_solver=problem.solver(tol=1e-12),
        method=METHOD,
        inner=start,
    )

    def value(x):
        inner = solved(problem, x, inner=start)
        return problem.outer_objective(inner, x, problem.task().outer_batch).item()

    h = 1e-3
    for i in range(3):
        e = h * torch.eye(3, dtype=torch.float64)[i]
        slope = (
            8 * (value(outer + e) - value(outer - e))
            - (value(outer + 2 * e) - value(outer - 2 * e))
        ) / (12 * h)
        assert found.gradient[i].item() == pytest.approx(slope, rel=1e-6, abs=1e-7)


@settings(max_examples=10)
@given(seed=seeds)
def test_solution_is_a_fixed_point(ring, seed):
    network = ring(seed)
    problem = RoadTolls(network, dispersion=2 * enough(network))
    outer = problem.decision.zeros()
    inner = solved(problem, outer)
    batch = problem.task().inner_batch
    flow = problem.flows(inner, outer, batch)
    time = travel_time(network, flow)
    torch.testing.assert_close(problem.times(inner, outer), time, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(balance(network, flow), wanted(network), rtol=1e-9, atol=1e-9)


@settings(max_examples=5)
@given(seed=seeds)
def test_user_equilibrium_is_the_limit(ring, seed):
    network = ring(seed)
    exact = user_equilibrium(network)
    gaps = []
    for theta in (20.0, 80.0, 320.0):
        problem = RoadTolls(network, dispersion=theta)
        outer = problem.decision.zeros()
        inner = solved(problem, outer)
        cost = problem.times(inner, outer)
        flow = problem.flows(inner, outer, problem.task().inner_batch)
        gaps.append(((flow * cost).sum() / exact.total_time - 1).abs().item())
    assert gaps[2] <= max(0.3 * gaps[0], 1e-6)
    assert gaps[2] <= 1e-2


def test_braess_without_cycles_takes_any_dispersion():
    problem = RoadTolls(RoadNetwork.braess(), [(3, 4)], dispersion=5.0)
    inner = solved(problem, problem.decision.zeros())
    metrics = problem.metrics(inner, problem.decision.zeros(), problem.task().outer_batch)
    assert metrics["total_time"].item() == pytest.approx(552.0, rel=1e-3)
    assert metrics["revenue"] == 0.0


def test_hours_of_the_day_are_tasks():
    network = RoadNetwork.hearn_ramana()
    problem = NetworkDesign(network, [(5, 7), (6, 8)], [1.0, 2.0], 0.1, dispersion=0.5)
    hours = [problem.task(network.demand * share) for share in (0.5, 0.8, 1.0)]
    outer = torch.tensor([1.0, 0.5], dtype=torch.float64)
    settings = {"inner_solver": problem.solver(tol=1e-11), "method": METHOD}
    stacked = hypergradient(problem, outer, Task.stack(hours), **settings)
    one_by_one = [hypergradient(problem, outer, hour, **settings) for hour in hours]
    assert stacked.ok
    mean = torch.stack([one.gradient for one in one_by_one]).mean(0)
    torch.testing.assert_close(stacked.gradient, mean, rtol=1e-8, atol=1e-9)
    with pytest.raises(ValueError, match="trips between zones where the network"):
        problem.task(network.demand.mT)


def test_links_that_no_trip_can_use_stay_out_of_it():
    road = {"free_flow_time": 1.0, "capacity": 1.0}
    network = RoadNetwork.from_links(
        [(1, 2, road), (2, 1, road), (1, 3, road), (3, 2, road | {"b": 0.0})], {(1, 2): 2.0}
    )
    problem = RoadTolls(network, dispersion=2.0)
    # 2 → 1 leads away from the only destination; 3 → 2 takes as long however full it is.
    assert problem.live.tolist() == [0, 2]
    inner = solved(problem, problem.decision.zeros())
    flow = problem.flows(inner, problem.decision.zeros(), problem.task().inner_batch)
    assert flow[1] == 0.0
    torch.testing.assert_close(flow[2], flow[3])
    torch.testing.assert_close(flow[0] + flow[2], torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.slow
def test_anaheim(real_network):
    network = real_network("Anaheim")
    problem = RoadTolls(network, dispersion=10.0)
    outer = problem.decision.zeros()
    found = solve_inner(problem, outer, problem.task(), inner_solver=problem.solver(tol=1e-8))
    assert found.ok
    flow = problem.flows(found.inner, outer, problem.task().inner_batch)
    torch.testing.assert_close(balance(network, flow), wanted(network), rtol=1e-9, atol=1e-6)
    assert (flow * problem.times(found.inner, outer)).sum().item() == pytest.approx(
        1419041.94, abs=1.0
    )


@pytest.mark.parametrize("change", [{"b": 0.0}, {"power": 0.0}])
def test_roads_without_congestion_are_refused_by_name(change):
    network = RoadNetwork.braess()
    flat = network.with_links(dict.fromkeys(network.ends, change))
    with pytest.raises(ValueError, match=r"no link's time depends on its flow in Braess"):
        RoadTolls(flat, dispersion=1.0)


def test_a_decision_of_another_length_is_refused():
    problem = RoadTolls(RoadNetwork.braess(), dispersion=1.0)
    with pytest.raises(ValueError, match=r"`outer` is \(3,\), but 5 links are decided on"):
        problem.decision.toll(torch.zeros(3))
