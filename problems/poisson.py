r"""Poisson regression of counts whose every feature has its own weight decay.

$$g(x, w) = \frac1N \sum_i \left(e^{a_i^\top w} - y_i\, a_i^\top w\right), \qquad
  r(x, w) = \tfrac12 \sum_j e^{x_j} w_j^2$$

with counts $y_i = 0, 1, 2, \dots$; f is the same mean loss on the validation rows. This is the
log-linear model of McCullagh and Nelder (1989, chapter 6), less a constant. The inner Hessian
$A^\top \mathrm{diag}(e^{Aw}) A / N + \mathrm{diag}(e^x)$ varies with $w$ without a bound: an inner
error shows in a hypergradient as in few other problems.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.problem import BilevelProblem, Structure
from bilevel.registry import PROBLEMS
from bilevel.regularizer import Proximal
from bilevel.solvers import LBFGS
from bilevel.task import Task

from .analytic import eigenvalue_bounds, tasks_of
from .example import Example
from .linear_data import linear_data
from .seeding import generator

__all__ = ["Poisson"]

_NEWTON_STEPS = 50


@PROBLEMS.register("poisson")
class Poisson(BilevelProblem):
    """Log-linear regression of counts with one log-weight of decay per feature.

    The inner variable is w ``[features]``, the outer variable x ``[features]``; batches are
    (A ``[rows, features]``, y ``[rows]``).

    Example:
        >>> from bilevel import solve_inner
        >>> example = Poisson.generated(features=6, informative=2, rows=20)
        >>> solve_inner(
        ...     example.problem, example.outer, example.task, inner_solver=example.inner_solver
        ... ).ok
        True
    """

    structure = Structure.POSITIVE_DEFINITE

    def __init__(self) -> None:
        self.regularizer = Proximal(torch.exp, center=torch.zeros_like)

    def __repr__(self) -> str:
        return "Poisson()"

    def predict(self, inner: Tensor, outer: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Logarithms of the rates, Aw ``[rows]``."""
        return batch[0] @ inner

    def loss(self, prediction: Tensor, outer: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean negative log-likelihood, less a constant."""
        return (prediction.exp() - batch[1] * prediction).mean()

    def outer_objective(self, inner: Tensor, outer: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The same on the validation rows."""
        return self.loss(self.predict(inner, outer, batch), outer, batch)

    def metrics(
        self, inner: Tensor, outer: Tensor, batch: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """``deviance`` on the outer batch, the mean over rows; 0 is a perfect fit."""
        log_rate, counts = self.predict(inner, outer, batch), batch[1]
        own = torch.special.xlogy(counts, counts) - counts
        return {"deviance": 2 * (own - counts * log_rate + log_rate.exp()).mean()}

    def hessian(self, inner: Tensor, outer: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The regularised inner Hessian ``[features, features]``, float64."""
        a, w = batch[0].double(), inner.double()
        return (a.mT * (a @ w).exp()) @ a / len(a) + outer.double().exp().diag()

    def solution(self, outer: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """w*(x) ``[features]`` of one task by Newton's method, float64."""
        (a, y), weights = (t.double() for t in batch), outer.double().exp()
        w = torch.zeros_like(weights)
        for _ in range(_NEWTON_STEPS):
            gradient = a.mT @ ((a @ w).exp() - y) / len(a) + weights * w
            w = w - torch.linalg.solve(self.hessian(w, outer, batch), gradient)
        return w

    @classmethod
    def generated(
        cls,
        features: int = 30,
        informative: int = 5,
        rows: int = 100,
        validation_rows: int = 100,
        signal: float = 0.7,
        spread: float = 1.0,
        tasks: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        log_weight: float = -2.0,
    ) -> Example:
        """Random counts, their log-rate a sum of the first ``informative`` features.

        Args:
            features: Number of features.
            informative: Number of features with a nonzero coefficient.
            rows: Training rows, N.
            validation_rows: Validation rows.
            signal: Standard deviation of the log-rate.
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
                (seed, i, "poisson"),
            )
            rates = (signal * drawn.signal).exp()
            y = torch.poisson(rates, generator=generator(seed, i, "counts")).to(dtype)
            x = drawn.features.to(dtype)
            data.append(Task((x[:rows], y[:rows]), (x[rows:], y[rows:]), key=i))
        task = data[0] if tasks is None else Task.stack(data)
        outer = torch.full((features,), log_weight, dtype=dtype)
        problem = cls()
        bounds = eigenvalue_bounds(
            problem.hessian(w, outer, one.inner_batch)
            for one in tasks_of(task)
            for w in (torch.zeros_like(outer), problem.solution(outer, one.inner_batch))
        )
        return Example(
            problem,
            outer,
            task,
            LBFGS(max_steps=1000, tol=1e-10 if dtype == torch.float64 else 2e-6),
            lipschitz=bounds[1],
            mu=bounds[0],
            note=f"Poisson regression, {informative} informative features of {features}",
        )

    @classmethod
    def example(
        cls, *, tasks: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> Example:
        """A small instance; see `Example`."""
        return cls.generated(
            8, 3, 40, 40, spread=2.0, tasks=tasks, seed=seed, dtype=dtype, log_weight=-1.0
        )
