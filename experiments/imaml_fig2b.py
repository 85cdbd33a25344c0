r"""Figure 2b of the paper: memory and time of one hypergradient, against the number of inner steps.

The paper's set-up: 20-way 5-shot Omniglot, the network of four convolutional blocks. Neither memory
nor time depends on what the images show, so that they are drawn here. The paper gives memory as a
share of a card's capacity, and its batch size is not known: ratios are compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from bilevel import Hypergradient, HypergradientMethod, TaskBatch, hypergradient, stateless
from bilevel.clock import seconds_of
from bilevel.memory import peak_bytes
from bilevel.problems import EpisodeSampler, FewShot, conv_strided, glyphs
from bilevel.pytree import PyTree
from bilevel.solvers import FirstOrder, GradientDescent, ImplicitCG, Unrolled

from .few_shot.job import usable_device
from .few_shot.run import Watcher
from .reproduction import Check, Options, Outcome, Reproduction, Table
from .results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ImamlFig2b"]

STEPS = (1, 2, 5, 8, 10, 12, 16)
_IMPLICIT = {f"iMAML, CG = {count}": count for count in (2, 5, 10)}
METHODS: dict[str, HypergradientMethod] = {
    "MAML": Unrolled(),
    "FOMAML": FirstOrder(),
    **{name: ImplicitCG(max_steps=count, rtol=0.0) for name, count in _IMPLICIT.items()},
}

# Read off the published figure: memory as a share of the card's, seconds for a meta-step.
PUBLISHED_MEMORY = {
    "MAML": {1: 0.106, 2: 0.164, 5: 0.287, 8: 0.469, 10: 0.59, 12: 0.71, 16: 0.96},
    "FOMAML": {1: 0.078, 16: 0.078},
    "iMAML, CG = 5": {1: 0.108, 16: 0.108},
}
PUBLISHED_SECONDS = {
    "MAML": {1: 0.122, 2: 0.144, 5: 0.221, 10: 0.342, 16: 0.504},
    "FOMAML": {1: 0.117, 2: 0.121, 5: 0.133, 10: 0.142, 16: 0.161},
    "iMAML, CG = 2": {1: 0.211, 2: 0.214, 5: 0.228, 10: 0.252, 16: 0.289},
    "iMAML, CG = 5": {1: 0.245, 2: 0.258, 5: 0.276, 10: 0.301, 16: 0.346},
    "iMAML, CG = 10": {1: 0.32, 2: 0.333, 5: 0.339, 10: 0.37, 16: 0.414},
}


@dataclass(frozen=True)
class _Measured:
    """By method and number of steps: peak bytes, seconds of each repetition; and CG steps taken."""

    memory: dict[str, dict[int, int]]
    seconds: dict[str, dict[int, list[float]]]
    products: dict[str, list[int]]

    def median(self, name: str, steps: int) -> float:
        """Median seconds."""
        return statistics.median(self.seconds[name][steps])

    def line(self, name: str) -> tuple[float, float]:
        """Seconds per inner step, and at zero steps: a least-squares line."""
        slope, start = np.polyfit(STEPS, [self.median(name, k) for k in STEPS], 1)
        return float(slope), float(start)

    def crossover(self, name: str) -> float:
        """Number of steps at which MAML's line meets that of another method."""
        (a, b), (c, d) = self.line("MAML"), self.line(name)
        return (d - b) / (a - c) if a > c else float("inf")

    def straightness(self) -> tuple[float, float]:
        """Bytes per inner step of MAML, and R² of the line."""
        peaks = np.array([self.memory["MAML"][k] for k in STEPS], dtype=float)
        slope, start = np.polyfit(STEPS, peaks, 1)
        rest = peaks - (slope * np.array(STEPS) + start)
        return float(slope), float(1 - (rest**2).sum() / ((peaks - peaks.mean()) ** 2).sum())


class ImamlFig2b(Reproduction):
    """Memory and time against inner steps; `quick` takes a smaller network and fewer images."""

    name = "imaml-fig2b"
    title = "iMAML, figure 2b: memory and time of a hypergradient"
    source = "Rajeswaran et al. (2019), figure 2b, digitised; one task of glyphs, λ = 40, rate 0.01"
    takes = ("device",)

    def _run(self, options: Options, watcher: Watcher) -> Outcome:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        ways, shots, channels, repeats = (5, 5, 32, 3) if options.quick else (20, 5, 64, 5)
        job = _job(ways, shots, channels, options)
        measured = _measure(job, repeats, options.device, watcher)
        setting = {"ways": ways, "shots": shots, "channels": channels}
        return Outcome(
            _rows(measured, setting), _table(measured), _draw(measured), tuple(_checks(measured))
        )


Job = Callable[[HypergradientMethod, int], Callable[[], Hypergradient]]


def _job(ways: int, shots: int, channels: int, options: Options) -> Job:
    """What makes the meta-step of a method with so many inner steps."""
    device = usable_device(options.device)
    module = conv_strided(ways, channels, seed=0).to(device)
    params, net = stateless(module)
    # CG stops at negative curvature, and where float32 ends: here it meets neither in 10 steps.
    problem = FewShot(net, strength=40.0)
    outer: PyTree = problem.initial_outer(params)
    pool = glyphs(seed=0).to(device)
    task: TaskBatch = EpisodeSampler(pool, ways, shots, shots, tasks=1, rotations=True)(0)

    def make(method: HypergradientMethod, steps: int) -> Callable[[], Hypergradient]:
        solver = GradientDescent(lr=0.01, max_steps=steps)
        return lambda: hypergradient(problem, outer, task, inner_solver=solver, method=method)

    return make


def _measure(job: Job, repeats: int, device: str, watcher: Watcher) -> _Measured:
    memory: dict[str, dict[int, int]] = {name: {} for name in METHODS}
    taken: dict[str, dict[int, list[float]]] = {
        name: {steps: [] for steps in STEPS} for name in METHODS
    }
    products: dict[str, list[int]] = {name: [] for name in METHODS}
    with watcher.evaluating(len(STEPS) * len(METHODS) * (repeats + 1)) as bar:
        for steps in STEPS:
            for name, method in METHODS.items():
                run = job(method, steps)
                linear = run().diagnostics.linear  # the first call looks the problem over
                if linear is not None:
                    products[name].append(int(linear.steps))
                memory[name][steps] = peak_bytes(run, device)
                bar.advance(1)
        # Alternating, so that whatever else the machine does meets all alike.
        for _ in range(repeats):
            for steps in STEPS:
                for name, method in METHODS.items():
                    taken[name][steps].append(seconds_of(job(method, steps), device))
                    bar.advance(1)
    return _Measured(memory, taken, products)


def _rows(measured: _Measured, setting: dict[str, int]) -> list[Row]:
    rows = []
    for name in METHODS:
        for steps in STEPS:
            where = {**setting, "method": name, "inner_steps": steps}
            rows.append(Row(where, "peak_bytes", measured.memory[name][steps]))
            rows.append(Row(where, "seconds", measured.median(name, steps)))
            low, high = min(measured.seconds[name][steps]), max(measured.seconds[name][steps])
            rows.append(Row(where, "seconds_min", low))
            rows.append(Row(where, "seconds_max", high))
    for name in _IMPLICIT:
        rows.append(Row({**setting, "method": name}, "crossover_steps", measured.crossover(name)))
    return rows


def _checks(measured: _Measured) -> list[Check]:
    memory = measured.memory
    implicit = [memory[name][k] for name in _IMPLICIT for k in STEPS]
    change = max(implicit) / min(implicit) - 1
    slope, straight = measured.straightness()
    ratio = memory["MAML"][16] / memory["iMAML, CG = 5"][16]
    first = memory["iMAML, CG = 5"][16] / memory["FOMAML"][16]
    steepness = measured.line("MAML")[0] / measured.line("iMAML, CG = 5")[0]
    crossings = [measured.crossover(name) for name in _IMPLICIT]
    five, maml = "iMAML, CG = 5", "MAML"
    taken = {name: measured.products[name] for name in _IMPLICIT}
    named = all(set(taken[name]) == {count} for name, count in _IMPLICIT.items())
    return [
        Check(
            "every CG solve takes the steps that it is named by",
            named,
            "; ".join(f"{min(one)} to {max(one)}" for one in taken.values()),
        ),
        Check(
            "iMAML's memory is constant over inner and CG steps, within 2 %",
            change <= 0.02,
            f"changes by {change:.2%}",
        ),
        Check(
            "MAML's memory is a line in inner steps, R² > 0.99",
            straight > 0.99,
            f"R² = {straight:.5f}, {slope / 2**20:.1f} MiB a step",
        ),
        Check(
            "at 16 steps MAML takes at least 6 times iMAML's memory (paper 8.9)",
            ratio >= 6,
            f"{ratio:.1f} times",
        ),
        Check(
            "iMAML takes 1.1 to 1.8 times FOMAML's memory (paper 1.38, of a whole card)",
            1.1 <= first <= 1.8,
            f"{first:.2f} times",
        ),
        Check(
            "an inner step costs MAML at least 3 times what it costs iMAML (paper 3.8)",
            steepness >= 3,
            f"{steepness:.1f} times",
        ),
        Check(
            "MAML is cheaper than iMAML (CG = 5) at 1 step, and dearer at 16",
            measured.median(maml, 1) < measured.median(five, 1)
            and measured.median(maml, 16) > measured.median(five, 16),
            f"{measured.median(maml, 1):.3f} and {measured.median(five, 1):.3f} s at 1 step, "
            f"{measured.median(maml, 16):.3f} and {measured.median(five, 16):.3f} s at 16",
        ),
        Check(
            "MAML's time crosses iMAML's later with more CG steps (paper 5.4, 7.9, 11.4)",
            crossings[0] < crossings[1] < crossings[2],
            ", ".join(f"{one:.1f}" for one in crossings),
        ),
    ]


def _table(measured: _Measured) -> Table:
    memory = measured.memory
    base = memory["iMAML, CG = 5"][1]
    paper = PUBLISHED_MEMORY["iMAML, CG = 5"][1]
    body = []
    for name in METHODS:
        published = PUBLISHED_MEMORY.get(name, PUBLISHED_MEMORY["iMAML, CG = 5"])
        times = PUBLISHED_SECONDS[name]
        body.append(
            (
                name,
                *(f"{memory[name][k] / base:.2f}" for k in (1, 16)),
                f"{published[1] / paper:.2f}, {published[16] / paper:.2f}",
                *(f"{measured.median(name, k):.3f}" for k in (1, 16)),
                f"{times[1]:.3f}, {times[16]:.3f}",
            )
        )
    head = ("method", "memory, 1 step", "16 steps", "paper", "seconds, 1 step", "16 steps", "paper")
    return Table(head, tuple(body))


def _draw(measured: _Measured) -> Figure:
    from .pictures import COLORS, INK, new_figure, tidy

    figure = new_figure(9.6, 4.4)
    left, right = figure.subplots(1, 2)
    for color, name in zip(COLORS, METHODS, strict=False):
        style = "--" if name in ("iMAML, CG = 5", "iMAML, CG = 10") else "-"
        peaks = [measured.memory[name][k] / 2**20 for k in STEPS]
        times = [measured.median(name, k) for k in STEPS]
        left.plot(STEPS, peaks, style, color=color, marker="o", ms=4, linewidth=2, label=name)
        right.plot(STEPS, times, color=color, marker="o", ms=4, linewidth=2, label=name)
        low = [min(measured.seconds[name][k]) for k in STEPS]
        high = [max(measured.seconds[name][k]) for k in STEPS]
        right.fill_between(STEPS, low, high, color=color, alpha=0.15, linewidth=0)
    for axes, label in ((left, "peak memory (MiB)"), (right, "seconds for a hypergradient")):
        axes.set_xlabel("inner gradient steps", color=INK)
        axes.set_ylabel(label, color=INK)
        axes.set_ylim(bottom=0)
        tidy(axes)
    left.legend(frameon=False)
    figure.suptitle("iMAML, figure 2b", x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure
