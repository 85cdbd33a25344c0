"""Peak memory of one hypergradient against the number of inner steps.

    python benchmarks/memory.py [--full] [--out benchmarks/results]

Few-shot classification with the strided network of iMAML, 5-way 1-shot, two tasks. Implicit
methods must be flat, `Unrolled` linear, checkpointed `Unrolled` about √T. Writes a table, JSON and
a picture.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler reports every start otherwise

import torch
from arguments import arguments

import bilevel.solvers as solvers
from bilevel import hypergradient, stateless
from bilevel.experiments.results import Row, write_results
from bilevel.memory import peak_bytes
from bilevel.problems import EpisodeSampler, FewShot, conv_strided, glyphs

METHODS = {
    "ImplicitCG(5)": solvers.ImplicitCG(max_steps=5, rtol=0.0),
    "NeumannSeries(5)": solvers.NeumannSeries(terms=5),
    "FirstOrder": solvers.FirstOrder(),
    "Unrolled(truncate=1)": solvers.Unrolled(truncate=1),
    "Unrolled(checkpoint)": solvers.Unrolled(checkpoint=True),
    "Unrolled": solvers.Unrolled(),
}


def measure(steps: list[int], channels: int) -> dict[str, list[int]]:
    """Peak bytes by method, one for each number of steps."""
    torch.manual_seed(0)
    params, net = stateless(conv_strided(5, channels, seed=0))
    problem = FewShot(net, strength=20.0)
    outer = problem.initial_outer(params)
    task = EpisodeSampler(
        glyphs(classes=20, seed=0), ways=5, shots=1, queries=10, tasks=2, rotations=True
    )(0)
    table: dict[str, list[int]] = {}
    for name, method in METHODS.items():
        for count in steps:
            solver = solvers.GradientDescent(lr=0.02, max_steps=count)

            def run(solver=solver, method=method):
                hypergradient(problem, outer, task, inner_solver=solver, method=method)

            run()  # the first call looks the problem over
            table.setdefault(name, []).append(peak_bytes(run))
    return table


def main() -> None:
    """Measure, print, write."""
    args = arguments(__doc__, "64 channels instead of 16")
    steps = [1, 4, 9, 16, 25, 49, 100]
    table = measure(steps, 64 if args.full else 16)
    print("peak memory in MiB by inner steps")
    print(f"{'method':24}" + "".join(f"{count:>9}" for count in steps) + "   100 / 1")
    for name, peaks in table.items():
        cells = "".join(f"{peak / 2**20:9.2f}" for peak in peaks)
        print(f"{name:24}{cells}{peaks[-1] / peaks[0]:10.2f}")
    rows = [
        Row({"method": name, "inner_steps": count}, "peak_bytes", peak)
        for name, peaks in table.items()
        for count, peak in zip(steps, peaks, strict=True)
    ]
    path = write_results(args.out, "memory", sys.argv, rows, seeds=[0])
    draw(steps, table, path.with_suffix(".png"))
    print(f"written: {path} and {path.with_suffix('.png')}")


def draw(steps: list[int], table: dict[str, list[int]], path: Path) -> None:
    """Memory against steps, logarithmic on both axes."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, peaks in table.items():
        # Dashes let a line that lies on another be seen.
        style = "--" if name.startswith("Neumann") else "-"
        axes.plot(steps, [peak / 2**20 for peak in peaks], style, marker="o", ms=4, label=name)
    axes.set(xscale="log", yscale="log", xlabel="inner steps", ylabel="peak memory, MiB")
    axes.set_xticks(steps, [str(count) for count in steps])
    axes.minorticks_off()
    axes.set_title("Memory of one hypergradient, two tasks, strided network")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
