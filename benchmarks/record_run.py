"""Record a run folder of `bilevel train` among the results.

    python benchmarks/record_run.py RUN_FOLDER NAME [--commit HASH] [--log FILE] [--out DIR]

Copies the accuracy, the baselines and the cost from the run's own result file, with the command
that made it, and its learning curve. With ``--log`` the terminal output is kept beside them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from bilevel.experiments.few_shot import Settings
from bilevel.experiments.results import Row, write_results


def rows_of(result: dict[str, Any], settings: dict[str, Any]) -> list[Row]:
    """One row for each learner, and the cost of training."""
    task = {
        "data": settings["data"],
        "ways": settings["ways"],
        "shots": settings["shots"],
        "method": settings["method"],
    }
    rows = [
        Row(
            {**task, "learner": learner},
            "test_accuracy",
            round(result["accuracy"][learner]["mean"], 4),
            ci95=round(result["accuracy"][learner]["interval"], 4),
        )
        for learner in result["accuracy"]
    ]
    rows.append(Row(task, "training_cpu_minutes", round(result["train_cpu_minutes"], 1)))
    rows.append(Row(task, "meta_steps", result["steps"]))
    return rows


def main() -> None:
    """Read, write, copy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--commit", help="the commit that ran; default: the one at hand")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    result = json.loads((args.run / "result.json").read_text())
    settings = json.loads((args.run / "config.json").read_text())["settings"]
    path = write_results(
        args.out,
        args.name,
        ["record_run.py", "RUN", args.name],
        rows_of(result, settings),
        seeds=[settings["seed"]],
        device=settings["device"],
        command=command_of(settings),
        measured_at=args.commit,
    )
    shutil.copyfile(args.run / "learning-curve.png", path.with_suffix(".png"))
    if args.log:
        shutil.copyfile(args.log, path.with_suffix(".log"))
    print(f"written: {path}")


def command_of(settings: dict[str, Any]) -> str:
    """The command line that makes the run: all settings that are not its learner's own."""
    usual = asdict(Settings.of(settings["learner"], data=settings["data"]))
    known = {one.name: one.default for one in fields(Settings)}
    silent = ["root", "learner"]
    if settings["learn_strength"] is None:
        silent += ["strength_lr", "strength_min"]
    words = ["bilevel train imaml"] + ["--root DIR"] * (settings["root"] is not None)
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        default = known[name] if name == "data" else usual[name]
        if name in silent or value in (default, known[name]):
            continue
        if isinstance(value, dict):
            option = {"inner_options": "--inner-option", "method_options": "--method-option"}[name]
            words += [f"{option} {key}={one}" for key, one in value.items()]
        elif isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words.append(f"{flag} {value}")
    if settings["learner"] != "imaml":
        words.insert(1, f"--learner {settings['learner']}")
    return " ".join(words)


if __name__ == "__main__":
    main()
