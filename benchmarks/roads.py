"""Tolls and network design, beside the published optima; and a network of 914 links.

    python benchmarks/roads.py [--full] [--root DIR] [--out benchmarks/results]

Braess and Hearn–Ramana are made here. With ``--full`` also, from TNTP files under ``--root``, tolls
on Sioux Falls, its network design (variants A, from three starts, and C), and Anaheim, solved
exactly and stochastically and tolled on its 50 most congested links. Values are those of the exact
user equilibrium. Writes a table, JSON, and maps of before and after.
"""

from __future__ import annotations

import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from arguments import arguments

from bilevel import OuterStep, solve_inner
from bilevel.experiments.results import Row, write_results
from bilevel.experiments.roads import (
    NetworkDesignSettings,
    RoadResult,
    TollSettings,
    design,
    network_of,
    toll,
)
from bilevel.problems.traffic import RoadTolls, user_equilibrium

# Computed with two independent solvers, or by formula.
REFERENCE = {"braess": 498.0, "hearn-ramana": 2253.9179, "sioux-falls": 7194256.0529}
BEST_KNOWN = {"A": 80.7402, "C": 79.8999}


class Silent:
    """Watches a run and says nothing."""

    def start(self, title: str, choices: dict[str, str], folder: str) -> None:
        """It begins."""

    def step(self, stage: int, stages: int, record: OuterStep) -> None:
        """An outer step was taken."""


def rows_of(where: dict[str, Any], found: RoadResult, reference: float) -> list[Row]:
    """The result of one run."""
    print(
        f"{found.title:52}{found.before:16,.4f}{found.after:16,.4f}{reference:16,.4f}"
        f"{found.seconds:8.1f} s  {', '.join(found.statuses)}",
        flush=True,
    )
    return [
        Row(where, "before", found.before),
        Row(where, "after", found.after, reference={"value": reference, "source": "best known"}),
        Row(where, "best_known", reference),
        Row(where, "excess_percent", 100 * (found.after - reference) / reference),
        Row(where, "saved_percent", 100 * (found.before - found.after) / found.before),
        Row(where, "seconds", found.seconds),
        Row(where, "gradients", found.evaluations.get("gradients", 0)),
        Row(where, "products", found.evaluations.get("products", 0)),
    ]


def anaheim(root: str | None, scratch: Path, out: Path) -> list[Row]:
    """Solve both equilibria, and toll the most congested links."""
    network = network_of("anaheim", root)
    where = {"network": "anaheim"}
    started = time.perf_counter()
    exact = user_equilibrium(network)
    seconds = time.perf_counter() - started
    mean = exact.total_time / float(network.demand.sum())
    problem = RoadTolls(network, dispersion=40.0 / mean)
    started = time.perf_counter()
    smooth = solve_inner(
        problem, problem.decision.zeros(), problem.task(), inner_solver=problem.solver()
    )
    rows = [
        Row(where, "beckmann", exact.beckmann),
        Row(where, "gap", exact.gap),
        Row(where, "exact_seconds", seconds),
        Row(where, "stochastic_seconds", time.perf_counter() - started),
        Row(where, "stochastic_residual", float(smooth.residual.max())),
    ]
    busy = (exact.flow / exact.capacity).argsort(descending=True)[:50].tolist()
    links = ",".join("{}-{}".format(*network.ends[a]) for a in busy)
    settings = TollSettings(
        network="anaheim", root=root, links=links, steps=40, stages=(40.0, 160.0)
    )
    found = toll(settings, scratch / "anaheim", Silent())
    shutil.copyfile(scratch / "anaheim" / "map.png", out / "roads-anaheim.png")
    assert found.optimum is not None
    rows += rows_of(where, found, found.optimum)
    # Of the whole process, PyTorch included; kibibytes on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [*rows, Row(where, "peak_mib", peak)]


def main() -> None:
    """Measure, print, write."""
    args = arguments(__doc__, "Sioux Falls and Anaheim, too", root=True)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{'':52}{'before':>16}{'after':>16}{'best known':>16}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if args.full:
            # First, so that the peak of memory is its own.
            rows += anaheim(args.root, scratch, args.out)
        for name in ("braess", "hearn-ramana", *(["sioux-falls"] * args.full)):
            found = toll(TollSettings(network=name, root=args.root), scratch / name, Silent())
            rows += rows_of({"network": name}, found, REFERENCE[name])
            shutil.copyfile(scratch / name / "map.png", args.out / f"roads-{name}.png")
        for variant, start in (("A", 0.0), ("A", 2.0), ("A", 12.5), ("C", 0.0)) * args.full:
            settings = NetworkDesignSettings(variant=variant, root=args.root, start=start)
            found = design(settings, scratch / f"{variant}{start}", Silent())
            where = {"variant": variant, "start": start}
            rows += rows_of(where, found, BEST_KNOWN[variant])
            if (variant, start) == ("A", 0.0):
                target = args.out / "roads-network-design.png"
                shutil.copyfile(scratch / "A0.0" / "map.png", target)
    command = f"python benchmarks/roads.py{' --full' * args.full}"
    path = write_results(args.out, "roads", sys.argv, rows, seeds=[], command=command)
    print(f"written: {path} and maps beside it")


if __name__ == "__main__":
    main()
