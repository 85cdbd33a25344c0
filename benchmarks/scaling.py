"""How cost grows: with tasks, parameters, conditioning, and the size of a chunk of tasks.

    python benchmarks/scaling.py [--full] [--threads 1] [--out benchmarks/results]

*Tasks* and *parameters*: seconds of one iMAML hypergradient (5-way 1-shot, 8 steps of gradient
descent, 5 of conjugate gradients) over two decades. *Condition*: conjugate gradient steps to a
relative residual of 1e-6 on quadratic problems with 1,000 evenly spread logarithmic eigenvalues.
*Chunk*: seconds and peak memory of 32 tasks on the paper's 64 channels, so many at a time. The
exponent is the slope of a straight line through the logarithms. Writes a table, JSON and a picture.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from arguments import arguments
from matplotlib.ticker import LogLocator, NullFormatter
from timing import alternate
from torch import Tensor

from bilevel import Structure, Task, hypergradient, problem_from, stateless
from bilevel.engine import Engine
from bilevel.experiments.pictures import COLORS, INK, new_figure, tidy
from bilevel.experiments.results import Row, write_results
from bilevel.memory import peak_bytes
from bilevel.problems import EpisodeSampler, FewShot, conv_strided, glyphs
from bilevel.solvers import GradientDescent, ImplicitCG

Run = Callable[[], object]
EVERY = 32


def one_hypergradient(
    tasks: int, channels: int, task_chunk: int | None = None, engine: Engine = "batched"
) -> tuple[Run, int]:
    """One hypergradient, and the number of parameters."""
    params, net = stateless(conv_strided(5, channels, init="imaml", seed=0))
    problem = FewShot(net, strength=20.0)
    batch = EpisodeSampler(
        glyphs(classes=40, seed=0), ways=5, shots=1, queries=5, tasks=tasks, rotations=True
    )(0)
    solver = GradientDescent(lr=0.01, max_steps=8)
    method = ImplicitCG(max_steps=5, rtol=0.0)

    def run() -> None:
        hypergradient(
            problem,
            params,
            batch,
            inner_solver=solver,
            method=method,
            engine=engine,
            task_chunk=task_chunk,
        )

    return run, sum(one.numel() for one in params.values())


def conjugate_gradient_steps(condition: float) -> int:
    """Steps to a relative residual of 1e-6."""
    eigenvalues = torch.logspace(-math.log10(condition), 0.0, 1000, dtype=torch.float64)
    target = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def inner(z: Tensor, x: Tensor, batch: None) -> Tensor:
        return 0.5 * (eigenvalues * z * z).sum() - z @ x

    def outer(z: Tensor, x: Tensor, batch: None) -> Tensor:
        return 0.5 * ((z - target) ** 2).sum()

    problem = problem_from(
        inner,
        outer,
        initial_inner=lambda x, batch: torch.zeros_like(x),
        structure=Structure.POSITIVE_DEFINITE,
    )
    x = torch.zeros(1000, dtype=torch.float64)
    found = hypergradient(
        problem,
        x,
        Task(),
        inner_solver=None,
        inner=x / eigenvalues,
        method=ImplicitCG(max_steps=10_000, rtol=1e-6),
    )
    assert found.diagnostics.linear is not None
    return int(found.diagnostics.linear.steps)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    xs, ys = ([math.log(one) for one in column] for column in (sizes, costs))
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    rise = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return rise / sum((x - mean_x) ** 2 for x in xs)


def medians(runs: Mapping[float, Run], rounds: int) -> dict[float, float]:
    """Median seconds of runs that take turns."""
    times = alternate({str(size): run for size, run in runs.items()}, rounds)
    return {size: times[str(size)].median for size in runs}


def measure(full: bool, rounds: int) -> dict[str, dict[float, float]]:
    """Cost by size, for each quantity that grows."""
    tasks = (1, 2, 4, 8, 16, 32, 64, 128) if full else (1, 4, 16)
    channels = (6, 11, 20, 36, 64) if full else (6, 20)
    conditions = (10, 30, 100, 300, 1000, 3000, 10_000) if full else (10, 100, 1000)
    count = EVERY if full else 8
    chunks = [one for one in (1, 2, 4, 8, 16, 32) if one <= count]
    sized = [one_hypergradient(2, one) for one in channels]
    chunked = {one: one_hypergradient(count, 64 if full else 16, one)[0] for one in chunks}
    return {
        "tasks": medians({one: one_hypergradient(one, 16)[0] for one in tasks}, rounds),
        "parameters": medians({size: run for run, size in sized}, rounds),
        "condition": {one: conjugate_gradient_steps(one) for one in conditions},
        "chunk": medians(chunked, rounds),
        "chunk memory": {one: peak_bytes(run) for one, run in chunked.items()},
    }


METRICS = {
    "tasks": "seconds",
    "parameters": "seconds",
    "condition": "cg_steps",
    "chunk": "seconds",
    "chunk memory": "peak_bytes",
}


def rows_of(found: Mapping[str, Mapping[float, float]]) -> list[Row]:
    """As they stand in the file."""
    rows = []
    for what, costs in found.items():
        for size, cost in costs.items():
            rows.append(Row({what.split()[0]: size}, METRICS[what], cost))
        if not what.startswith("chunk"):
            rows.append(Row({"of": what}, "exponent", exponent(list(costs), list(costs.values()))))
    for what, metric in (("chunk", "time_share"), ("chunk memory", "memory_share")):
        costs = found[what]
        for size, cost in costs.items():
            rows.append(Row({"of": "chunk", "size": size}, metric, cost / costs[max(costs)]))
    return rows


def draw(found: Mapping[str, Mapping[float, float]], path: Path) -> None:
    """Four panels, logarithmic on both axes."""
    figure = new_figure(10.0, 2.9)
    panels = figure.subplots(1, 4)
    labels = {
        "tasks": ("tasks", "seconds", 1.0),
        "parameters": ("parameters", "seconds", 1.0),
        "condition": ("condition number κ", "CG steps to 1e-6", 0.5),
    }
    for axes, (what, (x, y, slope)) in zip(panels, labels.items(), strict=False):
        costs = found[what]
        sizes = list(costs)
        axes.plot(sizes, list(costs.values()), "o-", ms=4, color=COLORS[2])
        line = [costs[sizes[-1]] * (size / sizes[-1]) ** slope for size in sizes]
        axes.plot(sizes, line, "--", color=COLORS[5], lw=1, label="√κ" if slope < 1 else "linear")
        axes.set(xscale="log", yscale="log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        if max(costs.values()) < 200 * min(costs.values()):
            # Decades alone would leave short ranges without a number.
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(x, color=INK)
        axes.set_ylabel(y, color=INK)
        axes.set_title(f"exponent {exponent(sizes, list(costs.values())):.2f}", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        tidy(axes)
    seconds, memory = found["chunk"], found["chunk memory"]
    axes, most = panels[3], max(seconds)
    for values, label, color in ((seconds, "time", COLORS[2]), (memory, "memory", COLORS[0])):
        shares = [values[size] / values[most] for size in values]
        axes.plot(list(values), shares, "o-", ms=4, color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(seconds), [str(size) for size in seconds])
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("tasks at a time", color=INK)
    axes.set_ylabel("share of all at once", color=INK)
    axes.set_title(f"{most} tasks in chunks", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    figure.savefig(path)


def main() -> None:
    """Measure, print, write."""
    args = arguments(__doc__, "two decades, and 32 tasks in chunks", rounds=5)
    found = measure(args.full, args.rounds)
    for what, costs in found.items():
        print(f"{what:14}" + "  ".join(f"{size:g}: {cost:.4g}" for size, cost in costs.items()))
    rows = rows_of(found)
    for row in rows:
        if "of" in row.setting:
            where = f"{row.setting['of']} {row.setting.get('size', '')}"
            print(f"{where:14}{row.metric} {row.value:.2f}")
    path = write_results(args.out, "scaling", sys.argv, rows, seeds=[0])
    draw(found, path.with_suffix(".png"))
    print(f"written: {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
