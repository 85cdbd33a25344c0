r"""Logistic regression whose every feature has its own weight decay, learned on validation data.

$$g(x, w) = \frac1N \sum_i \log\left(1 + e^{-y_i\, a_i^\top w}\right), \qquad
  r(x, w) = \tfrac12 \sum_j e^{x_j} w_j^2$$

with $y_i = \pm 1$; f is the same mean loss on the validation rows. The inner Hessian is
$A^\top D A / N + \mathrm{diag}(e^x)$ with $0 < D_{ii} \le \tfrac14$: strongly convex, without a
closed form. Pedregosa (2016, section 4) learns one weight of decay for all features this way.
"""

from __future__ import annotations

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel.certificate import Smoothness
from bilevel.problem import BilevelProblem, Structure
from bilevel.registry import PROBLEMS
from bilevel.regularizer import Proximal
from bilevel.solvers import LBFGS
from bilevel.task import Task, TaskBatch

from .analytic import tasks_of
from .data.libsvm import libsvm
from .example import Example
from .linear_data import linear_data
from .seeding import generator

__all__ = ["Logistic"]


@PROBLEMS.register("logistic")
class Logistic(BilevelProblem):
    """Binary logistic regression with one log-weight of decay per feature.

    The inner variable is w ``[features]``, the outer variable x ``[features]``; batches are
    (A ``[rows, features]``, y ``[rows]`` of ±1 in the dtype of A).

    Example:
        >>> from bilevel import solve_inner
        >>> example = Logistic.generated(features=6, informative=2, rows=20)
        >>> solve_inner(
        ...     example.problem, example.outer, example.task, inner_solver=example.inner_solver
        ... ).ok
        True
    """

    structure = Structure.POSITIVE_DEFINITE

    def __init__(self) -> None:
        self.regularizer = Proximal(torch.exp, center=torch.zeros_like)

    def __repr__(self) -> str:
        return "Logistic()"

    def predict(self, inner: Tensor, outer: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Log-odds of the label +1, Aw ``[rows]``."""
        return batch[0] @ inner

    def loss(self, prediction: Tensor, outer: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean logistic loss."""
        # logsigmoid is smooth everywhere; softplus passes to a straight line.
        return -F.logsigmoid(batch[1] * prediction).mean()

    def outer_objective(self, inner: Tensor, outer: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean logistic loss on the validation rows."""
        return self.loss(self.predict(inner, outer, batch), outer, batch)

    def metrics(
        self, inner: Tensor, outer: Tensor, batch: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """``accuracy`` on the outer batch."""
        return Logistic.evaluate(self, inner, outer, batch)[1]

    def evaluate(
        self, inner: Tensor, outer: Tensor, batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss on the validation rows and ``accuracy``, from one prediction."""
        prediction = self.predict(inner, outer, batch)
        right = batch[1] * prediction.detach() > 0
        return self.loss(prediction, outer, batch), {"accuracy": right.to(inner.dtype).mean()}

    def smoothness(self, outer: Tensor, task: Task) -> Smoothness:
        """Constants where the inner objective is no larger than at w = 0; the loss is convex."""
        features, _ = (x.double() for x in task.inner_batch)
        strength = outer.detach().double().exp()
        largest = (2 * math.log(2.0) * strength.max()).sqrt()
        third = features.norm(dim=1).max().item() * _mean_square(features) / (6 * math.sqrt(3.0))
        return Smoothness(
            # ∂ₓ∂_w G = diag(eˣ w), and ½ Σ eˣ w² is at most the objective at w = 0.
            cross_norm=largest.item(),
            outer_gradient=_mean_square(task.outer_batch[0].double()) / 4,
            hessian=third,
            cross=strength.max().item(),
        )

    @classmethod
    def generated(
        cls,
        features: int = 50,
        informative: int = 5,
        rows: int = 100,
        validation_rows: int = 100,
        noise: float = 0.5,
        spread: float = 1.0,
        tasks: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        log_weight: float = -3.0,
    ) -> Example:
        """Random data: the sign of a noisy sum of the first ``informative`` features.

        Args:
            features: Number of features.
            informative: Number of features with a nonzero coefficient.
            rows: Training rows, N.
            validation_rows: Validation rows.
            noise: Standard deviation of the noise; that of the signal is 1.
            spread: Ratio of the largest column scale to the smallest; task i of k has
                ``spread ** ((i + 1) / k)``.
            tasks: Number of stacked tasks; None: one `Task`.
            seed: Seed of everything random; the global generator is not touched.
            dtype: Of data and outer variable.
            log_weight: Every entry of the outer variable.

        Raises:
            ValueError: A count is out of range; it is named.
        """
        count = 1 if tasks is None else tasks
        data = []
        for i in range(count):
            drawn = linear_data(
                rows + validation_rows,
                features,
                informative,
                spread ** ((i + 1) / count),
                (seed, i, "logistic"),
            )
            score = drawn.signal + noise * drawn.noise
            x, y = drawn.features.to(dtype), torch.where(score >= 0, 1.0, -1.0).to(dtype)
            data.append(Task((x[:rows], y[:rows]), (x[rows:], y[rows:]), key=i))
        task = data[0] if tasks is None else Task.stack(data)
        note = f"logistic regression, {informative} informative features of {features}"
        return cls._example(task, torch.full((features,), log_weight, dtype=dtype), note)

    @classmethod
    def from_libsvm(
        cls,
        name: str,
        root: str | os.PathLike[str] | None = None,
        *,
        validation: float = 0.5,
        rows: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        log_weight: float = -7.0,
    ) -> Example:
        """A data set in LIBSVM format, split into training and validation rows at random.

        Args:
            name: File name such as "a9a"; see `bilevel.problems.data.libsvm`. The smaller of its
                two labels becomes −1, the larger +1.
            root: Folder of the data; default: that of the environment variable ``BILEVEL_DATA``.
            validation: Share of the rows kept for validation, in (0, 1).
            rows: Use that many rows, chosen at random; None: all.
            seed: Seed of choice and split; the global generator is not touched.
            dtype: Of data and outer variable.
            log_weight: Every entry of the outer variable.

        Raises:
            DataError: The file is missing or malformed.
            ValueError: The labels are not two, or the split leaves a side empty.
        """
        features, targets = libsvm(name, root, dtype=dtype)
        values = targets.unique()
        if len(values) != 2:
            raise ValueError(
                f"`name` is '{name}', whose rows have {len(values)} different labels; logistic "
                "regression takes a data set with two"
            )
        labels = torch.where(targets == values[1], 1.0, -1.0).to(dtype)
        order = torch.randperm(len(labels), generator=generator(seed, "split"))[:rows]
        split = round(len(order) * (1.0 - validation))
        if not 0 < split < len(order):
            raise ValueError(
                f"`validation` is {validation}, which leaves one side of {len(order)} rows empty; "
                "pass a share such as 0.5"
            )
        train, held_out = order[:split], order[split:]
        task = Task((features[train], labels[train]), (features[held_out], labels[held_out]))
        outer = torch.full((features.shape[1],), log_weight, dtype=dtype)
        return cls._example(task, outer, f"logistic regression on {name}")

    @classmethod
    def example(
        cls, *, tasks: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> Example:
        """A small instance; see `Example`."""
        return cls.generated(
            10, 3, 30, 30, spread=3.0, tasks=tasks, seed=seed, dtype=dtype, log_weight=-2.0
        )

    @classmethod
    def _example(cls, task: Task | TaskBatch, outer: Tensor, note: str) -> Example:
        weights = outer.double().exp()
        largest = 0.0
        for one in tasks_of(task):
            features = one.inner_batch[0]
            gram = features.mT @ features / len(features)
            largest = max(largest, torch.linalg.eigvalsh(gram.double())[-1].item())
        tol = 1e-10 if outer.dtype == torch.float64 else 1e-6
        return Example(
            cls(),
            outer,
            task,
            LBFGS(max_steps=1000, tol=tol),
            lipschitz=largest / 4 + weights.max().item(),
            mu=weights.min().item(),
            note=note,
        )


def _mean_square(features: Tensor) -> float:
    """The largest eigenvalue of XᵀX / N."""
    values: Tensor = torch.linalg.eigvalsh(features.mT @ features / len(features))
    return float(values[-1])
