"""Network design and tolls by hypergradients, against published and computed figures."""

import pytest
import torch

from bilevel import OuterStatus, hypergradient, solve_inner
from bilevel.problems import (
    RoadNetwork,
    RoadTolls,
    StochasticEquilibrium,
    TollDecision,
    dispersion_homotopy,
    equilibrium_under,
    exact_hypergradient,
    sioux_falls_design,
    system_optimum,
)
from bilevel.solvers import ImplicitCG

F64 = torch.float64
CHAIN = (200.0, 800.0, 3200.0, 6400.0)


def test_second_best_toll_on_braess_is_the_system_optimum():
    """A toll of 13 or more on 3 → 4 alone closes the link: 498."""
    network = RoadNetwork.braess()
    found = dispersion_homotopy(
        RoadTolls(network, [(3, 4)]),
        (0.05, 0.2, 1.0, 5.0),
        torch.zeros(1, dtype=F64),
        bounds=(0.0, 20.0),
    )
    decision = TollDecision(network, [(3, 4)])
    assert equilibrium_under(decision, found[-1].outer).total_time == pytest.approx(498, abs=1e-5)
    assert found[-1].value == pytest.approx(498, abs=0.1)


def test_first_best_tolls_on_the_nine_nodes():
    network = RoadNetwork.hearn_ramana()
    best, _ = system_optimum(network)
    found = dispersion_homotopy(
        RoadTolls(network, dispersion=1.0),
        (1.0, 4.0, 16.0, 64.0),
        torch.zeros(18, dtype=F64),
        bounds=(0.0, None),
        max_steps=200,
    )
    tolled = equilibrium_under(TollDecision(network), found[-1].outer)
    assert tolled.total_time == pytest.approx(best.total_time, rel=1e-3)


def test_arguments_are_checked():
    problem = RoadTolls(RoadNetwork.braess(), dispersion=1.0)
    with pytest.raises(ValueError, match="`dispersions` is empty"):
        dispersion_homotopy(problem, (), problem.decision.zeros(), bounds=(0, 1))
    with pytest.raises(ValueError, match="`variant` is 'Z'"):
        sioux_falls_design("Z")


def test_the_callback_is_told_the_dispersion():
    problem = RoadTolls(RoadNetwork.hearn_ramana(), [(5, 7)], dispersion=1.0)
    seen = []
    dispersion_homotopy(
        problem,
        (0.5, 1.0),
        problem.decision.zeros(),
        bounds=(0.0, 5.0),
        callback=lambda theta, step: seen.append((theta, step.step)),
    )
    assert seen[0] == (0.5, 0)
    assert seen[-1][0] == 1.0


# Sioux Falls


@pytest.mark.parametrize(
    ("variant", "value"), [("A", 101.06153), ("B", 100.96899), ("C", 99.94127)]
)
def test_nothing_built(real_network, variant, value):
    real_network("SiouxFalls")
    decision = sioux_falls_design(variant)
    found, _, _ = exact_hypergradient(decision, decision.zeros())
    assert found == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(("y", "value"), [(2.0, 85.9806), (12.5, 121.7928)])
def test_published_starting_points(real_network, y, value):
    real_network("SiouxFalls")
    found, _, _ = exact_hypergradient(sioux_falls_design("A"), torch.full((10,), y, dtype=F64))
    # The figure was made with capacities rounded to four digits.
    assert found == pytest.approx(value, abs=3e-4)


@pytest.mark.parametrize(
    ("vector", "value"),
    [
        ((4.8, 1.2, 4.8, 0.8, 2.0, 2.6, 4.8, 4.4, 4.8, 4.4), 80.527),
        ((5.38, 2.26, 5.50, 2.01, 2.64, 2.47, 4.54, 4.45, 4.21, 4.67), 80.288),
        ((4.87, 4.89, 1.87, 1.53, 2.72, 2.71, 6.25, 5.03, 3.76, 3.57), 82.868),
    ],
)
def test_designs_are_evaluated_exactly(real_network, vector, value):
    real_network("SiouxFalls")
    found, _, _ = exact_hypergradient(sioux_falls_design("C"), torch.tensor(vector, dtype=F64))
    assert found == pytest.approx(value, abs=6e-4)


@pytest.mark.parametrize("variant", ["A", "C"])
@pytest.mark.parametrize("theta", [200.0, 800.0])
def test_smooth_hypergradient_against_finite_differences(real_network, variant, theta):
    real_network("SiouxFalls")
    problem = StochasticEquilibrium(sioux_falls_design(variant), theta)
    outer = torch.full((10,), 5.0, dtype=F64)
    task, solver = problem.task(), problem.solver(tol=1e-12)
    start = solve_inner(problem, outer, task, inner_solver=solver)
    assert start.ok
    found = hypergradient(
        problem,
        outer,
        task,
        inner_solver=solver,
        method=ImplicitCG(1000, 1e-12),
        inner=start.inner,
    )
    assert found.ok
    if variant == "A":
        expected = {200.0: 82.8856, 800.0: 82.9196}[theta]
        assert found.outer_value.item() == pytest.approx(expected, abs=6e-5)

    def value(x):
        inner = solve_inner(problem, x, task, inner_solver=solver, inner=start.inner)
        assert inner.ok
        return problem.outer_objective(inner.inner, x, task.outer_batch).item()

    random = torch.Generator().manual_seed(3)
    direction = torch.randn(10, generator=random, dtype=F64)
    direction /= direction.norm()
    h = 2e-3

    def central(h):
        return (value(outer + h * direction) - value(outer - h * direction)) / (2 * h)

    # Richardson's extrapolation, of sixth order.
    a, b, c = central(h), central(2 * h), central(4 * h)
    slope = (4 * a - b) / 3 + ((4 * a - b) / 3 - (4 * b - c) / 3) / 15
    assert (found.gradient @ direction).item() == pytest.approx(slope, abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("start", [0.0, 2.0, 12.5])
def test_the_homotopy_reaches_the_best_known_design(real_network, start):
    real_network("SiouxFalls")
    decision = sioux_falls_design("A")
    found = dispersion_homotopy(
        StochasticEquilibrium(decision, CHAIN[0]),
        CHAIN,
        torch.full((10,), start, dtype=F64),
        bounds=(0.0, 25.0),
    )
    assert all(one.status in (OuterStatus.CONVERGED, OuterStatus.STALLED) for one in found)
    assert found[-1].value == pytest.approx(80.7683, abs=1e-3)
    value, _, _ = exact_hypergradient(decision, found[-1].outer)
    assert value <= 80.75


@pytest.mark.slow
def test_first_best_tolls_by_hypergradients(real_network):
    network = real_network("SiouxFalls")
    found = dispersion_homotopy(
        RoadTolls(network, dispersion=2.0),
        (2.0, 8.0, 32.0, 128.0),
        torch.zeros(76, dtype=F64),
        bounds=(0.0, None),
        max_steps=250,
        tol=1e-6,
    )
    tolled = equilibrium_under(TollDecision(network), found[-1].outer)
    assert tolled.total_time <= 7194256.05 * (1 + 1e-4)
