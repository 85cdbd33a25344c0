"""The results file that every benchmark writes, and the docs read."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["Row", "write_results"]


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
    commit: str | None = None,
) -> Path:
    """Write ``folder/name.json`` with where, when and by which command it was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "name": name,
        "command": command or " ".join(["python", "benchmarks/" + Path(argv[0]).name, *argv[1:]]),
        "commit": commit or _commit(),
        "date": dt.date.today().isoformat(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads",
        "device": device,
        "seeds": seeds,
        "rows": [row.as_dict() for row in rows],
    }
    path = folder / f"{name}.json"
    scratch = path.with_suffix(".json.part")
    scratch.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(scratch, path)
    return path


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
