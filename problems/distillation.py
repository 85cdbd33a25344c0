r"""Data distillation: ridge regression on a few learned rows that teach what many real ones do.

$$g(S, T; W) = \tfrac1{2m} \|SW - T\|^2, \qquad r(W) = \tfrac\lambda2 \|W\|^2, \qquad
  f(W) = \tfrac1{2N} \|XW - Y\|^2$$

with the synthetic rows $S$ and their targets $T$ as the outer variable (Wang, Zhu, Torralba and
Efros, 2018; with ridge regression inside, Nguyen, Chen and Lee, 2021). With
$H = S^\top S / m + \lambda I$

$$W^\star = H^{-1} S^\top T / m, \qquad H V = X^\top (XW^\star - Y) / N,$$

$$\frac{dF}{dS} = -\tfrac1m \left[(SW^\star - T) V^\top + S V W^{\star\top}\right], \qquad
  \frac{dF}{dT} = \tfrac1m S V.$$
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel.problem import BilevelProblem, Structure
from bilevel.pytree import PyTree, tree_map
from bilevel.registry import PROBLEMS
from bilevel.regularizer import Proximal
from bilevel.solvers import ClosedForm
from bilevel.task import Task, TaskBatch

from .analytic import eigenvalue_bounds, mean_over_tasks
from .class_data import class_data
from .example import Example
from .seeding import generator

__all__ = ["Distillation"]

Rows = dict[str, Tensor]


@PROBLEMS.register("distillation")
class Distillation(BilevelProblem):
    """Ridge regression on synthetic rows, judged on real ones.

    The inner variable is W ``[features, classes]``. The outer variable is
    ``{"rows": S [m, features], "targets": T [m, classes]}``. The inner problem has no data; the
    outer batch is (X ``[rows, features]``, y ``[rows]`` int64), whose targets Y are one-hot.

    Args:
        strength: λ > 0, the decay of W.

    Example:
        >>> example = Distillation.generated(features=4, classes=3, rows=30)
        >>> example.outer["rows"].shape
        torch.Size([3, 4])
    """

    structure = Structure.POSITIVE_DEFINITE

    def __init__(self, strength: float = 0.3) -> None:
        if not strength > 0.0:
            raise ValueError(f"`strength` is {strength}; few rows need a decay > 0")
        self.strength = strength
        self.regularizer = Proximal(
            strength, center=lambda outer: torch.zeros_like(outer["rows"].mT @ outer["targets"])
        )

    def __repr__(self) -> str:
        return f"Distillation(strength={self.strength})"

    def predict(self, inner: Tensor, outer: Rows, batch: PyTree) -> Tensor:
        """SW ``[m, classes]``."""
        return outer["rows"] @ inner

    def loss(self, prediction: Tensor, outer: Rows, batch: PyTree) -> Tensor:
        """Half the squared error per synthetic row."""
        return 0.5 * ((prediction - outer["targets"]) ** 2).sum() / len(prediction)

    def outer_objective(self, inner: Tensor, outer: Rows, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Half the squared error per real row."""
        features, labels = batch
        gap = features @ inner - F.one_hot(labels, inner.shape[-1])
        return 0.5 * (gap**2).sum() / len(gap)

    def metrics(
        self, inner: Tensor, outer: Rows, batch: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """``accuracy`` on the real rows."""
        features, labels = batch
        return {"accuracy": ((features @ inner).argmax(-1) == labels).to(inner.dtype).mean()}

    def solution(self, outer: Rows, batch: PyTree = None) -> Tensor:
        """W*(S, T) ``[features, classes]``, for `ClosedForm`; in float64, differentiable."""
        s, t = outer["rows"].double(), outer["targets"].double()
        w: Tensor = torch.linalg.solve(self.hessian(outer), s.mT @ t / len(s))
        return w.to(outer["rows"].dtype)

    def hessian(self, outer: Rows) -> Tensor:
        """H ``[features, features]``, float64; the inner Hessian is one H for each class."""
        s = outer["rows"].double()
        return s.mT @ s / len(s) + self.strength * torch.eye(s.shape[-1]).to(s)

    def exact_hypergradient(self, outer: Rows, task: Task | TaskBatch) -> Rows:
        """The derivatives in S and T by dense float64 solves, the weighted mean over tasks."""
        x = {key: leaf.detach().double() for key, leaf in outer.items()}
        mean = mean_over_tasks(lambda one: self._hypergradient(x, one), task)
        return {key: leaf.to(outer[key].dtype) for key, leaf in mean.items()}

    def _hypergradient(self, x: Rows, task: Task) -> Rows:
        s, t, w = x["rows"], x["targets"], self.solution(x)
        features, labels = task.outer_batch
        features = features.double()
        rhs = features.mT @ (features @ w - F.one_hot(labels, w.shape[-1])) / len(features)
        v: Tensor = torch.linalg.solve(self.hessian(x), rhs)
        return {
            "rows": -((s @ w - t) @ v.mT + s @ v @ w.mT) / len(s),
            "targets": s @ v / len(s),
        }

    @classmethod
    def generated(
        cls,
        features: int = 20,
        classes: int = 4,
        rows: int = 200,
        per_class: int = 1,
        separation: float = 3.0,
        tasks: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        strength: float = 0.3,
    ) -> Example:
        """Gaussian classes; the synthetic rows start as noise with one-hot targets.

        Args:
            features: Number of features, of which the last is constant.
            classes: Number of classes.
            rows: Real rows, N.
            per_class: Synthetic rows for each class.
            separation: Distance of the centers of the classes from the origin.
            tasks: Number of stacked tasks; None: one `Task`. All are to be learned from the same
                synthetic rows.
            seed: Seed of everything random; the global generator is not touched.
            dtype: Of data and outer variable. The exact hypergradient is that of the rounded data.
            strength: λ.

        Raises:
            ValueError: A setting is out of range; it is named.
        """
        if per_class < 1:
            raise ValueError(f"`per_class` is {per_class}; it must be at least 1")
        data = []
        for i in range(1 if tasks is None else tasks):
            x, y = class_data(rows, features, classes, separation, (seed, i, "distillation"))
            data.append(Task(None, (x.to(dtype), y), key=i))
        task = data[0] if tasks is None else Task.stack(data)
        labels = torch.arange(per_class * classes) % classes
        random = generator(seed, "synthetic rows")
        first = torch.randn(len(labels), features, generator=random, dtype=torch.float64)
        outer = tree_map(
            lambda leaf: leaf.to(dtype), {"rows": first, "targets": F.one_hot(labels).double()}
        )
        problem = cls(strength)
        bounds = eigenvalue_bounds([problem.hessian(outer)])
        return Example(
            problem,
            outer,
            task,
            ClosedForm(problem.solution),
            lipschitz=bounds[1],
            mu=bounds[0],
            gradient=problem.exact_hypergradient(outer, task),
            note=f"ridge regression on {len(labels)} synthetic rows, judged on {rows} real ones",
        )

    @classmethod
    def example(
        cls, *, tasks: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> Example:
        """A small instance; see `Example`."""
        return cls.generated(6, 3, 60, tasks=tasks, seed=seed, dtype=dtype, strength=0.5)
