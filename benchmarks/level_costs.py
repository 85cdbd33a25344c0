"""What levels cost: a chain of two to four, each solved inside the one above.

    python benchmarks/level_costs.py [--full] [--out benchmarks/results]

Every level follows the one above it and shies from what the one below makes of it; 20 unknowns
each, Newton's method and conjugate gradients at all levels. Evaluations are those of all
objectives, for one hypergradient of the top, cold and then warm-started at a near point. Checked
against finite differences first. Without ``--full`` up to three levels. Writes a table, JSON and a
picture.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from arguments import arguments
from torch import Tensor

from bilevel import Level, MultiLevelProblem, Variables
from bilevel.experiments.pictures import COLORS, INK, axes_of, new_figure
from bilevel.experiments.results import Row, write_results
from bilevel.solvers import HessianFree, ImplicitCG

UNKNOWNS = 20


def chain(depth: int) -> MultiLevelProblem:
    """So many levels, one below the other."""

    def follows(above: str, below: str | None) -> Callable[[Tensor, Variables, None], Tensor]:
        def objective(z: Tensor, v: Variables, _: None) -> Tensor:
            pull = torch.cosh(z - v[above]).sum()
            return pull if below is None else pull + 0.2 * (v[below] ** 2 * z.sigmoid()).sum()

        return objective

    def start(above: str) -> Callable[[Variables, None], Tensor]:
        return lambda v, _: torch.zeros_like(v[above])

    names = [f"level {i}" for i in range(depth)]
    top = Level(names[0], lambda x, v, _: (v[names[1]] ** 3).sum() + x.square().sum())
    levels = [top]
    for i in range(1, depth):
        above, below = names[i - 1], names[i + 1] if i + 1 < depth else None
        # What is solved inside is noise outside: each level asks for more than the one above.
        solver = HessianFree(tol=1e-12 * 10.0 ** (depth - 1 - i))
        levels.append(
            Level(
                names[i],
                follows(above, below),
                start=start(above),
                solver=solver,
                method=ImplicitCG(rtol=1e-10),
            )
        )
    return MultiLevelProblem.of(levels, list(itertools.pairwise(names)))


def check(problem: MultiLevelProblem, x: Tensor) -> float:
    """Relative error of the derivative along a direction, by a central difference."""
    along = torch.linspace(-1.0, 1.0, len(x), dtype=x.dtype)
    with torch.no_grad():
        ends = [problem.value(x + sign * 1e-4 * along) for sign in (1, -1)]
    wanted = (ends[0] - ends[1]) / 2e-4
    found = problem.hypergradient(x).gradient @ along
    return float((found - wanted).abs() / wanted.abs())


def main() -> None:
    """Measure, print, write."""
    args = arguments(__doc__, "four levels, too")
    depths = list(range(2, 5 if args.full else 4))
    x = torch.linspace(-1.0, 1.5, UNKNOWNS, dtype=torch.float64)
    rows = []
    print(f"{'levels':>7}{'error':>10}{'seconds':>10}{'evaluations':>13}{'warm':>10}{'':>13}")
    for depth in depths:
        error = check(chain(depth), x)
        if error > 1e-6:
            raise SystemExit(f"{depth} levels: the derivative is {error:.1e} off")
        problem = chain(depth)
        problem.hypergradient(x)  # the first call of anything is slower
        problem = chain(depth)
        cold, warm = problem.hypergradient(x), problem.hypergradient(x + 1e-3)
        spent = [sum(one.evaluations.values()) for one in (cold, warm)]
        where = {"levels": depth}
        rows += [
            Row(where, "error", error),
            Row({**where, "start": "cold"}, "seconds", cold.seconds),
            Row({**where, "start": "cold"}, "evaluations", spent[0]),
            Row({**where, "start": "warm"}, "seconds", warm.seconds),
            Row({**where, "start": "warm"}, "evaluations", spent[1]),
        ]
        print(
            f"{depth:7}{error:10.1e}{cold.seconds:10.3f}{spent[0]:13}{warm.seconds:10.3f}"
            f"{spent[1]:13}",
            flush=True,
        )
    path = write_results(args.out, "level-costs", sys.argv, rows, seeds=[0])
    draw(rows, path.with_suffix(".png"))
    print(f"written: {path} and {path.with_suffix('.png')}")


def draw(rows: list[Row], path: Path) -> None:
    """Evaluations against the number of levels."""
    axes = axes_of(new_figure(5.2, 3.4), "levels", "evaluations of all objectives")
    for start, color in (("cold", COLORS[0]), ("warm", COLORS[2])):
        found = [
            (row.setting["levels"], row.value)
            for row in rows
            if row.metric == "evaluations" and row.setting["start"] == start
        ]
        axes.plot(*zip(*found, strict=True), "o-", color=color, label=f"{start} start")
    axes.set_yscale("log")
    axes.set_xticks(sorted({row.setting["levels"] for row in rows}))
    axes.legend(frameon=False, labelcolor=INK)
    axes.figure.savefig(path)


if __name__ == "__main__":
    main()
