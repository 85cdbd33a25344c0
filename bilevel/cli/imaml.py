"""The job behind ``bilevel train imaml``: few-shot classification by implicit MAML.

`build` assembles problem, data, inner solver and method; `train` and `evaluate` run them; `run`
does all of it and leaves a run folder behind.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bilevel
from bilevel import Record, SolveError, TaskBatch, Trainer, solve_inner, stateless
from bilevel.pytree import PyTree, tree_leaves, tree_map
from bilevel.registry import INNER_SOLVERS, METHODS
from bilevel.run_folder import CONFIG, CURVE, METRICS, RESULT, WEIGHTS, RunFolder

from .display import Display
from .plots import learning_curve
from .siblings import build as build_registered
from .siblings import find, load, registries

__all__ = ["Accuracy", "Job", "Settings", "build", "evaluate", "run", "train"]

# What is compared, by its key in the result file.
_NAMES = {
    "imaml": "iMAML",
    "untrained": "untrained network, adapted alike",
    "nearest_neighbour": "pixel nearest neighbour",
}
_SAVE_EVERY = 100
_CHUNK = 20
# The classes are parted alike for every seed, so that runs can be compared.
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Settings:
    """All that a run depends on; the defaults end above 90 % in minutes on two CPU cores."""

    data: str = "glyphs"
    root: str | None = None
    ways: int = 5
    shots: int = 1
    queries: int = 10
    tasks: int = 8
    rotations: bool | None = None  # of classes; None: for Omniglot, as is usual
    network: str = "strided"
    channels: int = 32
    strength: float = 0.5
    learn_strength: bool = False
    inner_solver: str = "gradient-descent"
    inner_steps: int = 16
    inner_lr: float = 0.1
    inner_options: dict[str, Any] = field(default_factory=dict)
    method: str = "cg"
    method_options: dict[str, Any] = field(default_factory=dict)
    lr: float = 2e-3
    clip: float = 2.0
    steps: int = 300
    minutes: float | None = None
    eval_tasks: int = 600
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None


@dataclass(frozen=True)
class Job:
    """A problem with its data and the choices that solve it; ``outer`` is trained in place."""

    settings: Settings
    problem: Any
    outer: PyTree
    inner_solver: Any
    method: Any
    training: Callable[[int], TaskBatch]
    held_out: Callable[[int], TaskBatch]


@dataclass(frozen=True)
class Accuracy:
    """Mean accuracy over tasks with its 95 % interval, 1.96 standard errors, as shares of 1."""

    mean: float
    interval: float
    tasks: int

    @classmethod
    def of(cls, values: Tensor) -> Accuracy:
        """From the accuracy of each task, ``[tasks]``."""
        spread = values.double().std().item() if len(values) > 1 else 0.0
        return cls(values.double().mean().item(), 1.96 * spread / len(values) ** 0.5, len(values))

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.interval:.1f} %"


def build(settings: Settings) -> Job:
    """Assemble the job.

    Raises:
        ValueError: A setting names nothing that is known, or is out of range.
    """
    registries()
    data, problems = load("problems.data"), load("problems")
    device = _device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)

    inner_solver = build_registered(INNER_SOLVERS, settings.inner_solver, _inner_options(settings))
    method = build_registered(METHODS, settings.method, _method_options(settings))
    networks = {"strided": problems.conv_strided, "pool": problems.conv_pool}
    make_network = find("network", settings.network, networks)

    pools = find("data set", settings.data, {"glyphs": _glyphs, "omniglot": _omniglot})
    train_pool, held_out_pool = (pool.to(device) for pool in pools(data, settings.root))
    episodes = {"ways": settings.ways, "shots": settings.shots, "queries": settings.queries}
    if settings.rotations is None:
        settings = replace(settings, rotations=settings.data == "omniglot")
    training = data.EpisodeSampler(
        train_pool,
        tasks=settings.tasks,
        seed=settings.seed,
        rotations=settings.rotations,
        **episodes,
    )
    held_out = data.EpisodeSampler(
        held_out_pool, tasks=_CHUNK, seed=settings.seed, rotations=settings.rotations, **episodes
    )

    in_channels, size = train_pool.images.shape[2], train_pool.images.shape[-1]
    module = make_network(
        settings.ways, settings.channels, in_channels, size, seed=settings.seed
    ).to(device)
    params, net = stateless(module)
    problem = problems.FewShot(net, settings.strength, learn_strength=settings.learn_strength)
    outer = problem.initial_outer(params)
    return Job(settings, problem, outer, inner_solver, method, training, held_out)


def train(job: Job, callback: Callable[[Record, float], None], stop: Callable[[], bool]) -> float:
    """Train ``job.outer`` in place until the steps or the CPU minutes are spent.

    Args:
        job: What to train.
        callback: Called after each step with its record and the CPU seconds so far.
        stop: Asked after each step whether to end here.

    Returns:
        The CPU seconds of training.
    """
    settings = job.settings
    budget = float("inf") if settings.minutes is None else 60 * settings.minutes
    started = time.process_time()

    def after_step(record: Record, _: object) -> None:
        seconds = time.process_time() - started
        callback(record, seconds)
        if seconds >= budget or stop():
            raise _EndOfTraining

    trainer = Trainer(
        job.problem,
        inner_solver=job.inner_solver,
        method=job.method,
        optimizer=lambda leaves: torch.optim.Adam(leaves, lr=settings.lr),
        clip=settings.clip or None,
        on_failure="mean",
    )
    with contextlib.suppress(_EndOfTraining):
        trainer.fit(job.outer, job.training, settings.steps, callback=after_step)
    return time.process_time() - started


def evaluate(job: Job, outer: PyTree, advance: Callable[[int], None]) -> Tensor:
    """Accuracy on each held-out task after adapting from ``outer`` as in training, ``[tasks]``.

    All query images of a task go through the network in one pass, so that batch norm uses their
    statistics (the transductive setting of MAML and iMAML).
    """
    found = []
    for batch in held_out_tasks(job):
        solution = solve_inner(job.problem, outer, batch, inner_solver=job.inner_solver)
        for i, task in enumerate(batch.unstack()):
            inner = tree_map(lambda x, i=i: x[i], solution.inner)
            with torch.no_grad():
                metrics = job.problem.metrics(inner, outer, task.outer_batch)
            found.append(metrics["accuracy"].double().cpu())
        advance(len(batch))
    return torch.stack(found)


def held_out_tasks(job: Job) -> Iterator[TaskBatch]:
    """The held-out tasks, the same ones at every call."""
    left = job.settings.eval_tasks
    for step in range(-(-left // _CHUNK)):
        batch = job.held_out(step)
        yield batch if left >= len(batch) else batch.select(torch.arange(left))
        left -= len(batch)


def run(settings: Settings, path: Path, display: Display, *, overwrite: bool = False) -> bool:
    """Build, train, evaluate; leave a run folder.

    Returns:
        Whether the run came to its end; False after Ctrl-C.

    Raises:
        BilevelError: Training failed, or the folder cannot be written. What was there is kept.
        ValueError: A setting is wrong.
    """
    started = time.perf_counter()
    job = build(settings)
    folder = RunFolder(path, overwrite)
    folder.write_json(CONFIG, _describe(job))
    display.start(_title(settings), _choices(job), str(path))
    before = tree_map(lambda x: x.detach().clone(), job.outer)
    records: list[Record] = []
    result: dict[str, Any] = {"finished": False}

    with _ctrl_c() as interrupted:
        with display.training(settings.steps, settings.minutes) as bar:

            def callback(record: Record, cpu_seconds: float) -> None:
                records.append(record)
                folder.append({**record.as_dict(), "cpu_seconds": round(cpu_seconds, 3)})
                if (record.step + 1) % _SAVE_EVERY == 0:
                    folder.save_weights(job.outer)
                bar.update(record, cpu_seconds)

            try:
                cpu = train(job, callback, interrupted)
            except SolveError:
                folder.save_weights(job.outer)
                _save_curve(folder, job, records, {})
                raise
        folder.save_weights(job.outer)
        result |= {
            "steps": len(records),
            "train_cpu_minutes": cpu / 60,
            "flagged_tasks": _flagged(records),
            "unusable_tasks": sum(record.failed for record in records),
        }
        accuracies: dict[str, Accuracy] = {}
        if not interrupted():
            # A Ctrl-C from here on leaves the trained weights and the curve without the lines.
            with contextlib.suppress(_EndOfTraining):
                accuracies = _compare(job, before, display, interrupted)
    result |= {
        "finished": bool(accuracies),
        "accuracy": {key: asdict(one) for key, one in accuracies.items()},
        "seconds": time.perf_counter() - started,
        "machine": _machine(),
        "torch": torch.__version__,
        "bilevel": bilevel.__version__,
    }
    _save_curve(folder, job, records, accuracies)
    folder.write_json(RESULT, result)
    display.finish(
        {_NAMES[key]: (one.mean, str(one)) for key, one in accuracies.items()},
        f"{settings.eval_tasks} tasks of held-out classes of {settings.data}, "
        f"{settings.ways}-way {settings.shots}-shot; ± is the 95 % interval. Batch norm sees all "
        "query images of a task at once (transductive).",
        f"{len(records)} steps, {cpu / 60:.1f} CPU minutes of training, "
        f"{result['seconds'] / 60:.1f} minutes in all",
        [folder.path / name for name in (WEIGHTS, CURVE, METRICS, RESULT)],
        interrupted=not accuracies,
    )
    return bool(accuracies)


def _compare(
    job: Job, before: PyTree, display: Display, interrupted: Callable[[], bool]
) -> dict[str, Accuracy]:
    """The trained network beside what it has to beat, on the same tasks."""
    nearest_neighbour = load("problems.data").pixel_nearest_neighbour
    with display.evaluating(2 * job.settings.eval_tasks) as bar:

        def advance(count: int) -> None:
            bar.advance(count)
            if interrupted():
                raise _EndOfTraining

        values = {
            "imaml": evaluate(job, job.outer, advance),
            "untrained": evaluate(job, before, advance),
            "nearest_neighbour": torch.cat([nearest_neighbour(b) for b in held_out_tasks(job)]),
        }
    return {key: Accuracy.of(one) for key, one in values.items()}


class _EndOfTraining(Exception):  # noqa: N818
    """Not an error: the budget is spent, or the user asked to stop."""


@contextlib.contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Ctrl-C as a question that is asked between steps; a second one stops at once."""
    asked = threading.Event()

    def handle(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    usual = signal.signal(signal.SIGINT, handle)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, usual)


def _inner_options(settings: Settings) -> dict[str, Any]:
    lr, steps = settings.inner_lr, settings.inner_steps
    usual: dict[str, dict[str, Any]] = {
        "gradient-descent": {"lr": lr, "max_steps": steps},
        "torch-optimizer": {"cls": "Adam", "lr": lr, "max_steps": steps},
        "lbfgs": {"max_steps": steps, "tol": None},
    }
    return {**usual.get(settings.inner_solver, {}), **settings.inner_options}


def _method_options(settings: Settings) -> dict[str, Any]:
    # What fits networks: a few products, and no tolerance that they could not reach.
    usual: dict[str, dict[str, Any]] = {
        "cg": {"max_steps": 5, "rtol": 0.0},
        "neumann": {"terms": 5},
        "implicit": {"linear_solver": "cg"},
    }
    return {**usual.get(settings.method, {}), **settings.method_options}


def _glyphs(data: Any, root: str | None) -> Any:
    # The default seed served to choose difficulty and settings; these classes were never looked at.
    pool = data.glyphs(seed=1)
    held_out = len(pool) // 4
    return pool.split([len(pool) - held_out, held_out], seed=_SPLIT_SEED)


def _omniglot(data: Any, root: str | None) -> Any:
    return data.omniglot_split(data.omniglot(root), seed=_SPLIT_SEED)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"`--device` is '{name}', which cannot be used: {reason}") from error
    return device


def _flagged(records: list[Record]) -> int:
    fine = ("CONVERGED", "BUDGET")
    return sum(n for record in records for name, n in record.status.items() if name not in fine)


def _title(settings: Settings) -> str:
    return f"iMAML · {settings.data} · {settings.ways}-way {settings.shots}-shot"


def _choices(job: Job) -> dict[str, str]:
    """The four choices and the network, for people."""
    settings = job.settings
    size = sum(leaf.numel() for leaf in tree_leaves(job.outer))
    return {
        "problem": repr(job.problem),
        "network": f"{settings.network}, {settings.channels} channels, {size:,} parameters",
        "inner solver": repr(job.inner_solver),
        "method": repr(job.method),
        "meta-step": f"Adam(lr={settings.lr:g}) on {settings.tasks} tasks",
    }


def _describe(job: Job) -> dict[str, Any]:
    return {
        "command": "train imaml",
        "settings": asdict(job.settings),
        "choices": _choices(job),
        "versions": {
            "bilevel": bilevel.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": _machine(),
    }


def _machine() -> dict[str, Any]:
    return {
        "system": sys.platform,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _save_curve(
    folder: RunFolder, job: Job, records: list[Record], accuracies: dict[str, Accuracy]
) -> None:
    if not records:
        return
    figure = learning_curve(
        _title(job.settings),
        [record.step + 1 for record in records],
        [100 * record.metrics["accuracy"] for record in records],
        [record.outer_value for record in records],
        {_NAMES[key]: (100 * one.mean, 100 * one.interval) for key, one in accuracies.items()},
    )
    folder.write(CURVE, lambda file: figure.savefig(file, format="png"))
