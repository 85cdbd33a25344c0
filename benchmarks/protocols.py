"""One trained network, evaluated in the ways that papers evaluate.

    python benchmarks/protocols.py RUN_FOLDER NAME [--tasks 600] [--out benchmarks/results]

The same weights on the same held-out classes: as many query images per class as support images, or
15; batch norm on all query images of a task (transductive), or on the support images alone; and
five times as many inner steps as in training. Writes JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from bilevel.experiments.few_shot import Accuracy, Settings, held_out_accuracy, make_job
from bilevel.experiments.results import Row, write_results
from bilevel.pytree import PyTree


def measure(settings: Settings, weights: PyTree) -> list[Row]:
    """One row for each protocol."""
    rows = []
    steps = settings.inner_steps
    variants = [
        (queries, transductive, steps)
        for queries in (settings.shots, 15)
        for transductive in (True, False)
    ]
    variants.append((settings.shots, True, 5 * steps))
    for queries, transductive, count in variants:
        chosen = replace(
            settings, eval_queries=queries, transductive=transductive, inner_steps=count
        )
        found = Accuracy.of(held_out_accuracy(make_job(chosen), weights, lambda done: None))
        where = {"query_images": queries, "transductive": transductive, "inner_steps": count}
        rows.append(Row(where, "test_accuracy", round(found.mean, 4), round(found.interval, 4)))
        print(
            f"{queries:3} query images, transductive {transductive!s:5}, {count:3} steps: {found}"
        )
    return rows


def main() -> None:
    """Read the run, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--tasks", type=int, default=600)
    parser.add_argument("--root", help="folder with the data sets; default: BILEVEL_DATA")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    config = json.loads((args.run / "config.json").read_text())
    settings = Settings(
        **{**config["settings"], "eval_tasks": args.tasks, "root": args.root, "threads": 1}
    )
    weights = torch.load(args.run / "weights.pt", weights_only=True)
    rows = measure(settings, weights)
    path = write_results(
        args.out,
        args.name,
        ["protocols.py", "RUN", args.name],
        rows,
        [settings.seed],
        measured_at=f"{config['commit']} (training)",
    )
    print(f"written: {path}")


if __name__ == "__main__":
    main()
