"""Time of one implicit hypergradient of small problems, beside a loop by hand and other libraries.

    python benchmarks/small_problems.py [--full] [--threads 1] [--out benchmarks/results]

Every variant starts at the exact inner solution and takes the same number of conjugate gradient
steps, in float64, and is checked for computing the same before it is timed: ridge and logistic
regression with a decay for each feature (2,000 rows, 500 features, 20 steps), with ``--full`` also
sparse logistic regression (10,000 features). *Fixed cost* is what is left where there is nothing to
compute: 3 variables and one step. JAXopt is compiled, and runs in the same process. *Steps* begins
at zero instead, and takes 200 steps of gradient descent on logistic regression (200 rows, 50
features) and 5 of conjugate gradients. Where the data are dense, the library also runs with
``Kernels(compile=True)``.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import torch
import torch.nn.functional as F
from arguments import arguments
from peers import installed, jaxopt_implicit, torchopt_implicit
from timing import Times, alternate
from torch import Tensor

from bilevel import BilevelProblem, Kernels, Task, hypergradient
from bilevel.experiments.results import Row, write_results
from bilevel.problems import Logistic, Ridge
from bilevel.solvers import LBFGS, GradientDescent, ImplicitCG

F64 = torch.float64
RATE = 0.5
SAME = 1e-8
REPEATS = 5
COMPILER: bool | str = True
Data = tuple[Tensor, Tensor]
JaxLoss = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Setting:
    """A problem at its inner solution.

    Attributes:
        problem: As the library sees it.
        loss: ``(Aw, y) -> scalar``, as others see it; the decay ``½ Σ exp(x) w²`` is added.
        jax_loss: ``(numpy, Aw, y) -> scalar``, the same for JAX, given its ``numpy``.
        training: A and y.
        validation: A and y.
        outer: x.
        steps: Steps of conjugate gradients.
        descent: Steps of gradient descent from zero; 0: start at the inner solution.
        inner: The inner solution, found here.
    """

    problem: BilevelProblem
    loss: Callable[[Tensor, Tensor], Tensor]
    jax_loss: JaxLoss
    training: Data
    validation: Data
    outer: Tensor
    steps: int
    descent: int = 0
    inner: Tensor = field(init=False)

    def __post_init__(self) -> None:
        found = hypergradient(
            self.problem,
            self.outer,
            Task(self.training, self.validation),
            inner_solver=LBFGS(tol=1e-9, max_steps=500),
            method=ImplicitCG(max_steps=1, rtol=0.0),
        )
        object.__setattr__(self, "inner", found.inner)

    def objective(self, w: Tensor, x: Tensor, data: Data) -> Tensor:
        """The inner objective, decay included."""
        return self.loss(data[0] @ w, data[1]) + 0.5 * (x.exp() * w**2).sum()

    def variants(self) -> dict[str, Callable[[], Tensor]]:
        """All that compute the hypergradient here."""
        out = {"hand": self.by_hand, "bilevel": self.ours()}
        strided = self.training[0].layout == torch.strided
        if strided:
            out["bilevel-compiled"] = self.ours(Kernels(compile=COMPILER))
        if installed("torchopt"):
            out["torchopt"] = self.by_torchopt()
        if installed("jaxopt") and strided and not self.descent:
            out["jaxopt"] = jaxopt_implicit(
                self.jax_loss, self.inner, self.outer, self.training, self.validation, self.steps
            )
        return out

    def ours(self, kernels: Kernels | None = None) -> Callable[[], Tensor]:
        """The library."""
        task = Task(self.training, self.validation)
        method = ImplicitCG(max_steps=self.steps, rtol=0.0)
        solver = GradientDescent(RATE, self.descent) if self.descent else None
        inner = None if self.descent else self.inner

        def run() -> Tensor:
            found = hypergradient(
                self.problem,
                self.outer,
                task,
                inner_solver=solver,
                inner=inner,
                method=method,
                kernels=kernels,
            )
            gradient: Tensor = found.gradient
            return gradient

        return run

    def solved(self) -> Tensor:
        """Where differentiation happens: the inner solution, or where gradient descent ends."""
        if not self.descent:
            return self.inner
        w = torch.zeros_like(self.inner)
        for _ in range(self.descent):
            w.requires_grad_()
            with torch.enable_grad():
                objective = self.objective(w, self.outer, self.training)
                (slope,) = torch.autograd.grad(objective, w)
            w = w.detach() - RATE * slope
        return w

    def by_hand(self) -> Tensor:
        """What one would write without a library, nothing checked."""
        w, x = (one.detach().requires_grad_() for one in (self.solved(), self.outer))
        (b,) = torch.autograd.grad(self.loss(self.validation[0] @ w, self.validation[1]), w)
        (slope,) = torch.autograd.grad(self.objective(w, x, self.training), w, create_graph=True)
        v, r, p, rr = torch.zeros_like(b), b, b, b @ b
        for _ in range(self.steps):
            (ap,) = torch.autograd.grad(slope, w, p, retain_graph=True)
            step = rr / (p @ ap)
            v, r = v + step * p, r - step * ap
            new = r @ r
            p, rr = r + new / rr * p, new
        return -torch.autograd.grad(slope, x, v)[0]

    def by_torchopt(self) -> Callable[[], Tensor]:
        """TorchOpt's implicit gradient at the given solution."""

        def inner(z: tuple[Tensor, ...], x: tuple[Tensor, ...], *data: Tensor) -> Tensor:
            return self.objective(z[0], x[0], (data[0], data[1]))

        def outer(z: tuple[Tensor, ...], x: tuple[Tensor, ...], *data: Tensor) -> Tensor:
            return self.loss(data[0] @ z[0], data[1])

        gradient = torchopt_implicit(inner, outer, lambda x, *data: (self.solved(),), self.steps)
        return lambda: gradient([self.outer], [(self.training, self.validation)])[0]


def half_mean_square(prediction: Tensor, y: Tensor) -> Tensor:
    """The loss of ridge regression."""
    return 0.5 * ((prediction - y) ** 2).mean()


def logistic(prediction: Tensor, y: Tensor) -> Tensor:
    """The loss of logistic regression, y = ±1."""
    return -F.logsigmoid(y * prediction).mean()


def jax_half_mean_square(numpy: Any, prediction: Any, y: Any) -> Any:
    """The loss of ridge regression, for JAX."""
    return 0.5 * ((prediction - y) ** 2).mean()


def jax_logistic(numpy: Any, prediction: Any, y: Any) -> Any:
    """The loss of logistic regression, for JAX."""
    return numpy.logaddexp(0.0, -y * prediction).mean()


def settings(full: bool) -> dict[str, Setting]:
    """All problems by name."""
    ridge = (Ridge(), half_mean_square, jax_half_mean_square)
    classes = (Logistic(), logistic, jax_logistic)
    out = {
        "ridge": _setting(*ridge, 2000, 500, 20),
        "logistic": _setting(*classes, 2000, 500, 20),
        "fixed-cost": _setting(*ridge, 5, 3, 1),
        "steps": _setting(*classes, 200, 50, 5, descent=200),
    }
    if full:
        out["sparse-logistic"] = _setting(*classes, 2000, 10_000, 20, density=1e-3)
    return out


def _setting(
    problem: BilevelProblem,
    loss: Callable[[Tensor, Tensor], Tensor],
    jax_loss: JaxLoss,
    rows: int,
    features: int,
    steps: int,
    density: float = 1.0,
    descent: int = 0,
) -> Setting:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(features, dtype=F64, generator=generator)

    def draw() -> Data:
        a = torch.randn(rows, features, dtype=F64, generator=generator)
        if density < 1.0:
            a = a * (torch.rand(rows, features, generator=generator) < density) / density**0.5
        score = a @ truth / features**0.5 + torch.randn(rows, dtype=F64, generator=generator)
        y = score if isinstance(problem, Ridge) else score.sign()
        return a.to_sparse_coo() if density < 1.0 else a, y

    # H + diag(exp(x)) has a condition number of about 15 there.
    outer = torch.full((features,), math.log(0.2), dtype=F64)
    return Setting(problem, loss, jax_loss, draw(), draw(), outer, steps, descent)


def measure(setting: Setting, rounds: int) -> dict[str, Times]:
    """Seconds of one hypergradient by every variant that computes the same."""
    variants = setting.variants()
    wanted = variants["hand"]()
    for name, run in variants.items():
        gap = float((run() - wanted).norm() / wanted.norm())
        if not gap <= SAME:
            raise SystemExit(f"{name} is {gap:.1e} away from the loop by hand")

    def repeated(run: Callable[[], Tensor]) -> Callable[[], None]:
        def some() -> None:
            for _ in range(REPEATS):
                run()

        return some

    times = alternate({name: repeated(run) for name, run in variants.items()}, rounds)
    return {
        name: Times(tuple(one / REPEATS for one in found.seconds)) for name, found in times.items()
    }


def main() -> None:
    """Measure, print, write."""
    args = arguments(__doc__, "sparse logistic regression, too", rounds=51)
    rows = []
    for name, setting in settings(args.full).items():
        times = measure(setting, args.rounds)
        hand = times["hand"]
        print(f"\n{name}: ms, over the loop by hand, ms more than it")
        for variant, one in times.items():
            more = one.less(hand)
            print(
                f"  {variant:20}{1e3 * one.median:9.3f} ± {1e3 * one.spread * one.median:<7.3f}"
                f"{one.over(hand):6.2f}{1e3 * more:9.3f}"
            )
            where = {"problem": name, "variant": variant}
            rows.append(Row(where, "seconds", one.median))
            rows.append(Row(where, "spread", one.spread))
            rows.append(Row(where, "over_loop_by_hand", one.over(hand)))
            rows.append(Row(where, "seconds_more_than_by_hand", more))
    path = write_results(args.out, "small-problems", sys.argv, rows, seeds=[0])
    print(f"written: {path}")


if __name__ == "__main__":
    main()
