"""Adaptive accuracy against the best of a grid of fixed tolerances.

    python benchmarks/adaptive.py [--full] [--root DIR] [--out benchmarks/results]

Two outer problems, solved by `minimize` with untouched defaults, by the schedules of HOAG, and with
25 pairs of fixed tolerances: selection of 22 regularisation weights of a logistic model on ijcnn1
(from DIR or BILEVEL_DATA), and a quadratic of condition number 1e4 in 200 inner variables. The
final outer value is evaluated anew with tight tolerances. Writes a table, JSON and a picture.
Without ``--full`` ijcnn1 is cut to 5,000 rows.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from arguments import arguments

from bilevel import hypergradient, minimize
from bilevel.accuracy import AccuracyPolicy, ErrorDrivenAccuracy, FixedAccuracy, ScheduledAccuracy
from bilevel.experiments.results import Row, write_results
from bilevel.problems import Logistic, Quadratic
from bilevel.problems.example import Example
from bilevel.solvers import LBFGS, ImplicitCG

TOLERANCES = (1e-1, 1e-2, 1e-4, 1e-6, 1e-8)
SAME = 1e-8
"""Two final outer values within this relative distance are the same."""


@dataclass(frozen=True)
class Run:
    """One minimisation: what it reached, and what it spent."""

    policy: AccuracyPolicy
    value: float
    status: str
    steps: int
    gradients: int
    products: int
    trace: tuple[tuple[int, float], ...]


def policies() -> Iterator[AccuracyPolicy]:
    """The default, the schedules, and the grid."""
    yield ErrorDrivenAccuracy()
    for kind in ("quadratic", "cubic", "exponential"):
        yield ScheduledAccuracy(kind)
    for inner, linear in itertools.product(TOLERANCES, repeat=2):
        yield FixedAccuracy(inner, linear)


def run(example: Example, policy: AccuracyPolicy) -> Run:
    """Minimise, then evaluate the outer objective at the end with tight tolerances."""
    found = minimize(
        example.problem,
        example.outer,
        example.task,
        inner_solver=LBFGS(max_steps=1000),
        method=ImplicitCG(),
        accuracy=policy,
    )
    return Run(
        policy,
        exact_value(example, found.outer),
        found.status.name,
        len(found.steps),
        found.counts["gradients"],
        found.counts["products"],
        tuple((step.counts["products"], step.value) for step in found.steps),
    )


def exact_value(example: Example, outer: object) -> float:
    """The outer objective, the inner problem solved to 1e-10 or as far as rounding lets it."""
    result = hypergradient(
        example.problem,
        outer,
        example.task,
        inner_solver=LBFGS(max_steps=20_000, tol=1e-10),
        method=ImplicitCG(max_steps=2000, rtol=1e-10, correct=True),
    )
    return float(result.outer_value)


def best_of(grid: list[Run]) -> Run:
    """Of the runs that share the lowest final value, the one with the fewest products."""
    lowest = min(one.value for one in grid)
    same = [one for one in grid if one.value - lowest <= SAME * abs(lowest)]
    return min(same, key=lambda one: one.products)


def main() -> None:
    """Measure, print, write."""
    args = arguments(__doc__, "all rows of ijcnn1", root=True)
    examples = {
        "ijcnn1": Logistic.from_libsvm("ijcnn1", args.root, rows=None if args.full else 5000),
        "quadratic": Quadratic.generated(200, 10, 1e4),
    }
    rows, everything = [], {}
    for name, example in examples.items():
        runs = []
        print(
            f"\n{name}\n{'policy':44}{'final value':>18}{'status':>11}{'steps':>6}"
            f"{'gradients':>11}{'products':>10}"
        )
        for policy in policies():
            one = run(example, policy)
            runs.append(one)
            print(
                f"{policy!s:44}{one.value:18.10g}{one.status:>11}{one.steps:6d}"
                f"{one.gradients:11d}{one.products:10d}",
                flush=True,
            )
        grid = [one for one in runs if isinstance(one.policy, FixedAccuracy)]
        best = best_of(grid)
        gap = (runs[0].value - min(one.value for one in grid)) / abs(best.value)
        print(
            f"best of the grid: {best.policy}, {best.products} products; adaptive: "
            f"{runs[0].products}, relative gap to the lowest value {gap:.1e}"
        )
        for one in runs:
            setting = {"problem": name, "policy": str(one.policy), "status": one.status}
            rows += [
                Row(setting, "final_outer_value", one.value),
                Row(setting, "hessian_products", one.products),
                Row(setting, "gradients", one.gradients),
            ]
        for kind, one in (("default", runs[0]), ("best-of-grid", best)):
            setting = {"problem": name, "run": kind, "policy": str(one.policy)}
            rows += [
                Row(setting, "hessian_products", one.products),
                Row(setting, "final_outer_value", one.value),
            ]
        everything[name] = runs
    path = write_results(args.out, "adaptive", sys.argv, rows, seeds=[0])
    plot(everything, path.with_suffix(".png"))
    print(f"written: {path} and {path.with_suffix('.png')}")


def plot(everything: dict[str, list[Run]], path: Path) -> None:
    """Final value above the lowest one against Hessian products, one panel for each problem."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    floor = 1e-10
    for (name, runs), axes in zip(everything.items(), panels, strict=True):
        # Of the default and the grid; a schedule may end in another, lower minimum.
        grid = [one for one in runs if isinstance(one.policy, FixedAccuracy)]
        lowest = min(one.value for one in [runs[0], *grid])

        def above(value: float, lowest: float = lowest) -> float:
            return max((value - lowest) / abs(lowest), floor)

        axes.scatter(
            [o.products for o in grid],
            [above(o.value) for o in grid],
            s=26,
            color="#868e96",
            label="fixed tolerances (25)",
            zorder=2,
        )
        for one, marker in zip(runs[1:4], "v^s", strict=True):
            assert isinstance(one.policy, ScheduledAccuracy)
            elsewhere = one.value < lowest - 1e-5 * abs(lowest)
            axes.scatter(
                one.products,
                above(one.value),
                marker=marker,
                s=36,
                color="#1971c2",
                facecolor="none" if elsewhere else "#1971c2",
                label=f"schedule, {one.policy.kind}",
                zorder=3,
            )
            if elsewhere:
                note = "hollow: in another minimum, lower than any of the others"
                axes.text(0.02, 0.1, note, transform=axes.transAxes, fontsize=8, color="#1971c2")
        axes.scatter(
            runs[0].products,
            above(runs[0].value),
            marker="*",
            s=190,
            color="#e8590c",
            label="error-driven (default)",
            zorder=4,
        )
        axes.axhline(SAME, color="black", lw=0.8, ls=":")
        axes.annotate(
            "the same value",
            (0.99, SAME),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
        )
        axes.set(
            xscale="log",
            yscale="log",
            title=name,
            xlabel="Hessian products, all told",
            ylabel="final outer value above the lowest, relative",
        )
        axes.grid(alpha=0.25)
    panels[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
