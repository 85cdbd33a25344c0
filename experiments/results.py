"""The results file that every benchmark and every reproduction writes, and the docs read."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import bilevel

__all__ = ["Row", "commit", "processor", "write_results"]


@dataclass(frozen=True)
class Row:
    """One measured number."""

    setting: dict[str, Any]
    metric: str
    value: float
    ci95: float | None = None
    reference: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As it stands in the file."""
        row: dict[str, Any] = {"setting": self.setting, "metric": self.metric, "value": self.value}
        if self.ci95 is not None:
            row["ci95"] = self.ci95
        if self.reference:
            row["reference"] = self.reference
        return row


def write_results(
    folder: Path,
    name: str,
    argv: list[str],
    rows: list[Row],
    seeds: list[int],
    device: str = "cpu",
    command: str | None = None,
    measured_at: str | None = None,
    machine: str | None = None,
) -> Path:
    """Write ``folder/name.json`` with where, when and by which command it was measured.

    Args:
        folder: Where; made if it does not exist.
        name: Name of the file, without its ending.
        argv: The command, where it is a script of ``benchmarks/``.
        rows: The numbers.
        seeds: Seeds.
        device: ``"cpu"``, or the name of the accelerator.
        command: The command, where it is none of ``benchmarks/``.
        measured_at: The commit that ran; default: the one at hand.
        machine: The machine that ran; default: the one at hand.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "name": name,
        "command": command or " ".join(["python", "benchmarks/" + Path(argv[0]).name, *argv[1:]]),
        "commit": measured_at or commit(),
        "date": dt.date.today().isoformat(),
        "machine": machine
        or f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads",
        "device": device,
        "seeds": seeds,
        "rows": [row.as_dict() for row in rows],
    }
    path = folder / f"{name}.json"
    scratch = path.with_suffix(f".json.{os.getpid()}.part")
    scratch.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(scratch, path)
    return path


def commit() -> str:
    """The commit that the package runs from, or its version where that is no git checkout."""
    here = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    # An installed package may lie inside somebody else's checkout.
    if shutil.which("git") is None or not git("ls-files", here.name):
        return f"version {bilevel.__version__}"
    # What an earlier benchmark wrote changes nothing of what is measured.
    where = (":/", ":(exclude,top)benchmarks/results")
    others = git("status", "--porcelain", "--untracked-files=no", "--", *where)
    return git("describe", "--always") + "-dirty" * bool(others)


def processor() -> str:
    """What the machine calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
