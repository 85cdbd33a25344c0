r"""From a smooth equilibrium to the exact one: minimising under a dispersion that grows.

As the dispersion θ grows, the stochastic equilibrium approaches the user equilibrium, and so do its
hypergradients where those exist (Patriksson, 2004). What is minimised over the latter has kinks
wherever a route enters, on which descent comes to rest early; the homotopy goes there through
smooth problems.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from bilevel import Minimum, OuterStep, State, minimize_bounded
from bilevel.method import HypergradientMethod
from bilevel.pytree import PyTree
from bilevel.solvers import ImplicitCG
from bilevel.task import Task, TaskBatch

from .stochastic_equilibrium import StochasticEquilibrium

__all__ = ["dispersion_homotopy"]


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
