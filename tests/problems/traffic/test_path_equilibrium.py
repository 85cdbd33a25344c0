"""The exact equilibrium as an inner problem: formula, library and finite differences agree."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import hypergradient
from bilevel.problems import (
    CapacityDecision,
    PathEquilibrium,
    RoadNetwork,
    TollDecision,
    equilibrium_under,
    exact_hypergradient,
    sioux_falls_design,
    travel_time_slope,
)
from bilevel.solvers import DenseExact, ImplicitCG

METHOD = ImplicitCG(max_steps=3000, rtol=1e-13)


def by_library(problem, outer, method=METHOD):
    """The hypergradient at the equilibrium that the problem was made from."""
    found = hypergradient(
        problem,
        outer,
        problem.task(),
        inner_solver=None,
        inner=problem.path_flow,
        method=method,
    )
    assert found.ok
    return found


@pytest.mark.parametrize("toll", [0.0, 1.0, 5.0, 12.0, 12.9, 13.1, 20.0])
def test_braess(toll):
    """(4τ − 80)/13 up to the kink at τ = 13, then 0."""
    decision = TollDecision(RoadNetwork.braess(), [(3, 4)])
    outer = torch.tensor([toll], dtype=torch.float64)
    value, slope, found = exact_hypergradient(decision, outer)
    below = toll < 13
    assert slope.item() == pytest.approx((4 * toll - 80) / 13 if below else 0.0, abs=1e-8)
    expected = 552 - 80 * toll / 13 + 2 * toll**2 / 13 if below else 498.0
    assert value == pytest.approx(expected, abs=1e-7)  # t⁰ = 1e-8 on two links
    problem = PathEquilibrium(decision, found)
    for method in (METHOD, DenseExact()):
        if below:
            gradient = by_library(problem, outer, method).gradient
            assert gradient.item() == pytest.approx((4 * toll - 80) / 13, abs=1e-8)


def same_routes(a, b):
    def key(found):
        return sorted((int(k), p.tolist()) for k, p in zip(found.pair, found.paths, strict=True))

    return key(a) == key(b)


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), tolls=st.booleans())
def test_random_networks(ring, seed, tolls):
    network = ring(seed)
    decision = (
        TollDecision(network, [0, 2, 5])
        if tolls
        else CapacityDecision(network, [0, 2, 5], [1.0, 2.0, 3.0], 0.1)
    )
    outer = torch.tensor([0.1, 0.4, 0.2], dtype=torch.float64)
    value, gradient, found = exact_hypergradient(decision, outer)
    assert value == pytest.approx(decision.value(outer, found.flow).item())
    problem = PathEquilibrium(decision, found)
    if len(problem.path_flow):
        library = by_library(problem, outer).gradient
        torch.testing.assert_close(library, gradient, rtol=1e-7, atol=1e-8)
    h = 1e-5
    for i in range(3):
        e = h * torch.eye(3, dtype=torch.float64)[i]
        ends = [exact_hypergradient(decision, outer + s * e, start=found) for s in (1, -1)]
        if all(same_routes(found, end[2]) for end in ends):  # else a kink may be near
            slope = (ends[0][0] - ends[1][0]) / (2 * h)
            assert gradient[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_the_closed_formulas():
    network = RoadNetwork.hearn_ramana()
    outer = torch.tensor([1.0, 2.0], dtype=torch.float64)
    links = [(5, 7), (8, 3)]
    design = CapacityDecision(network, links, [3.0, 1.0], 0.5)
    _, gradient, found = exact_hypergradient(design, outer)
    E = PathEquilibrium(design, found).exchange
    D = travel_time_slope(network, found.flow, found.capacity)
    rhs = E @ (found.time + found.flow * D)
    shift = torch.linalg.pinv((E * D) @ E.mT, rtol=1e-12) @ rhs @ E
    index = design.index
    slope = -D * found.flow / found.capacity  # ∂t/∂y = −t' v / c
    expected = (found.flow - shift)[index] * slope[index]
    expected = expected + 2 * 0.5 * torch.tensor([3.0, 1.0]) * outer
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-10)
    tolls = TollDecision(network, links)
    _, gradient, found = exact_hypergradient(tolls, outer)
    E = PathEquilibrium(tolls, found).exchange
    D = travel_time_slope(network, found.flow)
    rhs = E @ (found.time + found.flow * D)
    shift = torch.linalg.pinv((E * D) @ E.mT, rtol=1e-12) @ rhs @ E
    torch.testing.assert_close(gradient, -shift[tolls.index], rtol=1e-9, atol=1e-10)


def test_first_best_tolls_are_stationary(real_network):
    from bilevel.problems import system_optimum

    network = real_network("SiouxFalls")
    best, toll = system_optimum(network)
    decision = TollDecision(network)
    value, gradient, _ = exact_hypergradient(decision, toll)
    assert value == pytest.approx(7194256.0529, abs=1e-3)
    assert gradient.abs().max() <= 1e-6 * best.flow.max()


@pytest.mark.parametrize("variant", ["A", "C"])
@pytest.mark.parametrize("y", [2.0, 5.0, 12.5])
def test_sioux_falls(real_network, variant, y):
    real_network("SiouxFalls")
    decision = sioux_falls_design(variant)
    outer = torch.full((10,), y, dtype=torch.float64)
    _, gradient, found = exact_hypergradient(decision, outer)
    problem = PathEquilibrium(decision, found)
    # Far more exchanges than links are congested: the matrix is singular, yet consistent.
    H = (problem.exchange * travel_time_slope(decision.network, found.flow, found.capacity)) @ (
        problem.exchange.mT
    )
    assert torch.linalg.matrix_rank(H, hermitian=True) < len(H) / 2
    library = by_library(problem, outer)
    torch.testing.assert_close(library.gradient, gradient, rtol=1e-9, atol=1e-9)
    random = torch.Generator().manual_seed(0)
    direction = torch.rand(10, generator=random, dtype=torch.float64)
    h = 1e-4

    def value(step):
        return exact_hypergradient(decision, outer + step * direction, start=found)[0]

    slope = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
    assert (gradient @ direction).item() == pytest.approx(slope, abs=1e-6)


def test_what_does_not_belong_together_is_refused():
    decision = TollDecision(RoadNetwork.hearn_ramana())
    other = equilibrium_under(TollDecision(RoadNetwork.braess()), torch.zeros(5))
    with pytest.raises(ValueError, match="of another network than `decision`"):
        PathEquilibrium(decision, other)
    with pytest.raises(ValueError, match="`links` is empty"):
        TollDecision(RoadNetwork.braess(), [])
    with pytest.raises(ValueError, match="has 2 numbers for 1 links"):
        CapacityDecision(RoadNetwork.braess(), [0], [1.0, 2.0])
    with pytest.raises(ValueError, match="`costs` holds -1"):
        CapacityDecision(RoadNetwork.braess(), [0], [-1.0])


def test_one_route_alone_leaves_nothing_to_exchange():
    road = {"free_flow_time": 1.0, "capacity": 1.0}
    network = RoadNetwork.from_links([(1, 2, road), (2, 1, road)], {(1, 2): 2.0, (2, 1): 1.0})
    decision = CapacityDecision(network, [0], weight=0.0)
    outer = torch.tensor([0.5], dtype=torch.float64)
    _, gradient, _ = exact_hypergradient(decision, outer)
    # Z = 2 (1 + 0.15 (2/c)⁴) + …, and no flow moves.
    assert gradient.item() == pytest.approx(-2 * 0.15 * 4 * 2**4 / 1.5**5)
