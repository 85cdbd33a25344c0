r"""Network design and road tolls on a stochastic equilibrium, by hypergradients.

As the dispersion θ grows, the stochastic equilibrium approaches the user equilibrium, and so do its
hypergradients where those exist (Patriksson, 2004). What is minimised over the latter has kinks
wherever a route enters, on which descent comes to rest early; `dispersion_homotopy` goes there
through smooth problems.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from bilevel import Minimum, OuterStep, State, minimize_bounded
from bilevel.method import HypergradientMethod
from bilevel.pytree import PyTree
from bilevel.registry import PROBLEMS
from bilevel.solvers import ImplicitCG
from bilevel.task import Task, TaskBatch

from ..analytic import tasks_of
from ..example import Example
from ..seeding import generator
from .decisions import CapacityDecision, TollDecision
from .network import RoadNetwork
from .stochastic_equilibrium import StochasticEquilibrium

__all__ = ["NetworkDesign", "RoadTolls", "dispersion_homotopy", "sioux_falls_design"]

# The problem of Suwansirikul, Friesz and Tobin (1987), in the numbering of the TNTP file from 1.
_SIOUX_FALLS_LINKS = (16, 17, 19, 20, 25, 26, 29, 39, 48, 74)
_SIOUX_FALLS_COSTS = (26, 40, 26, 40, 25, 25, 48, 34, 48, 34)


@PROBLEMS.register("network-design")
class NetworkDesign(StochasticEquilibrium):
    r"""Added link capacity under stochastic user equilibrium (continuous network design).

    $Z(y) = \sum_a t_a v_a + \vartheta \sum_a d_a y_a^2$; the outer variable is y ``[k]``, the inner
    one that of `StochasticEquilibrium`.

    Args:
        network: The network.
        links: The links that can be widened, by number or by (tail, head); None: all.
        costs: d, the cost of each; default: 1.
        weight: ϑ.
        dispersion: θ, in 1 / time.

    Example:
        >>> NetworkDesign(RoadNetwork.braess(), [(1, 4), (3, 2)], dispersion=1.0)
        NetworkDesign(CapacityDecision(Braess, 2 links, weight=1), dispersion=1)
    """

    def __init__(
        self,
        network: RoadNetwork,
        links: Iterable[int | tuple[int, int]] | None = None,
        costs: Sequence[float] | None = None,
        weight: float = 1.0,
        dispersion: float = 1.0,
    ) -> None:
        super().__init__(CapacityDecision(network, links, costs, weight), dispersion)

    @classmethod
    def example(
        cls, *, tasks: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> Example:
        """Four links of Hearn and Ramana's network; the tasks are hours of different demand."""
        network = _unit_network()
        problem = cls(network, [(5, 7), (6, 8), (7, 3), (8, 4)], weight=0.02, dispersion=1.0)
        outer = torch.tensor([0.2, 0.1, 0.0, 0.3], dtype=dtype)
        return _example(
            problem, outer, tasks, dtype, seed, "widened links of the nine-node network"
        )


@PROBLEMS.register("road-tolls")
class RoadTolls(StochasticEquilibrium):
    r"""Tolls under stochastic user equilibrium.

    $\mathrm{TSTT}(\tau) = \sum_a t_a v_a$; the outer variable is τ ``[k]`` in units of time, the
    inner one that of `StochasticEquilibrium`.

    Args:
        network: The network.
        links: The links that can be tolled, by number or by (tail, head); None: all.
        dispersion: θ, in 1 / time.

    Example:
        >>> RoadTolls(RoadNetwork.braess(), dispersion=1.0)
        RoadTolls(TollDecision(Braess, 5 links), dispersion=1)
    """

    def __init__(
        self,
        network: RoadNetwork,
        links: Iterable[int | tuple[int, int]] | None = None,
        dispersion: float = 1.0,
    ) -> None:
        super().__init__(TollDecision(network, links), dispersion)

    @classmethod
    def example(
        cls, *, tasks: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> Example:
        """All links of Hearn and Ramana's network; the tasks are hours of different demand."""
        problem = cls(_unit_network(), dispersion=1.0)
        outer = torch.linspace(0.0, 0.2, problem.network.links, dtype=dtype)
        return _example(problem, outer, tasks, dtype, seed, "tolls on the nine-node network")


def dispersion_homotopy(
    problem: StochasticEquilibrium,
    dispersions: Sequence[float],
    outer: Tensor,
    *,
    bounds: tuple[PyTree, PyTree],
    task: Task | TaskBatch | None = None,
    method: HypergradientMethod | None = None,
    tol: float = 1e-5,
    max_steps: int = 100,
    memory: int = 30,
    callback: Callable[[float, OuterStep], None] | None = None,
) -> list[Minimum]:
    """Minimise under one dispersion after the other, each from the solution of the one before.

    Args:
        problem: The problem; its own dispersion plays no part.
        dispersions: θ, as a rule increasing.
        outer: The outer variable to start from ``[k]``.
        bounds: As in `bilevel.minimize_bounded`.
        task: The demand; default: the network's own, `StochasticEquilibrium.task`.
        method: Default: `ImplicitCG` to a relative residual of 1e-10.
        tol: As in `bilevel.minimize_bounded`, relative to the first projected hypergradient of all.
        max_steps: The most outer steps under each dispersion.
        memory: As in `bilevel.minimize_bounded`; tolls are many and their valleys flat.
        callback: Called with θ and the record after each step.

    Returns:
        What was found under each dispersion.

    Raises:
        SolveError: The first hypergradient under some dispersion failed.
        ValueError: An argument is wrong; it is named.
    """
    if not len(dispersions):
        raise ValueError("`dispersions` is empty; pass at least one")
    task = problem.task() if task is None else task
    found: list[Minimum] = []
    state: State | None = None
    scale: float | None = None
    for theta in dispersions:
        one = problem.with_dispersion(theta)
        record = None if callback is None else _bound(callback, theta)
        found.append(
            minimize_bounded(
                one,
                outer,
                task,
                bounds=bounds,
                inner_solver=one.solver(tol=1e-12),
                method=method or ImplicitCG(max_steps=2000, rtol=1e-10),
                state=state,
                tol=tol,
                scale=scale,
                max_steps=max_steps,
                memory=memory,
                callback=record,
            )
        )
        # The later starts are nearly minima, to whose slopes nothing should be relative.
        scale = scale or found[0].steps[0].gradient_norm or None
        outer, state = found[-1].outer, found[-1].result.state
    return found


def _bound(
    callback: Callable[[float, OuterStep], None], theta: float
) -> Callable[[OuterStep], None]:
    return lambda step: callback(theta, step)


def sioux_falls_design(
    variant: Literal["A", "B", "C"] = "A", root: str | os.PathLike[str] | None = None
) -> CapacityDecision:
    """The continuous network design problem of Sioux Falls, on the files of TNTP.

    Ten links, 0 ≤ y ≤ 25; capacity and y in 1,000 vehicles an hour, time in hours, Z in 1,000
    vehicle-hours. Several versions circulate: "C" is TNTP in these units, with Z(0) = 99.9413; "B"
    has the links 10–16, 15–19 and 15–22 of the first papers, Z(0) = 100.9690; "A" has in addition
    their trips from 16 to 9, Z(0) = 101.0615.

    Args:
        variant: "A", "B" or "C".
        root: Where the files are; see `tntp`.

    Raises:
        DataError: The files are not there.
        ValueError: There is no such variant.
    """
    from ..data.tntp import tntp

    if variant not in ("A", "B", "C"):
        raise ValueError(f"`variant` is {variant!r}; pass 'A', 'B' or 'C'")
    network = tntp("SiouxFalls", root).scaled(
        capacity=1e-3, time=1e-2, demand=1.1e-3, time_unit="h", flow_unit="1000 veh/h"
    )
    if variant != "C":
        old = {(10, 16): (0.05, 5.1335), (15, 19): (0.04, 15.6508), (15, 22): (0.04, 10.3150)}
        network = network.with_links(
            {
                ends: {"free_flow_time": t, "capacity": c}
                for (i, j), (t, c) in old.items()
                for ends in ((i, j), (j, i))
            }
        )
    if variant == "A":
        network = network.with_demand({(16, 9): 1.64})
    links = [one - 1 for one in _SIOUX_FALLS_LINKS]
    return CapacityDecision(network, links, _SIOUX_FALLS_COSTS, weight=0.001)


# Small instances


def _unit_network() -> RoadNetwork:
    """Hearn and Ramana's network in units in which times and flows are about 1, half empty."""
    return RoadNetwork.hearn_ramana().scaled(capacity=0.1, time=0.1, demand=0.06)


def _example(
    problem: StochasticEquilibrium,
    outer: Tensor,
    tasks: int | None,
    dtype: torch.dtype,
    seed: int,
    note: str,
) -> Example:
    data = []
    for i in range(tasks or 1):
        random = generator(seed, i, "traffic")
        share = 0.8 + 0.4 * torch.rand(problem.network.demand.shape, generator=random).double()
        batch = {"demand": (problem.network.demand * share).to(dtype)}
        data.append(Task(batch, batch, key=i))
    task = data[0] if tasks is None else Task.stack(data)
    low, high = _curvature(problem, outer.double(), tasks_of(task))
    return Example(
        problem,
        outer,
        task,
        problem.solver(tol=1e-11 if dtype == torch.float64 else 2e-6),
        lipschitz=high,
        mu=low,
        note=f"{note}, dispersion {problem.dispersion:g}",
    )


def _curvature(
    problem: StochasticEquilibrium, outer: Tensor, tasks: Sequence[Task]
) -> tuple[float, float]:
    """Bounds on the eigenvalues of the inner Hessian at the start and at the solution."""
    from bilevel import solve_inner

    low, high = float("inf"), 0.0
    for one in tasks:
        batch = {key: value.double() for key, value in one.inner_batch.items()}
        start = problem.initial_inner(outer, batch)
        found = solve_inner(problem, outer, Task(batch, batch), inner_solver=problem.solver())
        for point in (start, found.inner):
            hessian = torch.autograd.functional.hessian(
                lambda s, batch=batch: problem.inner_objective(s, outer, batch), point
            )
            values = torch.linalg.eigvalsh(hessian)
            low, high = min(low, float(values[0])), max(high, float(values[-1]))
    # In float32 the points are others, by a little.
    return low * (1 - 1e-3), high * (1 + 1e-3)
