r"""Tolls and new capacity on a road network: solved, judged by the exact equilibrium, and drawn.

The hypergradients are those of stochastic equilibria, whose dispersion θ grows from stage to stage
(`dispersion_homotopy`); what they found is judged by the exact user equilibrium.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bilevel import OuterStep
from bilevel.problems.traffic import (
    Decision,
    RoadNetwork,
    StochasticEquilibrium,
    TollDecision,
    UserEquilibrium,
    dispersion_homotopy,
    equilibrium_under,
    sioux_falls_design,
    system_optimum,
    user_equilibrium,
)
from bilevel.run_folder import RESULT, RunFolder, alone

from ..results import commit
from .cases import links_of, network_of
from .map import Panel, draw_map

__all__ = ["NetworkDesignSettings", "RoadResult", "TollSettings", "Watcher", "design", "toll"]

_FILES = ("map.png", "links.csv")
# θ times the mean time of a trip: the first is smooth, the last next to the exact equilibrium.
_STAGES = (40.0, 160.0, 640.0, 2560.0)


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How to search, whatever is decided.

    Attributes:
        root: Folder with the data sets.
        steps: The most outer steps in each stage.
        stages: Products of the dispersion θ and the mean time of a trip, increasing.
        tol: Of the outer problem, as in `dispersion_homotopy`.
    """

    root: str | None = None
    steps: int = 100
    stages: tuple[float, ...] = _STAGES
    tol: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class TollSettings(SearchSettings):
    """What tolls to find. They are many, and their valleys flat: more steps, a lower tolerance.

    Attributes:
        network: As in `network_of`.
        links: The links that can be tolled, ``all`` or such as ``3-4,5-7``.
    """

    network: str = "braess"
    links: str = "all"
    steps: int = 250
    tol: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class NetworkDesignSettings(SearchSettings):
    """What capacity to add to Sioux Falls.

    Attributes:
        variant: A, B or C; see `sioux_falls_design`.
        start: Added capacity to start from, on each link.
        most: The most that can be added to a link.
    """

    variant: str = "A"
    start: float = 0.0
    most: float = 25.0


@dataclass(frozen=True)
class RoadResult:
    """What was found.

    Attributes:
        title: What was solved.
        unit: Of the values.
        before: What is minimised, at the exact equilibrium before.
        after: The same, at the exact equilibrium after.
        optimum: The least that is possible, where it is known; None otherwise.
        more: Other numbers, by name.
        statuses: How each stage ended.
        evaluations: Gradients and products of the inner objective, by name.
        seconds: Wall-clock time of the search.
        files: What was written.
    """

    title: str
    unit: str
    before: float
    after: float
    optimum: float | None
    more: dict[str, float]
    statuses: list[str]
    evaluations: dict[str, int]
    seconds: float
    files: list[Path] = field(default_factory=list)


class Watcher(Protocol):
    """What is told of a run while it lasts."""

    def start(self, title: str, choices: dict[str, str], folder: str) -> None:
        """It begins."""

    def step(self, stage: int, stages: int, record: OuterStep) -> None:
        """An outer step was taken."""


def toll(
    settings: TollSettings, out: Path, watcher: Watcher, *, overwrite: bool = False
) -> RoadResult:
    """Find tolls that make total travel time small.

    Raises:
        DataError: The network cannot be read.
        RunFolderError: The run folder cannot be written.
        SolveError: An equilibrium could not be found.
    """
    network = network_of(settings.network, settings.root)
    decision = TollDecision(network, links_of(settings.links, network))
    before = user_equilibrium(network)
    best, _ = system_optimum(network)
    all_links = len(decision) == network.links

    def tolls(x: Tensor) -> Tensor:
        """Those that were found, without what the network itself costs."""
        return decision.toll(x) - network.toll

    title = f"{'first' if all_links else 'second'}-best tolls on {network.name}"
    return _run(
        settings,
        out,
        watcher,
        overwrite=overwrite,
        title=title,
        decision=decision,
        outer=decision.zeros(),
        bounds=(0.0, None),
        before=before,
        optimum=best.total_time,
        last=lambda x: Panel("tolls", tolls(x).tolist(), f"toll, {network.time_unit}"),
        more=lambda x, after: {"revenue": float((tolls(x) * after.flow).sum())},
    )


def design(
    settings: NetworkDesignSettings, out: Path, watcher: Watcher, *, overwrite: bool = False
) -> RoadResult:
    """Find capacity to add to Sioux Falls, at a cost.

    Raises:
        DataError: The files are not there, or malformed.
        RunFolderError: The run folder cannot be written.
        SolveError: An equilibrium could not be found.
    """
    if not 0.0 <= settings.start <= settings.most:
        raise ValueError(
            f"`start` is {settings.start:g}; the capacity added to a link is from 0 to "
            f"{settings.most:g}"
        )
    decision = sioux_falls_design(settings.variant, settings.root)
    network = decision.network
    outer = torch.full((len(decision),), settings.start, dtype=torch.float64)

    def added(x: Tensor) -> Panel:
        values = decision.capacity(x) - network.capacity
        return Panel("added capacity", values.tolist(), f"added capacity, {network.flow_unit}")

    return _run(
        settings,
        out,
        watcher,
        overwrite=overwrite,
        title=f"network design of Sioux Falls, variant {settings.variant}",
        decision=decision,
        outer=outer,
        bounds=(0.0, settings.most),
        before=equilibrium_under(decision, decision.zeros()),
        optimum=None,
        last=added,
        more=lambda x, after: {"total time": after.total_time},
    )


def _run(
    settings: SearchSettings,
    out: Path,
    watcher: Watcher,
    *,
    overwrite: bool,
    title: str,
    decision: Decision,
    outer: Tensor,
    bounds: tuple[float, float | None],
    before: UserEquilibrium,
    optimum: float | None,
    last: Callable[[Tensor], Panel],
    more: Callable[[Tensor, UserEquilibrium], dict[str, float]],
) -> RoadResult:
    network = decision.network
    mean = before.total_time / max(float(network.demand.sum()), 1e-300)
    if not mean > 0.0:
        raise ValueError(
            f"nobody loses time on {network.name}: trips take no time, or there are none, so "
            "that there is nothing to gain"
        )
    with alone(out):
        folder = RunFolder(out, overwrite=overwrite)
        for name in _FILES:
            folder.remove(name)
        folder.write_json("config.json", {**asdict(settings), "commit": commit()})
        thetas = [stage / mean for stage in settings.stages]
        choices = {
            "network": f"nodes {network.nodes}, links {network.links}, pairs {len(network.pairs)}",
            "decided": f"links {len(decision)}",
            "stages": f"{len(thetas)}, dispersion {thetas[0]:.3g} to {thetas[-1]:.3g}",
        }
        watcher.start(title, choices, str(out))
        started = time.perf_counter()

        def record(theta: float, step: OuterStep) -> None:
            folder.append({"dispersion": theta, **asdict(step)})
            watcher.step(thetas.index(theta), len(thetas), step)

        found = dispersion_homotopy(
            StochasticEquilibrium(decision, thetas[0]),
            thetas,
            outer,
            bounds=bounds,
            max_steps=settings.steps,
            tol=settings.tol,
            callback=record,
        )
        x = found[-1].outer
        seconds = time.perf_counter() - started
        after = equilibrium_under(decision, x)
        counts: dict[str, int] = {}
        for one in found:
            for name, count in one.counts.items():
                counts[name] = counts.get(name, 0) + count
        result = RoadResult(
            title,
            _unit(network),
            float(decision.value(decision.zeros(), before.flow)),
            float(decision.value(x, after.flow)),
            optimum,
            more(x, after),
            [one.status.name for one in found],
            counts,
            seconds,
            [folder.path / name for name in (*_FILES, RESULT)],
        )
        # The picture last: what was found must not hang on it.
        plain = {key: value for key, value in asdict(result).items() if key != "files"}
        folder.write_json(RESULT, {**plain, "outer": x.tolist()})
        folder.write("links.csv", lambda file: file.write(_table(decision, x, before, after)))
        folder.write("map.png", lambda file: _map(network, before, after, last(x), file))
    return result


def _unit(network: RoadNetwork) -> str:
    return f"{network.flow_unit} · {network.time_unit}"


def _map(
    network: RoadNetwork, before: UserEquilibrium, after: UserEquilibrium, last: Panel, file: Any
) -> None:
    label = "flow over capacity"
    panels = [
        Panel(name, (one.flow / one.capacity).tolist(), label, middle=1.0)
        for name, one in (("before", before), ("after", after))
    ]
    draw_map(network, [*panels, last], file)


def _table(decision: Decision, x: Tensor, before: UserEquilibrium, after: UserEquilibrium) -> bytes:
    """A line for each link."""
    network = decision.network
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["tail", "head", "capacity", "toll", "flow_before", "flow_after"]
    writer.writerow([*head, "time_before", "time_after"])
    columns = (
        decision.capacity(x),
        decision.toll(x),
        before.flow,
        after.flow,
        before.time,
        after.time,
    )
    for ends, *numbers in zip(network.ends, *(c.tolist() for c in columns), strict=True):
        writer.writerow([*ends, *(f"{number:.10g}" for number in numbers)])
    return text.getvalue().encode()
