"""Draw the training of several runs over one another: accuracy, inner residual, largest curvature.

    python benchmarks/compare_runs.py NAME --run LABEL FOLDER --run LABEL FOLDER [--out DIR]

Writes JSON, with ten of the points of each curve, and a picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from bilevel.experiments.pictures import COLORS, INK, new_figure, tidy
from bilevel.experiments.results import Row, write_results
from bilevel.run_folder import CONFIG, METRICS, read_metrics

_WINDOW = 100
_PANELS = (
    ("accuracy", "query accuracy (%)"),
    ("inner_residual", "inner residual ‖∇G‖"),
    ("largest_curvature", "largest curvature met"),
)


def series(records: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The numbers that are drawn, one for each window of 100 meta-steps."""
    out: dict[str, list[float]] = {"step": [], **{name: [] for name, _ in _PANELS}}
    for start in range(0, len(records), _WINDOW):
        part = records[start : start + _WINDOW]
        out["step"].append(part[-1]["step"] + 1)
        out["accuracy"].append(100 * statistics.fmean(one["metrics"]["accuracy"] for one in part))
        out["inner_residual"].append(statistics.fmean(one["inner_residual"] for one in part))
        highest = [one["curvature"][1] for one in part if one["curvature"] is not None]
        out["largest_curvature"].append(max(highest, default=float("nan")))
    return out


def draw(title: str, runs: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Three panels, one above the other."""
    figure = new_figure(9.0, 7.2)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    panels = figure.subplots(len(_PANELS), 1, sharex=True)
    for axes, (key, label) in zip(panels, _PANELS, strict=True):
        for (run, values), color in zip(runs.items(), COLORS, strict=False):
            axes.plot(values["step"], values[key], color=color, linewidth=1.8, label=run)
        axes.set_ylabel(label, color=INK)
        tidy(axes)
    for axes in panels[1:]:
        axes.set_yscale("log")
    panels[-1].set_xlabel("meta-step", color=INK)
    panels[0].legend(loc="lower left", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)
    figure.savefig(path)


def main() -> None:
    """Read the runs, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--run", nargs=2, action="append", required=True)
    parser.add_argument("--title", default="Training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    drawn, rows, configs, words = {}, [], [], []
    for label, folder in args.run:
        configs.append(json.loads((Path(folder) / CONFIG).read_text()))
        words += ["--run", f"'{label}'", "RUN"]
        drawn[label] = values = series(read_metrics(Path(folder) / METRICS))
        every = max(1, len(values["step"]) // 10)
        for i in range(every - 1, len(values["step"]), every):
            where = {"run": label, "step": values["step"][i]}
            rows += [Row(where, key, round(values[key][i], 4)) for key, _ in _PANELS]
    path = write_results(
        args.out,
        args.name,
        ["compare_runs.py", args.name, *words],
        rows,
        sorted({config["settings"]["seed"] for config in configs}),
        measured_at=", ".join(dict.fromkeys(f"{one['commit']} (training)" for one in configs)),
    )
    draw(args.title, drawn, path.with_suffix(".png"))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
