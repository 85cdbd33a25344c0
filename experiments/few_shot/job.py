"""A run put together: problem, data, inner solver, method, and the outer variable to train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import bilevel.problems as problems
import bilevel.solvers
from bilevel import TaskBatch, Trainer, stateless
from bilevel.build import build, find
from bilevel.inner_solver import InnerSolver
from bilevel.method import HypergradientMethod
from bilevel.problems import EpisodeSampler, FewShot, ImageClasses, data
from bilevel.pytree import PyTree, tree_leaves
from bilevel.registry import INNER_SOLVERS, METHODS, Registry

from .released import PullBack, ReleasedCG
from .reptile import Reptile
from .settings import Settings

__all__ = ["Job", "make_job"]

# The classes are parted alike for every seed, so that runs can be compared.
_SPLIT_SEED = 0
_NETWORKS = {"strided": problems.conv_strided, "pool": problems.conv_pool}
# Steps of about the learning rate, either way, without the memory that would overshoot.
_STRENGTH_STEPS = {"betas": (0.0, 0.9)}
# What belongs to published experiments only is in no registry of the library's.
_OWN_SOLVERS: Registry[InnerSolver] = Registry("inner solver")
_OWN_SOLVERS.register("pull-back")(PullBack)
_OWN_METHODS: Registry[HypergradientMethod] = Registry("hypergradient method")
_OWN_METHODS.register("released")(ReleasedCG)
_OWN_METHODS.register("reptile")(Reptile)
_ACTIVATIONS = {"relu": nn.ReLU, "softplus": nn.Softplus, "silu": nn.SiLU, "tanh": nn.Tanh}


@dataclass(frozen=True)
class Job:
    """A problem with its data and the choices that solve it; ``outer`` is trained in place.

    Attributes:
        settings: What it was made from, nothing left open.
        problem: The problem that is trained on.
        test_problem: The problem that test tasks are adapted by.
        outer: The outer variable.
        inner_solver: The inner solver in training.
        test_solver: The inner solver for test tasks.
        method: The hypergradient method.
        training: The tasks of a meta-step, by its number.
        held_out: Tasks of held-out classes, by the number of their chunk.
    """

    settings: Settings
    problem: FewShot
    test_problem: FewShot
    outer: PyTree
    inner_solver: InnerSolver
    test_solver: InnerSolver
    method: HypergradientMethod
    training: EpisodeSampler
    held_out: EpisodeSampler

    def trainer(self) -> Trainer:
        """The outer loop: Adam on θ, with another rate for log λ where it is learned."""
        settings = self.settings
        log_strength: set[int] = set()
        if isinstance(self.outer, dict) and "log_strength" in self.outer:
            log_strength = {id(leaf) for leaf in tree_leaves(self.outer["log_strength"])}

        def optimizer(leaves: list[torch.Tensor]) -> torch.optim.Optimizer:
            groups: list[dict[str, Any]] = [
                {"params": [x for x in leaves if id(x) not in log_strength]}
            ]
            if settings.learn_strength is not None:
                chosen = [x for x in leaves if id(x) in log_strength]
                groups.append({"params": chosen, "lr": settings.strength_lr, **_STRENGTH_STEPS})
            return torch.optim.Adam(groups, lr=settings.lr, eps=settings.eps)

        def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)

        def bound(outer: PyTree) -> None:
            for leaf in tree_leaves(outer["log_strength"]):
                leaf.clamp_(min=math.log(settings.strength_min))

        return Trainer(
            self.problem,
            inner_solver=self.inner_solver,
            method=self.method,
            optimizer=optimizer,
            schedule=cosine if settings.lr_schedule == "cosine" and settings.steps else None,
            average=settings.average or None,
            project=None if settings.learn_strength is None else bound,
            clip=settings.clip or None,
            on_failure="mean",
            engine=settings.engine,  # type: ignore[arg-type]  # `checked` knows them
            task_chunk=settings.task_chunk,
            kernels=settings.kernels,
        )

    def prepare(self, outer: PyTree, step: int) -> None:
        """Set what is scheduled to its value at a meta-step, in place."""
        settings = self.settings
        if settings.strength_end is None:
            return
        assert settings.strength is not None
        share = min(1.0, step / max(1, settings.steps - 1))
        strength = settings.strength * (settings.strength_end / settings.strength) ** share
        with torch.no_grad():
            outer["log_strength"].fill_(strength).log_()

    def held_out_tasks(self) -> Iterator[TaskBatch]:
        """The held-out tasks, the same ones at every call."""
        left = self.settings.eval_tasks
        chunk = self.held_out.tasks
        for step in range(-(-left // chunk)):
            batch = self.held_out(step)
            yield batch if left >= chunk else batch.select(torch.arange(left))
            left -= chunk

    @property
    def choices(self) -> dict[str, str]:
        """The choices, for people."""
        settings = self.settings
        size = sum(leaf.numel() for leaf in tree_leaves(self.outer))
        steps = "" if settings.precision == "full" else f", steps in {settings.precision}"
        return {
            "problem": repr(self.problem),
            "network": f"{settings.network}, {settings.channels} channels, {size:,} parameters",
            "inner solver": repr(self.inner_solver) + steps,
            "method": repr(self.method),
            "meta-step": f"Adam(lr={settings.lr:g}) on {settings.tasks} tasks",
        }


def make_job(settings: Settings) -> Job:
    """Put a run together.

    Raises:
        ValueError: A setting names nothing that is known, or is out of range.
        DataError: The data set cannot be read.
    """
    settings = settings.checked()
    device = usable_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    inner_solver, method = _inner_solver(settings), _method(settings)
    precision = settings.kernels.precision
    method.require_precision(precision)
    inner_solver.require_precision(precision, torch.get_default_dtype(), device)
    make_network = find("network", settings.network, _NETWORKS)
    activation = find("activation", settings.activation, _ACTIVATIONS)

    pools = find("data set", settings.data, _POOLS)
    train_pool, held_out_pool = (
        _toned(pool, bool(settings.invert)).to(device) for pool in pools(settings)
    )
    train_shots, eval_queries = settings.train_shots, settings.eval_queries
    assert train_shots is not None  # `checked` leaves nothing open
    assert eval_queries is not None
    _check_examples(settings, train_pool, held_out_pool)
    common: dict[str, Any] = {
        "ways": settings.ways,
        "seed": settings.seed,
        "rotations": settings.rotations,
        "reference": not settings.transductive,
    }
    training = EpisodeSampler(
        train_pool,
        shots=train_shots,
        queries=settings.queries,
        tasks=settings.tasks,
        **common,
    )
    held_out = EpisodeSampler(
        held_out_pool,
        shots=settings.shots,
        queries=eval_queries,
        tasks=max(1, 100 // settings.ways),
        **common,
    )
    in_channels, size = train_pool.images.shape[2], train_pool.images.shape[-1]
    module = make_network(
        settings.ways,
        settings.channels,
        in_channels,
        size,
        activation=activation,
        norm=settings.norm,
        init=settings.init,
        seed=settings.seed,
    ).to(device)
    params, net = stateless(module)
    head = [name for name in params if name.split(".")[0] == list(params)[-1].split(".")[0]]
    adapted = head if settings.adapted == "head" else None
    # A scheduled λ is a part of the outer variable that the optimizer leaves alone.
    learned = "scalar" if settings.strength_end is not None else settings.learn_strength
    problem = FewShot(net, settings.strength, learn_strength=learned, adapted=adapted)  # type: ignore[arg-type]
    test_problem, test_solver = problem, inner_solver
    if settings.plain_test:
        test_problem = FewShot(net, 0.0, adapted=adapted)
        test_solver = bilevel.solvers.GradientDescent(settings.inner_lr, settings.inner_steps)
    return Job(
        settings,
        problem,
        test_problem,
        problem.initial_outer(params),
        inner_solver,
        test_solver,
        method,
        training,
        held_out,
    )


def _check_examples(settings: Settings, train_pool: ImageClasses, held_out: ImageClasses) -> None:
    """Raise ValueError where a class has fewer images than an episode asks for."""
    for pool, shots, queries in (
        (train_pool, "train_shots", "queries"),
        (held_out, "shots", "eval_queries"),
    ):
        asked = getattr(settings, shots) + getattr(settings, queries)
        if asked > pool.examples:
            raise ValueError(
                f"`{shots}` + `{queries}` is {asked}, but each class of {settings.data} has "
                f"{pool.examples} images; lower one of them"
            )


def _inner_solver(settings: Settings) -> InnerSolver:
    lr, steps = settings.inner_lr, settings.inner_steps
    # What a name stands for: a registered solver, and the options that fit networks.
    usual: dict[str, tuple[str, dict[str, Any]]] = {
        "gradient-descent": ("gradient-descent", {"lr": lr, "max_steps": steps}),
        "backtracking-descent": ("backtracking-descent", {"lr": lr, "max_steps": steps}),
        "proximal-gradient": ("proximal-gradient", {"lr": lr, "max_steps": steps}),
        "nesterov": (
            "gradient-descent",
            {"lr": lr, "max_steps": steps, "momentum": 0.9, "nesterov": True},
        ),
        "adam": ("torch-optimizer", {"cls": "Adam", "lr": lr, "max_steps": steps}),
        "torch-optimizer": ("torch-optimizer", {"cls": "Adam", "lr": lr, "max_steps": steps}),
        "lbfgs": ("lbfgs", {"max_steps": steps, "tol": None}),
        "hessian-free": (
            "hessian-free",
            {"max_steps": steps, "tol": None, "cg_steps": 5, "cg_rtol": 0.0},
        ),
        "pull-back": ("pull-back", {"lr": lr, "max_steps": steps}),
    }
    asked = settings.inner_solver
    assert asked is not None
    find("inner solver", asked, {**dict.fromkeys(INNER_SOLVERS), **usual})
    name, options = usual.get(asked, (asked, {}))
    registry = _OWN_SOLVERS if name in _OWN_SOLVERS else INNER_SOLVERS
    solver: InnerSolver = build(registry, name, {**options, **settings.inner_options})
    return solver


def _method(settings: Settings) -> HypergradientMethod:
    # A few products, and no tolerance that networks could not reach.
    usual: dict[str, dict[str, Any]] = {
        "cg": {"max_steps": 5, "rtol": 0.0},
        "neumann": {"terms": 5},
        "implicit": {"linear_solver": "cg"},
    }
    find("hypergradient method", settings.method, dict.fromkeys([*METHODS, *_OWN_METHODS]))
    registry = _OWN_METHODS if settings.method in _OWN_METHODS else METHODS
    options = {**usual.get(settings.method, {}), **settings.method_options}
    method: HypergradientMethod = build(registry, settings.method, options)
    return method


def _glyphs(settings: Settings) -> tuple[ImageClasses, ImageClasses]:
    # Not the default seed, which served to choose the difficulty of the glyphs.
    pool = data.glyphs(seed=1)
    held_out = len(pool) // 4
    if settings.split == "test":
        return _two(pool.split([len(pool) - held_out, held_out], seed=_SPLIT_SEED))
    # The same held-out classes are left alone.
    rest = len(pool) - held_out
    sizes = [rest - rest // 8, rest // 8, held_out]
    training, validation, _ = pool.split(sizes, seed=_SPLIT_SEED)
    return training, validation


def _omniglot(settings: Settings) -> tuple[ImageClasses, ImageClasses]:
    pool = data.omniglot(settings.root)
    if settings.split == "test":
        return _two(data.omniglot_split(pool, seed=_SPLIT_SEED))
    training, validation, _ = data.omniglot_split(pool, _SPLIT_SEED, (1028, 172, 423))
    return training, validation


def _mini_imagenet(settings: Settings) -> tuple[ImageClasses, ImageClasses]:
    held_out = "test" if settings.split == "test" else "val"
    return data.mini_imagenet(settings.root, "train"), data.mini_imagenet(settings.root, held_out)


_POOLS: dict[str, Callable[[Settings], tuple[ImageClasses, ImageClasses]]] = {
    "glyphs": _glyphs,
    "omniglot": _omniglot,
    "mini-imagenet": _mini_imagenet,
}


def _two(pools: tuple[ImageClasses, ...]) -> tuple[ImageClasses, ImageClasses]:
    first, second = pools
    return first, second


def _toned(pool: ImageClasses, invert: bool) -> ImageClasses:
    if not invert:
        return pool
    white = 255 if pool.images.dtype == torch.uint8 else 1.0
    return ImageClasses(white - pool.images, pool.names)


def usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"`device` is '{name}', which cannot be used: {reason}") from error
    return device
