"""How good is the error estimate, and how much does the Newton correction gain?

    python benchmarks/error_estimate.py [--full] [--out benchmarks/results]

Random strongly convex problems (logistic, softmax with weighted examples, small smooth networks,
badly scaled logistic),
inner errors from 1e-1 to 1e-5, linear residuals likewise. For each hypergradient the estimate is
compared with the true error, from dense float64 algebra at the exact inner solution. Writes a
table, JSON and a picture.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from arguments import arguments
from random_problems import ERRORS, FAMILIES, draw
from torch import Tensor

from bilevel import Status, hypergradient
from bilevel.experiments.results import Row, write_results
from bilevel.problems import Logistic, Quadratic, Ridge
from bilevel.pytree import tree_leaves
from bilevel.solvers import DenseExact, GradientDescent, ImplicitCG

QUANTILES = (0.005, 0.025, 0.5, 0.975, 0.995)


@dataclass(frozen=True)
class Sample:
    """One column per problem.

    Attributes:
        inner_error: ‖z − z*‖ / ‖z*‖.
        linear_rtol: The tolerance of the adjoint solve.
        true: The relative error of the hypergradient.
        estimate: The estimate of it.
        flagged: The estimate says itself that it failed.
    """

    inner_error: Tensor
    linear_rtol: Tensor
    true: Tensor
    estimate: Tensor
    flagged: Tensor

    @property
    def ratio(self) -> Tensor:
        """Estimate over truth."""
        return self.estimate / self.true


def sample(family: str, count: int, seed: int = 0, at_once: int = 50) -> Sample:
    """Estimate and truth on at least ``count`` problems of a family."""
    columns: list[tuple[Tensor, ...]] = []
    while sum(len(column[0]) for column in columns) < count:
        generator = torch.Generator().manual_seed(seed)
        instance = draw(family, seed, at_once)
        tasks = len(instance.solution)
        errors = _log_uniform(generator, tasks)
        for rtol in torch.tensor(ERRORS)[torch.randperm(len(ERRORS), generator=generator)[:1]]:
            result = hypergradient(
                instance.problem,
                instance.outer,
                instance.tasks,
                inner_solver=None,
                inner=_like(instance.away(errors), instance),
                method=ImplicitCG(max_steps=1000, rtol=float(rtol), error_estimate=True),
                reduction="none",
            )
            found = _rows(result.gradient)
            true = (found - instance.exact).norm(dim=1) / found.norm(dim=1)
            estimate = result.diagnostics.error_estimate
            assert estimate is not None
            bad = torch.tensor([s > Status.MAX_STEPS for s in result.diagnostics.error_status])
            flagged = bad | estimate.isinf()
            columns.append((errors, rtol.expand(tasks), true, estimate, flagged))
        seed += 1
    return Sample(*(torch.cat(parts) for parts in zip(*columns, strict=True)))


def correction(family: str, seed: int = 0, count: int = 20) -> dict[str, Tensor]:
    """Errors with and without the Newton correction, ``[errors, tasks]``, against inner errors."""
    instance = draw(family, seed, count)
    tasks = len(instance.solution)
    sizes = torch.logspace(-1, -6, 11, dtype=torch.float64)
    table: dict[str, list[Tensor]] = {"plain": [], "corrected": []}
    for size in sizes:
        for name, correct in (("plain", False), ("corrected", True)):
            result = hypergradient(
                instance.problem,
                instance.outer,
                instance.tasks,
                inner_solver=None,
                inner=_like(instance.away(size.expand(tasks)), instance),
                method=ImplicitCG(max_steps=1000, rtol=1e-14, correct=correct),
                reduction="none",
            )
            gap = (_rows(result.gradient) - instance.exact).norm(dim=1)
            table[name].append(gap / instance.exact.norm(dim=1))
    return {"inner_error": sizes, **{name: torch.stack(rows) for name, rows in table.items()}}


def certificates(steps: int = 40, tasks: int = 20) -> dict[str, Tensor]:
    """Certified bound over true error, for the problems that declare their constants."""
    out = {}
    for problem in (Quadratic, Ridge, Logistic):
        example = problem.example(tasks=tasks)
        exact, bounded = (
            hypergradient(
                example.problem,
                example.outer,
                example.task,
                inner_solver=solver,
                method=method,
                reduction="none",
            )
            for solver, method in (
                (example.inner_solver, DenseExact(correct=True)),
                (GradientDescent(1 / example.lipschitz, steps), ImplicitCG(error_bound=True)),
            )
        )
        found = _rows(bounded.gradient)
        true = (found - _rows(exact.gradient)).norm(dim=1) / found.norm(dim=1)
        bound = bounded.diagnostics.error_bound
        assert bound is not None
        out[problem.__name__] = bound / true
    return out


def cost(family: str, seed: int = 0, count: int = 20) -> dict[str, float]:
    """Hessian products per task, without and with the estimate, and with the correction."""
    instance = draw(family, seed, count)
    tasks = len(instance.solution)
    inner = _like(instance.away(torch.full((tasks,), 1e-3, dtype=torch.float64)), instance)
    table = {"plain": {}, "estimate": {"error_estimate": True}, "corrected": {"correct": True}}
    return {
        name: hypergradient(
            instance.problem,
            instance.outer,
            instance.tasks,
            inner_solver=None,
            inner=inner,
            method=ImplicitCG(max_steps=1000, rtol=1e-5, **options),
        ).diagnostics.counts["products"]
        / tasks
        for name, options in table.items()
    }


def exponents(inner_error: Tensor, errors: Tensor, floor: float = 1e-11) -> Tensor:
    """Slope of each task's error against the inner error, both logarithmic, above the floor."""
    x = inner_error.log10()
    out = []
    for column in errors.unbind(1):
        keep = column > floor
        if int(keep.sum()) >= 3:
            a, b = x[keep], column[keep].log10()
            out.append(((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum())
    return torch.stack(out)


def shares(one: Sample) -> dict[str, float]:
    """How many of the unflagged estimates are within a factor of the truth."""
    ratio = one.ratio[~one.flagged]
    factor = torch.maximum(ratio, 1 / ratio)
    return {
        "within_1.5": (factor <= 1.5).double().mean().item(),
        "within_3": (factor <= 3.0).double().mean().item(),
        "flagged": one.flagged.double().mean().item(),
    }


def main() -> None:
    """Measure, print, write."""
    args = arguments(__doc__, "2,400 problems instead of 600")
    each = 800 if args.full else 200
    samples = {family: sample(family, each) for family in FAMILIES}
    samples["all"] = Sample(
        *(
            torch.cat([getattr(one, name) for one in samples.values()])
            for name in ("inner_error", "linear_rtol", "true", "estimate", "flagged")
        )
    )
    rows = []
    print(f"{'family':10}{'problems':>9}{'within 1.5':>12}{'within 3':>10}{'flagged':>9}")
    for family, one in samples.items():
        found = shares(one)
        count = len(one.true)
        print(
            f"{family:10}{count:9d}{100 * found['within_1.5']:11.2f}%"
            f"{100 * found['within_3']:9.2f}%{100 * found['flagged']:8.2f}%"
        )
        rows.append(Row({"family": family}, "problems", count))
        rows += [Row({"family": family}, metric, value) for metric, value in found.items()]
        quantiles = torch.quantile(one.ratio[~one.flagged], torch.tensor(QUANTILES).double())
        rows += [
            Row({"family": family, "quantile": q}, "estimate_over_truth", round(v, 4))
            for q, v in zip(QUANTILES, quantiles.tolist(), strict=True)
        ]
    corrections = {family: correction(family) for family in FAMILIES}
    for family, table in corrections.items():
        for name in ("plain", "corrected"):
            slope = exponents(table["inner_error"], table[name])
            print(
                f"{family:10} {name:10} exponent: median {slope.median():.3f}, "
                f"smallest {slope.min():.3f} of {len(slope)}"
            )
            rows.append(
                Row(
                    {"family": family, "hypergradient": name},
                    "median_exponent",
                    round(slope.median().item(), 3),
                )
            )
    for family in FAMILIES:
        spent = cost(family)
        print(
            f"{family:10} products per task: "
            + ", ".join(f"{name} {value:.1f}" for name, value in spent.items())
        )
        rows += [
            Row({"family": family, "hypergradient": name}, "products_per_task", round(value, 1))
            for name, value in spent.items()
        ]
    for name, ratio in certificates().items():
        print(
            f"{name:10} certified bound / true error: median {ratio.median():.3g}, "
            f"smallest {ratio.min():.3g}"
        )
        rows += [
            Row({"problem": name}, "bound_over_truth_median", round(ratio.median().item(), 1)),
            Row({"problem": name}, "bound_over_truth_smallest", round(ratio.min().item(), 1)),
        ]
    path = write_results(args.out, "error-estimate", sys.argv, rows, seeds=[0])
    plot(samples, corrections, path.with_suffix(".png"))
    print(f"written: {path} and {path.with_suffix('.png')}")


def plot(samples: dict[str, Sample], corrections: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Estimate against truth, the distribution of their ratio, and what the correction gains."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(12.5, 4.0), layout="constrained", width_ratios=[1, 1, 1]
    )
    colors = dict(zip(FAMILIES, ("#3b5bdb", "#e8590c", "#2b8a3e", "#862e9c"), strict=True))
    for family, color in colors.items():
        one = samples[family]
        good = ~one.flagged
        left.scatter(
            one.true[good], one.estimate[good], s=5, alpha=0.5, color=color, lw=0, label=family
        )
    low, high = 1e-7, 2.0
    left.plot([low, high], [low, high], color="black", lw=0.8)
    left.fill_between(
        [low, high],
        [low / 1.5, high / 1.5],
        [low * 1.5, high * 1.5],
        color="black",
        alpha=0.08,
        lw=0,
    )
    left.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        ylim=(low, high),
        xlabel="true relative error",
        ylabel="estimate",
        title="Estimate and truth; band: factor 1.5",
    )
    left.legend(frameon=False, markerscale=3)
    everything = samples["all"]
    ratio = everything.ratio[~everything.flagged].clamp(0.3, 3.0)
    bins = torch.logspace(-0.5, 0.5, 61).tolist()
    middle.hist(
        [samples[f].ratio[~samples[f].flagged].clamp(0.32, 3.1) for f in colors],
        bins=bins,
        stacked=True,
        color=list(colors.values()),
    )
    middle.axvspan(1 / 1.5, 1.5, color="black", alpha=0.08, lw=0)
    middle.set(
        xscale="log",
        yscale="log",
        xlabel="estimate / truth",
        ylabel="problems",
        title=f"Their ratio, {len(ratio):,} problems",
    )
    middle.set_xticks([0.5, 2 / 3, 1, 1.5, 2], ["0.5", "0.67", "1", "1.5", "2"])
    middle.minorticks_off()
    for family, color in colors.items():
        table = corrections[family]
        right.plot(table["inner_error"], table["plain"].median(1).values, "--", color=color)
        right.plot(
            table["inner_error"],
            table["corrected"].median(1).values,
            "-o",
            ms=3,
            color=color,
            label=family,
        )
    right.plot([], [], "--", color="gray", label="plain")
    right.plot([], [], "-o", ms=3, color="gray", label="corrected")
    right.set(
        xscale="log",
        yscale="log",
        xlabel="relative inner error",
        ylabel="relative hypergradient error",
        title="The Newton correction squares the error",
    )
    right.legend(frameon=False)
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150)


def _log_uniform(generator: torch.Generator, count: int) -> Tensor:
    return 10 ** -(1 + 4 * torch.rand(count, generator=generator, dtype=torch.float64))


def _like(z: Tensor, instance: object) -> Tensor:
    from bilevel.flat import FlatProblem, Outer

    flat = FlatProblem.of(instance.problem, Outer.of(instance.outer), instance.tasks)
    return flat.vector.unflatten(z)


def _rows(gradient: object) -> Tensor:
    (leaf,) = tree_leaves(gradient)
    return leaf.reshape(len(leaf), -1)


if __name__ == "__main__":
    main()
