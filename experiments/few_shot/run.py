"""Train, evaluate, and leave a run folder: with its settings, records, weights and result."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import bilevel
from bilevel import Record, SolveError, Training, evaluate
from bilevel.problems.data import DataError, pixel_nearest_neighbour
from bilevel.pytree import PyTree, tree_map
from bilevel.run_folder import (
    CHECKPOINT,
    CONFIG,
    CURVE,
    METRICS,
    PROBES,
    RESULT,
    WEIGHTS,
    RunFolder,
    RunFolderError,
    alone,
)

from ..results import commit, processor
from .job import Job, make_job
from .learners import LEARNERS
from .pictures import learning_curve
from .probe import probe
from .settings import Settings

__all__ = ["Accuracy", "Watcher", "held_out_accuracy", "mean_strength", "run"]

_SAVE_SECONDS = 60.0


class Watcher(Protocol):
    """Who is told how a run goes; `bilevel.cli.display.Display` shows it to people."""

    def start(self, title: str, choices: dict[str, str], folder: str) -> None:
        """What is about to run."""

    def training(self, steps: int, minutes: float | None, done: int = 0) -> Any:
        """A context whose ``update(record, cpu_seconds)`` is called after each step."""

    def evaluating(self, tasks: int) -> Any:
        """A context whose ``advance(count)`` is called as tasks are done."""

    def finish(
        self,
        accuracies: dict[str, tuple[float, str]],
        note: str,
        cost: str,
        files: list[Path],
        *,
        interrupted: bool,
    ) -> None:
        """The result."""


@dataclass(frozen=True)
class Accuracy:
    """Mean accuracy over tasks with its 95 % interval, 1.96 standard errors, as shares of 1.

    Attributes:
        mean: The mean.
        interval: Half the interval.
        tasks: Number of tasks.
        unusable: Tasks whose inner solver failed, so that no adapted network was judged.
    """

    mean: float
    interval: float
    tasks: int
    unusable: int = 0

    @classmethod
    def of(cls, values: Tensor) -> Accuracy:
        """From the accuracy of each task, ``[tasks]``; NaN where a task could not be adapted to.

        Such a task counts as one on which nothing is right.
        """
        failed = values.isnan()
        values = values.double().nan_to_num(0.0)
        spread = values.std().item() if len(values) > 1 else 0.0
        interval = 1.96 * spread / len(values) ** 0.5
        return cls(values.mean().item(), interval, len(values), int(failed.sum()))

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.interval:.1f} %"


def held_out_accuracy(job: Job, outer: PyTree, advance: Callable[[int], None]) -> Tensor:
    """Accuracy on each held-out task after adapting from ``outer``, ``[tasks]``.

    NaN where the inner solver failed.
    """
    if job.settings.plain_test and isinstance(outer, dict) and "theta" in outer:
        outer = outer["theta"]
    found = []
    for batch in job.held_out_tasks():
        solved = evaluate(job.test_problem, outer, batch, inner_solver=job.test_solver)
        accuracy = solved.metrics["accuracy"].double().cpu()
        usable = torch.tensor([status.usable for status in solved.status])
        found.append(accuracy.where(usable, float("nan")))
        advance(len(batch))
    return torch.cat(found)


def run(
    settings: Settings,
    path: Path,
    watcher: Watcher,
    *,
    overwrite: bool = False,
    resume: bool = False,
    baselines: bool = True,
) -> bool:
    """Build, train, evaluate; leave a run folder.

    Args:
        settings: What to run.
        path: The run folder.
        watcher: Who is told how it goes.
        overwrite: Replace a run that is in the folder.
        resume: Go on with the run that is in the folder; one that never began is begun.
        baselines: Evaluate what the trained network has to beat, too.

    Returns:
        Whether the run came to its end; False after Ctrl-C.

    Raises:
        BilevelError: Training failed, the folder cannot be written or another process works in
            it, or held-out classes are among those of training. What was there is kept.
        ValueError: A setting is wrong, or a resumed run had other settings.
    """
    job = make_job(settings)
    settings = job.settings
    _check_classes(job)
    with alone(path):
        return _run(job, RunFolder(path, overwrite, resume), watcher, baselines)


def _run(job: Job, folder: RunFolder, watcher: Watcher, baselines: bool) -> bool:
    settings = job.settings
    before = tree_map(lambda x: x.detach().clone(), job.outer)
    training = job.trainer().begin(job.outer)
    records, spent = _resumed(job, folder, training)
    folder.remove(RESULT)  # one of other evaluation settings must not stand beside these
    folder.write_json(CONFIG, _describe(job))
    watcher.start(title(settings), job.choices, str(folder.path))
    with _ctrl_c() as interrupted:
        with watcher.training(settings.steps, settings.minutes, len(records)) as bar:
            spent = _train(job, folder, training, records, spent, bar.update, interrupted)
        outer = final_weights(job, training)
        folder.save_weights(outer)
        accuracies: dict[str, Accuracy] = {}
        if not interrupted():
            # A Ctrl-C from here on leaves the trained weights and the curve without the lines.
            with contextlib.suppress(_Interrupted):
                accuracies = _compare(job, outer, before, watcher, interrupted, baselines)
    folder.write_json(RESULT, _result(job, records, spent, accuracies))
    if records:
        _save_curve(folder, job, records, accuracies)
    watcher.finish(
        {_NAMES.get(key, _own_name(job)): (one.mean, str(one)) for key, one in accuracies.items()},
        _note(job),
        f"{len(records)} steps, {spent / 60:.1f} CPU minutes of training",
        [folder.path / name for name in (WEIGHTS, CURVE, METRICS, RESULT)],
        interrupted=not accuracies,
    )
    return bool(accuracies)


def final_weights(job: Job, training: Training) -> PyTree:
    """What is evaluated: the moving average where one is kept, else the last iterate."""
    outer = training.average if training.average is not None else training.outer
    job.prepare(outer, training.steps - 1)
    return outer


def _train(
    job: Job,
    folder: RunFolder,
    training: Training,
    records: list[dict[str, Any]],
    spent: float,
    show: Callable[[Record, float], None],
    interrupted: Callable[[], bool],
) -> float:
    """Train until the steps or the CPU minutes are spent; return the CPU seconds in all."""
    settings = job.settings
    budget = float("inf") if settings.minutes is None else 60 * settings.minutes
    started, saved = time.process_time() - spent, time.monotonic()

    def save() -> None:
        folder.save_checkpoint({"training": training.state_dict(), "cpu_seconds": spent})

    while training.steps < settings.steps and spent < budget and not interrupted():
        step = training.steps
        job.prepare(job.outer, step)
        try:
            record, _ = training.advance(job.training(step))
        except SolveError:
            folder.save_weights(final_weights(job, training))
            raise
        spent = time.process_time() - started
        entry = {**record.as_dict(), "cpu_seconds": round(spent, 3)}
        if isinstance(job.outer, dict) and "log_strength" in job.outer:
            entry["strength"] = mean_strength(job.outer["log_strength"])
        records.append(entry)
        folder.append(entry)
        show(record, spent)
        if settings.probe_every and (step + 1) % settings.probe_every == 0:
            before = time.process_time()
            for found in probe(job, job.outer):
                folder.append({"step": step, **found}, PROBES)
            started += time.process_time() - before  # looking is no part of training
        if time.monotonic() - saved > _SAVE_SECONDS:
            save()
            saved = time.monotonic()
    save()
    return spent


def _resumed(job: Job, folder: RunFolder, training: Training) -> tuple[list[dict[str, Any]], float]:
    """Load what an earlier run left; the records so far, and the CPU seconds spent."""
    state = folder.load_checkpoint()
    if folder.has(CONFIG):
        old = folder.read_json(CONFIG)["settings"]
        name = job.settings.differs_from(old)
        if name is not None:
            raise ValueError(
                f"the run in '{folder.path}' has {name} = {old.get(name)!r}, not "
                f"{getattr(job.settings, name)!r}; resume it with its own settings, or choose "
                "another folder"
            )
    if state is None:
        folder.keep_records(0)
        return [], 0.0
    if not {"training", "cpu_seconds"} <= set(state):
        raise RunFolderError(
            f"'{folder.path / CHECKPOINT}' is no checkpoint of such a run; remove the folder, or "
            "start the run anew with --overwrite"
        )
    training.load_state_dict(state["training"])
    if folder.has(PROBES):
        folder.keep_records(training.steps, PROBES)
    records = folder.keep_records(training.steps)
    if len(records) != training.steps:
        raise RunFolderError(
            f"'{folder.path / METRICS}' holds {len(records)} records of {training.steps} steps; "
            "remove the folder, or start the run anew with --overwrite"
        )
    return records, state["cpu_seconds"]


def _compare(
    job: Job,
    outer: PyTree,
    before: PyTree,
    watcher: Watcher,
    interrupted: Callable[[], bool],
    baselines: bool,
) -> dict[str, Accuracy]:
    """The trained network beside what it has to beat, on the same tasks."""
    with watcher.evaluating((1 + baselines) * job.settings.eval_tasks) as bar:

        def advance(count: int) -> None:
            bar.advance(count)
            if interrupted():
                raise _Interrupted

        values = {"trained": held_out_accuracy(job, outer, advance)}
        if baselines:
            values["untrained"] = held_out_accuracy(job, before, advance)
            nearest = [pixel_nearest_neighbour(batch) for batch in job.held_out_tasks()]
            values["nearest_neighbour"] = torch.cat(nearest)
    return {key: Accuracy.of(one) for key, one in values.items()}


class _Interrupted(Exception):  # noqa: N818
    """Not an error: the user asked to stop."""


@contextlib.contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Ctrl-C as a question that is asked between steps; a second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # signals reach the main thread only
        return

    def handle(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    usual = signal.signal(signal.SIGINT, handle)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, usual)


# What is said and written

_NAMES = {
    "untrained": "untrained network, adapted alike",
    "nearest_neighbour": "pixel nearest neighbour",
}


def title(settings: Settings) -> str:
    """The run in a few words."""
    name = LEARNERS[settings.learner].title
    return f"{name} · {settings.data} · {settings.ways}-way {settings.shots}-shot"


def _own_name(job: Job) -> str:
    return LEARNERS[job.settings.learner].title


def _note(job: Job) -> str:
    settings = job.settings
    norm = (
        "Batch norm sees all query images of a task at once (transductive)."
        if settings.transductive
        else "Batch norm sees the support images only (not transductive)."
    )
    kind = "held-out" if settings.split == "test" else "validation"
    return (
        f"{settings.eval_tasks} tasks of {kind} classes of {settings.data}, {settings.ways}-way "
        f"{settings.shots}-shot, {job.held_out.queries} query images per class; ± is the 95 % "
        f"interval." + (f" {norm}" if settings.norm == "batch" else "")
    )


def _result(
    job: Job, records: list[dict[str, Any]], spent: float, accuracies: dict[str, Accuracy]
) -> dict[str, Any]:
    fine = ("CONVERGED", "BUDGET")
    counts: dict[str, int] = {}
    for record in records:
        for name, number in record["status"].items():
            counts[name] = counts.get(name, 0) + number
    return {
        "finished": bool(accuracies),
        "steps": len(records),
        "train_cpu_minutes": spent / 60,
        "tasks": sum(counts.values()),
        "status": counts,
        "flagged_tasks": sum(n for name, n in counts.items() if name not in fine),
        "unusable_tasks": sum(record["failed"] for record in records),
        "accuracy": {key: asdict(one) for key, one in accuracies.items()},
        "machine": _machine(),
        "torch": torch.__version__,
        "bilevel": bilevel.__version__,
        "commit": commit(),
    }


def _check_classes(job: Job) -> None:
    """Refuse to evaluate on classes that are trained on.

    Raises:
        DataError: There are such classes.
    """
    shared = set(job.training.pool.names) & set(job.held_out.pool.names)
    if shared:
        raise DataError(
            f"{len(shared)} held-out classes are trained on, '{min(shared)}' for one; split the "
            "data once, by one permutation"
        )


def _describe(job: Job) -> dict[str, Any]:
    training, held_out = set(job.training.pool.names), set(job.held_out.pool.names)
    return {
        "command": "train imaml",
        "settings": asdict(job.settings),
        "choices": job.choices,
        "classes": {
            "training": len(training),
            "held_out": len(held_out),
            "shared": len(training & held_out),
        },
        "versions": {
            "bilevel": bilevel.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": _machine(),
        "commit": commit(),
    }


def _machine() -> dict[str, Any]:
    return {
        "system": sys.platform,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def mean_strength(log_strength: PyTree) -> float:
    """The mean λ over the entries of its logarithm."""
    leaves = bilevel.pytree.tree_leaves(log_strength)
    return float(torch.cat([leaf.detach().flatten() for leaf in leaves]).exp().mean())


def _save_curve(
    folder: RunFolder, job: Job, records: list[dict[str, Any]], accuracies: dict[str, Accuracy]
) -> None:
    figure = learning_curve(
        title(job.settings),
        [record["step"] + 1 for record in records],
        [100 * record["metrics"]["accuracy"] for record in records],
        [record["outer_value"] for record in records],
        {
            _NAMES.get(key, _own_name(job)): (100 * one.mean, 100 * one.interval)
            for key, one in accuracies.items()
        },
    )
    folder.write(CURVE, lambda file: figure.savefig(file, format="png"))
