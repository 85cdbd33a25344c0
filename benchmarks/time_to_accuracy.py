"""Seconds to a hypergradient of 1 % true error, from a trained θ on few-shot tasks.

    python benchmarks/time_to_accuracy.py [--full] [--root DIR] [--out benchmarks/results]

A network without batch norm and with softplus, so that the truth is defined; it comes from float64
solves to ‖∂_z G‖ ≤ 1e-10. θ is trained gently, at the published λ = 2 in few meta-steps of a small
rate, and held-out accuracy says that it is trained.

Others iterate with an optimizer of PyTorch and solve with plain conjugate gradients, task by task:
Nesterov's momentum at rates from the largest curvature, Adam, and L-BFGS with Wolfe's line search,
every number of steps with every number of CG steps. The library's solvers, tolerances and its
Newton correction are searched likewise, and so is whether it takes tasks at once. What ends in
another minimum than the truth's does not get there. The cheapest few of either side are then run
as a whole, and the fastest that reach the target take turns. A side that never reaches it is timed
at its largest budget, which bounds its time from below.

With ``--full`` the paper's 64 channels on Omniglot, about ten minutes; without it 8 channels on
glyphs, under one. Writes a table, JSON and a picture.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from accuracy_search import FULL, QUICK, TARGET, Setting, Tried, clocked
from arguments import arguments
from matplotlib.ticker import LogLocator, NullLocator
from peers import installed
from timing import Times, alternate

from bilevel.experiments.few_shot import Settings, make_job
from bilevel.experiments.pictures import COLORS, INK, axes_of, new_figure
from bilevel.experiments.results import Row, write_results

FINALISTS = 3


def finalists(tried: Sequence[Tried]) -> list[Tried]:
    """The cheapest few that reach the target; else the best that the largest budget bought."""
    reached = sorted((one for one in tried if one.reached), key=lambda one: one.seconds)
    if reached:
        return reached[:FINALISTS]
    # Where it diverges in every way, the best of what came before.
    largest = [one for one in tried if one.most] or tried
    return [min(largest, key=lambda one: one.error)]


def decided(setting: Setting, candidates: Sequence[Tried]) -> Tried:
    """The fastest that reaches the target when it is run as a whole; else the most exact."""
    again = []
    for one in candidates:
        gradient, seconds = clocked(one.run)
        again.append(replace(one, error=setting.error(gradient), seconds=seconds))
    reached = [one for one in again if one.reached]
    if reached:
        return min(reached, key=lambda one: one.seconds)
    return min(again, key=lambda one: one.error)


def measured(setting: Setting, tried: Sequence[Tried], rounds: int) -> list[tuple[Tried, Times]]:
    """The best setting of each family, taking turns; the library comes first."""
    families = dict.fromkeys(one.family for one in tried)
    entered = {name: finalists([one for one in tried if one.family == name]) for name in families}
    best = {name: decided(setting, few) for name, few in entered.items()}
    if installed("torchopt"):
        # It solves what the loop by hand solves, at another price.
        peers = [one for name, one in best.items() if name != "bilevel"]
        fastest = min(peers, key=lambda one: (not one.reached, one.seconds)).family
        few = [(one, one.peer) for one in entered[fastest] if one.peer is not None]
        candidates = [
            replace(one, family="torchopt", run=setting.by_torchopt(peer)) for one, peer in few
        ]
        best["torchopt"] = decided(setting, candidates)
    times = alternate({name: one.run for name, one in best.items()}, rounds)
    return [(one, times[name]) for name, one in best.items()]


def best_peer(found: Sequence[tuple[Tried, Times]]) -> tuple[Tried, Times]:
    """The fastest of the others that reaches the target; where none does, the fastest."""
    others = [one for one in found if one[0].family != "bilevel"]
    return min(others, key=lambda one: (not one[0].reached, one[1].median))


def rows_of(tried: Sequence[Tried], found: Sequence[tuple[Tried, Times]]) -> list[Row]:
    """As they stand in the file: what was timed, and the curves of the search."""
    ours = next(times for one, times in found if one.family == "bilevel")
    rows = []
    for one, times in found:
        where = {"variant": one.family}
        rows += [
            Row({**where, "choice": one.choice}, "seconds", times.median),
            Row(where, "spread", times.spread),
            Row(where, "error", one.error),
            Row(where, "reached", float(one.reached)),
            Row(where, "bilevel_over_it", ours.over(times)),
        ]
    peer, times = best_peer(found)
    rows.append(Row({"best_peer": peer.family}, "bilevel_over_best_peer", ours.over(times)))
    for family in dict.fromkeys(one.family for one in tried):
        count = sum(one.family == family for one in tried)
        rows.append(Row({"family": family}, "settings_tried", count))
    lines = dict.fromkeys((one.family, one.line) for one in tried)
    for family, line in lines:
        # What another setting of the same curve beats in both is left out.
        mine = {
            (one.seconds, one.error): one.choice
            for one in tried
            if (one.family, one.line) == (family, line)
        }
        for seconds, error in falling(mine):
            where = {"family": family, "line": line, "choice": mine[seconds, error]}
            rows.append(Row({**where, "seconds": round(seconds, 4)}, "tried_error", error))
    return rows


# What a family is called, and its color.
LOOKS = {
    "bilevel": ("bilevel", COLORS[2]),
    "hand-lbfgs": ("L-BFGS by hand", COLORS[0]),
    "hand-first-order": ("momentum or Adam by hand", COLORS[1]),
    "torchopt": ("TorchOpt", COLORS[4]),
}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Error against seconds, from the rows alone."""
    figure = new_figure(7.2, 4.6)
    axes = axes_of(figure, "seconds for one hypergradient", "true relative error")
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    timed: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.metric == "tried_error":
            key = (row.setting["family"], row.setting["line"])
            curves.setdefault(key, []).append((row.setting["seconds"], row.value))
        elif "variant" in row.setting:
            timed.setdefault(row.setting["variant"], {})[row.metric] = row.value
    for family in dict.fromkeys(family for family, _ in curves):
        color = LOOKS[family][1]
        mine = [points for (name, _), points in curves.items() if name == family]
        for points in mine:
            axes.plot(*zip(*points, strict=True), "o-", ms=2.5, lw=0.8, color=color, alpha=0.3)
        best = falling(point for points in mine for point in points)
        axes.plot(*zip(*best, strict=True), lw=2.2, color=color, drawstyle="steps-post")
    for order, (variant, found) in enumerate(timed.items()):
        name, color = LOOKS[variant]
        reached = "" if found["reached"] else "more than "
        # Stars that meet: the library's lies on top.
        star = {"ms": 13, "mec": "white", "mew": 1.0, "color": color, "zorder": 9 - order}
        label = f"{name}: {reached}{found['seconds']:.2g} s"
        axes.plot(found["seconds"], found["error"], "*", **star, ls="none", label=label)
    axes.axhline(TARGET, color=INK, lw=1.2, ls="--", zorder=1)
    axes.axhspan(0.0, TARGET, color=COLORS[5], alpha=0.08, lw=0, zorder=0)
    low = min(error for points in curves.values() for _, error in points)
    # Far from a solution an error says nothing but that.
    axes.set(xscale="log", yscale="log", ylim=(low / 1.5, 2.0))
    # Every other decade of seconds would leave short ranges without a number.
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.set_title(
        "thin: what was tried; thick: the best of it; stars: chosen, and timed in turn",
        loc="left",
        fontsize=9,
        color=INK,
    )
    axes.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=9, loc="lower left")
    figure.savefig(path)


def falling(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that are better than all that took less time."""
    best: list[tuple[float, float]] = []
    for seconds, error in sorted(points):
        if not best or error < best[-1][1]:
            best.append((seconds, error))
    return best


def settings(full: bool, root: str | None) -> Settings:
    """Of the job that trains θ and draws the tasks."""
    common = {"activation": "softplus", "norm": "none", "strength": 2.0, "tasks": 4}
    if full:
        # At a greater rate curvature grows until inner problems are hopeless, for θ as for tests.
        more = {"data": "omniglot", "root": root, "channels": 64, "queries": 15}
        return Settings.of("imaml", **common, **more, lr=3e-4, steps=150)
    more = {"data": "glyphs", "channels": 8, "queries": 5, "seed": 1}
    return Settings.of("imaml", **common, **more, lr=3e-3, steps=100)


def main() -> None:
    """Measure, print, write."""
    args = arguments(__doc__, "64 channels on Omniglot", rounds=5, root=True)
    job = make_job(settings(args.full, args.root))
    setting = Setting(job, job.settings.steps, 4 if args.full else 2)
    accuracy, chance = setting.accuracy(), 1 / job.settings.ways
    print(f"θ: accuracy {accuracy} on {accuracy.tasks} held-out tasks, chance {100 * chance:g} %")
    print(f"curvature from {setting.smallest:.3g} to {setting.largest:.4g}", flush=True)
    if accuracy.mean - accuracy.interval <= chance:
        raise SystemExit("θ is not trained: its accuracy is not clearly above chance")
    grid = FULL if args.full else QUICK
    ours, others = setting.search_ours(grid, setting.faster_engine()), setting.search_by_hand(grid)
    print(f"settings tried: {len(ours)} of bilevel, {len(others)} by hand", flush=True)
    tried = [*ours, *others]
    found = measured(setting, tried, args.rounds)
    rows = [
        Row({}, "accuracy", accuracy.mean, ci95=accuracy.interval),
        Row({}, "chance", chance),
        Row({}, "smallest_curvature", setting.smallest),
        Row({}, "largest_curvature", setting.largest),
        Row({}, "largest_residual_of_the_truth", setting.residual),
        *rows_of(tried, found),
    ]
    report(found)
    # Where the data lie is the reader's own business.
    command = f"python benchmarks/time_to_accuracy.py{' --full' * args.full}"
    path = write_results(
        args.out, "time-to-accuracy", sys.argv, rows, seeds=[job.settings.seed], command=command
    )
    draw(rows, path.with_suffix(".png"))
    print(f"written: {path} and {path.with_suffix('.png')}")


def report(found: Sequence[tuple[Tried, Times]]) -> None:
    """Print what was timed."""
    ours = next(times for one, times in found if one.family == "bilevel")
    for one, times in found:
        bound = "" if one.reached else "; NOT reached: the time is a lower bound"
        print(
            f"  {one.family:18}{times.median:8.3f} s ± {times.spread * times.median:.3f}, error "
            f"{one.error:.4f}; bilevel takes {ours.over(times):.2f} of it{bound}\n"
            f"  {'':18}{one.choice}"
        )
    peer, times = best_peer(found)
    most = "" if peer.reached else "at most "
    print(f"bilevel takes {most}{ours.over(times):.2f} of the best peer's time ({peer.family})")


if __name__ == "__main__":
    main()
