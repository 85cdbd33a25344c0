r"""Ridge regression whose every feature has its own weight decay, learned on validation data.

$$g(x, w) = \tfrac{1}{2N} \|Xw - y\|^2, \qquad r(x, w) = \tfrac12 \sum_j e^{x_j} w_j^2, \qquad
  f(x, w) = \tfrac{1}{2N_v} \|X_v w - y_v\|^2$$

The weighted decay is the proximal regularizer of strength $e^x$ around zero. With
$H = X^\top X / N + \mathrm{diag}(e^x)$

$$w^\star(x) = H^{-1} X^\top y / N, \qquad \frac{dF}{dx_j} = -e^{x_j} w^\star_j v_j, \qquad
  H v = X_v^\top (X_v w^\star - y_v) / N_v.$$
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.certificate import Smoothness
from bilevel.problem import BilevelProblem, Structure
from bilevel.registry import PROBLEMS
from bilevel.regularizer import Proximal
from bilevel.solvers import ClosedForm
from bilevel.task import Task, TaskBatch

from .analytic import eigenvalue_bounds, mean_over_tasks, tasks_of
from .example import Example
from .linear_data import linear_data

__all__ = ["Ridge"]


@PROBLEMS.register("ridge")
class Ridge(BilevelProblem):
    """Linear regression with one log-weight of decay per feature.

    The inner variable is w ``[features]``, the outer variable x ``[features]``; batches are
    (X ``[rows, features]``, y ``[rows]``).

    Example:
        >>> example = Ridge.generated(features=6, informative=2, rows=20)
        >>> example.gradient.shape
        torch.Size([6])
    """

    structure = Structure.POSITIVE_DEFINITE

    def __init__(self) -> None:
        self.regularizer = Proximal(torch.exp, center=torch.zeros_like)

    def __repr__(self) -> str:
        return "Ridge()"

    def predict(self, inner: Tensor, outer: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Xw ``[rows]``."""
        return batch[0] @ inner

    def loss(self, prediction: Tensor, outer: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Half the mean squared error."""
        return 0.5 * ((prediction - batch[1]) ** 2).mean()

    def outer_objective(self, inner: Tensor, outer: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Half the mean squared error on the validation rows."""
        return self.loss(self.predict(inner, outer, batch), outer, batch)

    def metrics(
        self, inner: Tensor, outer: Tensor, batch: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """``mse``, the mean squared error on the outer batch."""
        return Ridge.evaluate(self, inner, outer, batch)[1]

    def evaluate(
        self, inner: Tensor, outer: Tensor, batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Half the mean squared error on the validation rows, and ``mse``."""
        value = self.outer_objective(inner, outer, batch)
        return value, {"mse": 2 * value.detach()}

    def smoothness(self, outer: Tensor, task: Task) -> Smoothness:
        """Constants where the inner objective is no larger than at w = 0; the loss is convex."""
        targets = task.inner_batch[1].double()
        strength = outer.detach().double().exp()
        # Half the mean square of the targets is the objective at w = 0.
        largest = strength.sqrt().max() * targets.square().mean().sqrt()
        return Smoothness(
            # ∂ₓ∂_w G = diag(eˣ w), and ½ Σ eˣ w² is at most the objective at w = 0.
            cross_norm=largest.item(),
            outer_gradient=_mean_square(task.outer_batch[0].double()),
            cross=strength.max().item(),
        )

    def solution(self, outer: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """w*(x) ``[features]`` of one task, for `ClosedForm`; in float64, differentiable."""
        features, targets = (tensor.double() for tensor in batch)
        moment = features.mT @ targets / len(targets)
        w: Tensor = torch.linalg.solve(self.hessian(outer, batch), moment)
        return w.to(batch[0].dtype)

    def hessian(self, outer: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The regularised inner Hessian XᵀX / N + diag(eˣ) ``[features, features]``, float64."""
        features = batch[0].double()
        return features.mT @ features / len(features) + outer.double().exp().diag()

    def exact_hypergradient(self, outer: Tensor, task: Task | TaskBatch) -> Tensor:
        """dF/dx ``[features]`` by dense float64 solves, the weighted mean over tasks."""
        x = outer.detach().double()
        return mean_over_tasks(lambda one: self._hypergradient(x, one), task).to(outer.dtype)

    def _hypergradient(self, x: Tensor, task: Task) -> Tensor:
        inner, outer = task.inner_batch, task.outer_batch
        train = (inner[0].double(), inner[1].double())
        features, targets = outer[0].double(), outer[1].double()
        w = self.solution(x, train)
        rhs = features.mT @ (features @ w - targets) / len(targets)
        v: Tensor = torch.linalg.solve(self.hessian(x, train), rhs)
        return -x.exp() * w * v

    @classmethod
    def generated(
        cls,
        features: int = 50,
        informative: int = 5,
        rows: int = 60,
        validation_rows: int = 60,
        noise: float = 0.5,
        spread: float = 1.0,
        tasks: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        log_weight: float = -2.0,
    ) -> Example:
        """Random regression data: only the first ``informative`` of the features matter.

        Args:
            features: Number of features.
            informative: Number of features with a nonzero coefficient.
            rows: Training rows, N.
            validation_rows: Validation rows, N_v.
            noise: Standard deviation of the noise; that of the signal is 1.
            spread: Ratio of the largest column scale to the smallest; task i of k has
                ``spread ** ((i + 1) / k)``.
            tasks: Number of stacked tasks; None: one `Task`.
            seed: Seed of everything random; the global generator is not touched.
            dtype: Of data and outer variable. The exact hypergradient is that of the rounded data.
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
                (seed, i, "ridge"),
            )
            targets = drawn.signal + noise * drawn.noise
            x, y = drawn.features.to(dtype), targets.to(dtype)
            data.append(Task((x[:rows], y[:rows]), (x[rows:], y[rows:]), key=i))
        task = data[0] if tasks is None else Task.stack(data)
        outer = torch.full((features,), log_weight, dtype=dtype)
        problem = cls()
        bounds = eigenvalue_bounds(
            problem.hessian(outer, one.inner_batch) for one in tasks_of(task)
        )
        return Example(
            problem,
            outer,
            task,
            ClosedForm(problem.solution),
            lipschitz=bounds[1],
            mu=bounds[0],
            gradient=problem.exact_hypergradient(outer, task),
            note=f"ridge regression, {informative} informative features of {features}",
        )

    @classmethod
    def example(
        cls, *, tasks: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> Example:
        """A small instance; see `Example`."""
        return cls.generated(12, 3, 20, 20, spread=3.0, tasks=tasks, seed=seed, dtype=dtype)


def _mean_square(features: Tensor) -> float:
    """The largest eigenvalue of XᵀX / N."""
    values: Tensor = torch.linalg.eigvalsh(features.mT @ features / len(features))
    return float(values[-1])
