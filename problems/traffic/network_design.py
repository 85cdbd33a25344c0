r"""Network design and road tolls on a stochastic equilibrium, as registered problems.

`dispersion_homotopy` brings their solutions to the exact equilibrium.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bilevel.registry import PROBLEMS
from bilevel.task import Task

from ..analytic import tasks_of
from ..example import Example
from ..seeding import generator
from .decisions import CapacityDecision, TollDecision
from .network import RoadNetwork
from .stochastic_equilibrium import StochasticEquilibrium

__all__ = ["NetworkDesign", "RoadTolls"]


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
