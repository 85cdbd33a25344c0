"""Three levels on real data: weights of data sources over a weight decay over a classifier.

    python benchmarks/three_levels.py [--full] [--root DIR] [--out benchmarks/results]

Logistic regression on a9a, whose training rows come from 20 sources; in half of them 40 % of the
labels are flipped. At the bottom the classifier is trained on weighted sources, in the middle its
weight decay is chosen on validation rows, and at the top the weights of the sources, on other
validation rows. Its two-level parts are the middle over the bottom, where all sources weigh the
same, and the top over the bottom, where the decay stays as it began. Accuracy is on test rows that
no level sees; with ``--full`` for 10 seeds, else 3. Writes a table, JSON and pictures.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from arguments import arguments
from torch import Tensor

from bilevel import Level, MultiLevelProblem, Variables
from bilevel.experiments.pictures import COLORS, INK, axes_of, new_figure
from bilevel.experiments.results import Row, write_results
from bilevel.problems import libsvm
from bilevel.solvers import HessianFree, ImplicitCG

SOURCES, EACH, VALIDATION, TEST = 20, 60, 300, 5000
FLIPPED = 0.4
STEPS, RATE = 30, 0.3
Data = tuple[Tensor, Tensor]


class Setting:
    """The rows of one seed, and the levels on them."""

    def __init__(self, features: Tensor, labels: Tensor, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(features), generator=generator)
        sizes = [SOURCES * EACH, VALIDATION, VALIDATION, TEST]
        parts = order[: sum(sizes)].split(sizes)
        rows = [(features[part], labels[part]) for part in parts]
        self.training, self.middle, self.top, self.test = rows
        noisy = torch.rand(SOURCES, EACH, generator=generator) < FLIPPED
        noisy[SOURCES // 2 :] = False
        flip = torch.where(noisy.flatten(), -1.0, 1.0).double()
        self.training = (self.training[0], self.training[1] * flip)

    def weigh(self, raw: Tensor) -> Tensor:
        """Of each source, 1 on average."""
        return SOURCES * raw.softmax(0)

    def train(self, w: Tensor, weights: Tensor | float, decay: Tensor) -> Tensor:
        """The bottom's objective."""
        losses = losses_of(w, self.training).reshape(SOURCES, EACH).mean(1)
        return (weights * losses).mean() + 0.5 * decay.exp() * w.square().sum()

    def levels(self, *, weighted: bool, tuned: bool) -> MultiLevelProblem:
        """All three levels, or one of the two-level parts."""
        fixed = torch.tensor(DECAY, dtype=torch.float64)
        zeros = torch.zeros(self.training[0].shape[1], dtype=torch.float64)

        def classifier(w: Tensor, v: Variables, _: object) -> Tensor:
            weights = self.weigh(v["weights"]) if weighted else 1.0
            return self.train(w, weights, v["decay"] if tuned else fixed)

        def on_top(_: Tensor, v: Variables, rows: Data) -> Tensor:
            return losses_of(v["classifier"], rows).mean()

        def in_the_middle(decay: Tensor, v: Variables, rows: Data) -> Tensor:
            # A prior keeps the decay from running away where the rows do not care.
            return losses_of(v["classifier"], rows).mean() + 1e-4 * (decay - fixed) ** 2

        bottom = Level(
            "classifier",
            classifier,
            start=lambda v, _: zeros,
            solver=HessianFree(tol=1e-11),
            method=ImplicitCG(max_steps=500, rtol=1e-9),
        )
        middle = Level(
            "decay",
            in_the_middle if weighted else on_top,
            self.middle,
            start=(lambda v, _: fixed) if weighted else None,
            solver=HessianFree(tol=1e-7) if weighted else None,
            method=ImplicitCG(max_steps=10, rtol=1e-9) if weighted else None,
        )
        top = Level("weights", on_top, self.top)
        levels = [top] * weighted + [middle] * tuned + [bottom]
        edges = [("weights", "classifier")] * weighted + [("decay", "classifier")] * tuned
        if weighted and tuned:
            edges.append(("weights", "decay"))
        return MultiLevelProblem.of(levels, edges)

    def solved(self, *, weighted: bool, tuned: bool) -> tuple[float, float, MultiLevelProblem]:
        """Accuracy on test rows, and seconds, of a problem minimised by Adam."""
        started = time.perf_counter()
        problem = self.levels(weighted=weighted, tuned=tuned)
        start = torch.zeros(SOURCES) if weighted else torch.tensor(DECAY)
        x = start.double().requires_grad_()
        optimizer = torch.optim.Adam([x], lr=RATE)
        for step in range(STEPS):
            found = problem.hypergradient(x, step=step)
            found.set_grad(x)
            optimizer.step()
        w = problem.hypergradient(x).solutions["classifier"]
        right = (self.test[0] @ w * self.test[1] > 0).double().mean()
        return right.item(), time.perf_counter() - started, problem


DECAY = math.log(0.1)
PARTS = {
    "decay/classifier": {"weighted": False, "tuned": True},
    "weights/classifier": {"weighted": True, "tuned": False},
    "weights/decay/classifier": {"weighted": True, "tuned": True},
}


def losses_of(w: Tensor, rows: Data) -> Tensor:
    """Logistic losses."""
    return -F.logsigmoid(rows[1] * (rows[0] @ w))


def main() -> None:
    """Measure, print, write."""
    args = arguments(__doc__, "10 seeds instead of 3", root=True)
    features, labels = libsvm("a9a", args.root)
    ones = torch.ones(len(features), 1, dtype=features.dtype)
    features = torch.cat([features, ones], 1)
    seeds = list(range(10 if args.full else 3))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in PARTS}
    for seed in seeds:
        setting = Setting(features, labels, seed)
        for name, part in PARTS.items():
            accuracy, seconds, problem = setting.solved(**part)
            found[name].append((accuracy, seconds))
            print(f"seed {seed}  {name:36}{100 * accuracy:7.2f} %{seconds:7.1f} s", flush=True)
    print(f"\n{problem.draw()}\n")
    rows = []
    whole = [one for one, _ in found["weights/decay/classifier"]]
    for name, runs in found.items():
        accuracies = [100 * one for one, _ in runs]
        gains = [100 * (a - b) for a, (b, _) in zip(whole, runs, strict=True)]
        where = {"levels": name}
        rows.append(Row(where, "accuracy", statistics.mean(accuracies), ci95=interval(accuracies)))
        rows.append(Row(where, "three_levels_gain", statistics.mean(gains), ci95=interval(gains)))
        rows.append(Row(where, "seconds", statistics.median(s for _, s in runs)))
        rows += [
            Row({**where, "seed": seed}, "accuracy_of_seed", one)
            for seed, one in zip(seeds, accuracies, strict=True)
        ]
        print(
            f"{name:36}{statistics.mean(accuracies):7.2f} ± {interval(accuracies):.2f} %, three "
            f"levels gain {statistics.mean(gains):.2f} ± {interval(gains):.2f}"
        )
    command = f"python benchmarks/three_levels.py{' --full' * args.full}"
    path = write_results(args.out, "three-levels", sys.argv, rows, seeds=seeds, command=command)
    draw(found, path.with_suffix(".png"))
    problem.draw(path.with_name("three-levels-graph.png"))
    print(f"written: {path} and two pictures")


def interval(values: list[float]) -> float:
    """Half of a 95 % interval of the mean, by Student's t."""
    from scipy.stats import t

    n = len(values)
    return float(t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5)


def draw(found: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Accuracy of each seed, joined across the three problems."""
    figure = new_figure(6.4, 3.4)
    axes = axes_of(figure, "", "test accuracy, %")
    names = list(found)
    for runs in zip(*found.values(), strict=True):
        axes.plot(range(len(names)), [100 * one for one, _ in runs], "-", color=COLORS[5], lw=0.8)
    for i, name in enumerate(names):
        values = [100 * one for one, _ in found[name]]
        axes.plot([i] * len(values), values, "o", color=COLORS[2], ms=5, alpha=0.7)
        axes.plot([i], [statistics.mean(values)], "_", color=COLORS[0], ms=34, mew=2.5)
    labels = [name.replace("/", "\nover ") for name in names]
    axes.set_xticks(range(len(names)), labels, color=INK)
    axes.set_xlim(-0.5, len(names) - 0.5)
    figure.savefig(path)


if __name__ == "__main__":
    main()
