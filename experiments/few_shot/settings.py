"""All that a run depends on."""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, get_args, get_origin, get_type_hints

from bilevel import Kernels

from .learners import LEARNERS

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """A run of few-shot learning; the defaults end above 90 % in minutes on two CPU cores.

    Attributes:
        learner: Name in `LEARNERS`; says where the other settings come from, and nothing else.
        data: ``"glyphs"``, ``"omniglot"`` or ``"mini-imagenet"``.
        root: Folder with the data sets; None: the environment variable ``BILEVEL_DATA``.
        split: Classes to evaluate on: ``"test"``, or ``"validation"``, which are then kept out of
            training.
        ways: Classes per task.
        shots: Support images per class.
        train_shots: Support images per class in training; None: ``shots``.
        queries: Query images per class in training.
        eval_queries: Query images per class in evaluation; None: ``queries``.
        tasks: Tasks per meta-step.
        rotations: Turn classes by multiples of 90°; None: for Omniglot, as is usual.
        invert: Ink is 1 and paper 0, so that the zeros of padding are paper; None: for Omniglot.
        transductive: Batch norm on query images takes the statistics of all of them; otherwise
            those of the support images.
        network: ``"strided"`` or ``"pool"``.
        channels: Channels of each block.
        activation: ``"relu"``, ``"softplus"``, ``"silu"`` or ``"tanh"``.
        norm: ``"batch"``, ``"group"``, ``"layer"``, ``"instance"`` or ``"none"``.
        init: Rule for the initial values: ``"torch"``, or ``"imaml"``, three times as large.
        strength: λ, the pull to θ; its first value where it changes. None: the best that was
            measured, 0.2, and 0.1 from 20 ways on.
        strength_end: λ at the last meta-step, reached by equal factors; None: λ is not scheduled.
        learn_strength: ``"scalar"``, ``"layer"`` or ``"parameter"``; None: λ is not learned.
        strength_lr: Learning rate of log λ; None: 0.6 for a scalar, 0.1 for several, which diverge
            at more. Steps are about as large, so that one λ changes by a factor of about 1.8 at a
            time: θ should not be trained for long at a bad one.
        strength_min: The least λ that is learned. An implicit gradient prices the inner problem as
            if it were solved; few inner steps end long before a small λ acts, so that it asks for
            ever less of it, until the adjoint systems are hopeless.
        adapted: ``"all"`` parameters, or the ``"head"``: the last layer.
        inner_solver: Name of a registered inner solver, or ``"nesterov"``, ``"adam"`` or
            ``"pull-back"``; None: gradient descent, with backtracking unless the method
            differentiates the steps.
        inner_steps: Inner steps.
        inner_lr: Inner learning rate, where the solver has one.
        inner_options: More options of the inner solver.
        method: Name of a registered hypergradient method, or ``"released"`` or ``"reptile"``.
        method_options: Its options.
        plain_test: Adapt to test tasks without the regularizer, by gradient descent.
        lr: Learning rate of Adam on θ.
        lr_schedule: ``"constant"``, or ``"cosine"``, which ends at zero with the last meta-step.
        eps: Adam's ε.
        clip: Clip the hypergradient to this norm; 0: never.
        average: Decay of the moving average of θ that is evaluated; 0: θ itself is.
        steps: Meta-steps.
        minutes: CPU minutes of training; what ends first counts.
        eval_tasks: Tasks to evaluate on.
        probe_every: Look at curvature and exactness every so many meta-steps; 0: never.
        seed: Of initial values and tasks; the split of classes is the same for all.
        device: ``"cpu"``, ``"cuda"``, …
        threads: CPU threads; None: PyTorch's own choice.
        engine: ``"batched"`` or ``"loop"``: tasks at once or one after the other. They differ by
            rounding; ``"auto"`` takes the faster one, which may be another in another process.
        task_chunk: The most tasks at once, which bounds memory; None: all.
        precision: Of the inner steps in training: ``"full"``, ``"tf32"`` or ``"bf16"``; test tasks
            are adapted in full. It needs an inner solver that compares no values, such as
            ``"gradient-descent"``, and a method that does not differentiate the steps.
    """

    learner: str = "imaml"
    data: str = "glyphs"
    root: str | None = None
    split: str = "test"
    ways: int = 5
    shots: int = 1
    train_shots: int | None = None
    queries: int = 10
    eval_queries: int | None = None
    tasks: int = 8
    rotations: bool | None = None
    invert: bool | None = None
    transductive: bool = True
    network: str = "strided"
    channels: int = 32
    activation: str = "relu"
    norm: str = "batch"
    init: str = "torch"
    strength: float | None = None
    strength_end: float | None = None
    learn_strength: str | None = None
    strength_lr: float | None = None
    strength_min: float = 0.1
    adapted: str = "all"
    inner_solver: str | None = None
    inner_steps: int = 16
    inner_lr: float = 0.1
    inner_options: dict[str, Any] = field(default_factory=dict)
    method: str = "cg"
    method_options: dict[str, Any] = field(default_factory=dict)
    plain_test: bool = False
    lr: float = 2e-3
    lr_schedule: str = "cosine"
    eps: float = 1e-8
    clip: float = 2.0
    average: float = 0.99
    steps: int = 300
    minutes: float | None = None
    eval_tasks: int = 600
    probe_every: int = 0
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    engine: str = "batched"
    task_chunk: int | None = None
    precision: str = "full"

    @classmethod
    def of(cls, learner: str = "imaml", /, **given: Any) -> Settings:
        """The settings of a learner, changed by what is given.

        Raises:
            ValueError: There is no such learner or setting.
        """
        if learner not in LEARNERS:
            raise ValueError(f"there is no learner '{learner}'; known: {', '.join(LEARNERS)}")
        names = [one.name for one in fields(cls)]
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(f"there is no setting '{unknown[0]}'; known: {', '.join(names)}")
        settings = cls(learner=learner, **{**LEARNERS[learner].settings, **given})
        return settings.checked()

    def checked(self) -> Settings:
        """The settings with nothing left open, if they fit each other.

        Raises:
            ValueError: One is out of range, or two exclude each other.
        """
        if self.strength is None:
            return replace(self, strength=_best_strength(self.ways)).checked()
        for one in fields(self):
            _check_type(one.name, getattr(self, one.name))
        for name, lowest in _LEAST.items():
            if getattr(self, name) is not None and getattr(self, name) < lowest:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it is at least {lowest}")
        choices = {
            "split": ("test", "validation"),
            "adapted": ("all", "head"),
            "lr_schedule": ("constant", "cosine"),
            "learn_strength": (None, "scalar", "layer", "parameter"),
            "engine": ("auto", "batched", "loop"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                words = ", ".join(str(one) for one in known)
                raise ValueError(f"`{name}` is '{getattr(self, name)}'; known: {words}")
        self.kernels  # noqa: B018  # it checks its own
        if self.strength_end is not None:
            if self.learn_strength is not None:
                raise ValueError("λ is learned or scheduled, not both: drop `strength_end`")
            if not (self.strength > 0 and self.strength_end > 0):
                raise ValueError("a scheduled λ changes by equal factors: both ends must be > 0")
        least = self.strength_min
        if not least > 0:
            raise ValueError(f"`strength_min` is {least}; λ is learned by its logarithm")
        if self.learn_strength is not None and self.strength < least:
            raise ValueError(
                f"`strength` is {self.strength}, below `strength_min` = {least}, to "
                "which the first meta-step would set it; start higher, or lower the bound"
            )
        if not 0.0 <= self.average < 1.0:
            raise ValueError(f"`average` is {self.average}; it lies in [0, 1), 0 for none")
        drawn = self.data == "omniglot"
        steps = "gradient-descent" if self.method == "unrolled" else "backtracking-descent"
        usual: dict[str, Any] = {
            "rotations": drawn,
            "invert": drawn,
            "train_shots": self.shots,
            "eval_queries": self.queries,
            "inner_solver": steps,
            "strength_lr": 0.6 if self.learn_strength == "scalar" else 0.1,
        }
        return replace(self, **{k: v for k, v in usual.items() if getattr(self, k) is None})

    @property
    def kernels(self) -> Kernels:
        """How the hypergradients of training are computed."""
        return Kernels(precision=self.precision)  # type: ignore[arg-type]  # it checks them

    @classmethod
    def read(cls, name: str, text: str) -> Any:
        """The value of a setting as a user types it.

        Raises:
            ValueError: There is no such setting, or the text is no value of its type.
        """
        if name not in _TYPES:
            raise ValueError(f"there is no setting '{name}'; known: {', '.join(_TYPES)}")
        kinds, words = _TYPES[name], text.strip().lower()
        if type(None) in kinds and words == "none":
            return None
        if bool in kinds and words in _WORDS:
            return _WORDS[words]
        for kind in (int, float):
            if kind in kinds:
                with contextlib.suppress(ValueError):
                    return kind(text)
        if str in kinds:
            return text.strip()
        raise ValueError(f"`{name}` is '{text}'; write {_expected(name)}")

    def differs_from(self, other: Mapping[str, Any]) -> str | None:
        """The first setting that makes another run than those of ``other``; None if there is none.

        Where and how long a run goes on, and what it is evaluated on, may change.
        """
        free = ["root", "minutes", "threads", "device", "engine", "task_chunk"]
        free += ["eval_tasks", "eval_queries"]
        if self.learn_strength is None:
            free += ["strength_lr", "strength_min"]
        # A run that is older than a setting had what is the default now.
        old = {**asdict(Settings().checked()), **other}
        names = (one.name for one in fields(self) if one.name not in free)
        return next((name for name in names if old[name] != getattr(self, name)), None)


def _best_strength(ways: int) -> float:
    return 0.1 if ways >= 20 else 0.2


# Types of each setting, without what they hold.
_TYPES: dict[str, tuple[type, ...]] = {
    name: tuple(
        get_origin(one) or one
        for one in (get_args(hint) if isinstance(hint, types.UnionType) else (hint,))
    )
    for name, hint in get_type_hints(Settings).items()
}
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_CALLED = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
_LEAST = {
    **dict.fromkeys(("shots", "train_shots", "queries", "eval_queries", "tasks", "channels"), 1),
    **dict.fromkeys(("eval_tasks", "threads", "task_chunk"), 1),
    **dict.fromkeys(("steps", "inner_steps", "probe_every", "clip", "strength", "minutes"), 0),
    "ways": 2,
}


def _check_type(name: str, value: Any) -> None:
    """Raise ValueError unless the value is of the setting's type; a number is one, and finite."""
    kinds = _TYPES[name]
    fine = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if isinstance(value, bool) and bool not in kinds:
        fine = False
    if not fine or (isinstance(value, float) and math.isnan(value)):
        raise ValueError(f"`{name}` is {value!r}; pass {_expected(name)}")


def _expected(name: str) -> str:
    words = [_CALLED.get(kind, kind.__name__) for kind in _TYPES[name] if kind is not type(None)]
    return " or ".join(words + ["none"] * (type(None) in _TYPES[name]))
