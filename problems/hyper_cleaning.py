r"""Data hyper-cleaning: one learned weight per training example, some of whose labels are wrong.

$$g(x, W) = \frac1N \sum_i \sigma(x_i)\, \ell(W^\top a_i, y_i), \qquad
  r(x, W) = \tfrac\lambda2 \|W\|^2,$$

$$f(x, W) = \frac1{N_v} \sum_j \ell(W^\top b_j, t_j)$$

with the cross entropy $\ell$ of a softmax: Franceschi, Donini, Frasconi and Pontil (2017, section
5.1), whose weights lie in [0, 1] by projection and here by the logistic function $\sigma$, as in
Lorraine et al. (2020). The inner Hessian lies between $\lambda$ and
$\lambda + \|A^\top \mathrm{diag}(\sigma(x)) A\| / (2N)$ (Böhning, 1992).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel.problem import BilevelProblem, Structure
from bilevel.registry import PROBLEMS
from bilevel.regularizer import Proximal
from bilevel.solvers import LBFGS
from bilevel.task import Task

from .analytic import eigenvalue_bounds, tasks_of
from .class_data import class_data
from .example import Example
from .seeding import generator

__all__ = ["HyperCleaning"]


@PROBLEMS.register("hyper-cleaning")
class HyperCleaning(BilevelProblem):
    """Softmax regression on examples with learned weights, judged on clean ones.

    The inner variable is W ``[features, classes]``, the outer variable x ``[rows]``, the log-odds
    of the weights; batches are (A ``[rows, features]``, y ``[rows]`` int64).

    Args:
        features: Number of features.
        classes: Number of classes.
        strength: λ > 0, the decay of W.

    Example:
        >>> example = HyperCleaning.generated(features=4, classes=3, rows=12, validation_rows=9)
        >>> example.outer.shape
        torch.Size([12])
    """

    structure = Structure.POSITIVE_DEFINITE

    def __init__(self, features: int, classes: int, strength: float = 0.1) -> None:
        if not strength > 0.0:
            raise ValueError(f"`strength` is {strength}; a softmax needs a decay > 0")
        self.features, self.classes, self.strength = features, classes, strength
        self.regularizer = Proximal(
            strength, center=lambda outer: outer.new_zeros(features, classes)
        )

    def __repr__(self) -> str:
        return f"HyperCleaning({self.features}, {self.classes}, strength={self.strength})"

    def predict(self, inner: Tensor, outer: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Logits AW ``[rows, classes]``."""
        return batch[0] @ inner

    def loss(self, prediction: Tensor, outer: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The weighted cross entropy."""
        each = F.cross_entropy(prediction, batch[1], reduction="none")
        return (outer.sigmoid() * each).mean()

    def outer_objective(self, inner: Tensor, outer: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean cross entropy on the clean rows."""
        return F.cross_entropy(self.predict(inner, outer, batch), batch[1])

    def metrics(
        self, inner: Tensor, outer: Tensor, batch: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """``accuracy`` on the outer batch."""
        correct = self.predict(inner, outer, batch).argmax(-1) == batch[1]
        return {"accuracy": correct.to(inner.dtype).mean()}

    @classmethod
    def generated(
        cls,
        features: int = 20,
        classes: int = 4,
        rows: int = 100,
        validation_rows: int = 100,
        corrupted: float = 0.4,
        separation: float = 2.0,
        tasks: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        strength: float = 0.1,
    ) -> Example:
        """Gaussian classes; the first ``corrupted`` of the training rows carry a wrong label.

        Args:
            features: Number of features, of which the last is constant.
            classes: Number of classes.
            rows: Training rows, N.
            validation_rows: Clean rows, N_v.
            corrupted: Share of the training rows with a label drawn from the wrong ones.
            separation: Distance of the centers of the classes from the origin.
            tasks: Number of stacked tasks; None: one `Task`. All share the weights x.
            seed: Seed of everything random; the global generator is not touched.
            dtype: Of data and outer variable.
            strength: λ.

        Raises:
            ValueError: A setting is out of range; it is named.
        """
        if not 0.0 <= corrupted <= 1.0:
            raise ValueError(f"`corrupted` is {corrupted}; it is a share in [0, 1]")
        data = []
        for i in range(1 if tasks is None else tasks):
            a, y = class_data(
                rows + validation_rows, features, classes, separation, (seed, i, "hyper-cleaning")
            )
            wrong = round(corrupted * rows)
            random = generator(seed, i, "corruption")
            shift = torch.randint(1, classes, (wrong,), generator=random)
            y[:wrong] = (y[:wrong] + shift) % classes
            a = a.to(dtype)
            data.append(Task((a[:rows], y[:rows]), (a[rows:], y[rows:]), key=i))
        task = data[0] if tasks is None else Task.stack(data)
        outer = torch.zeros(rows, dtype=dtype)
        weights = outer.double().sigmoid()
        grams = (
            (a.double().mT * weights) @ a.double() / rows
            for a, _ in (one.inner_batch for one in tasks_of(task))
        )
        return Example(
            cls(features, classes, strength),
            outer,
            task,
            LBFGS(max_steps=1000, tol=1e-10 if dtype == torch.float64 else 1e-6),
            lipschitz=eigenvalue_bounds(grams)[1] / 2 + strength,
            mu=strength,
            note=f"softmax regression, {round(100 * corrupted)} % of {rows} labels wrong",
        )

    @classmethod
    def example(
        cls, *, tasks: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> Example:
        """A small instance; see `Example`."""
        return cls.generated(6, 3, 30, 30, tasks=tasks, seed=seed, dtype=dtype)
