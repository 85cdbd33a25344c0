"""Ways to a hypergradient of few-shot tasks, searched: what each setting costs, and its true error.

One run of an optimizer, or one inner solution, serves all that may follow it, so that hundreds of
settings cost minutes; what is found that way is to be timed again as a whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from by_hand import conjugate_gradients
from peers import torchopt_implicit
from torch import Tensor

from bilevel import TaskBatch, errors, hypergradient, solve_inner
from bilevel.experiments.few_shot import Accuracy, Job
from bilevel.inner_solver import InnerSolver
from bilevel.pytree import tree_leaves, tree_map
from bilevel.solvers import LBFGS, HessianFree, ImplicitCG

__all__ = ["FULL", "QUICK", "TARGET", "Choice", "Grid", "Setting", "Tried", "clocked"]

TARGET = 0.01
# What is dearer than the cheapest by so much cannot become the fastest.
MARGIN = 1.15
Params = dict[str, Tensor]
Leaves = tuple[Tensor, ...]
Engine = Literal["batched", "loop"]


@dataclass(frozen=True)
class Choice:
    """A peer's settings: an optimizer, its steps, and steps of conjugate gradients."""

    optimizer: str
    options: Mapping[str, Any]
    steps: int
    products: int

    @property
    def line(self) -> str:
        """What stays while the steps grow."""
        words = {"momentum": "momentum", "lr": "lr", "history_size": "history"}
        options = [f"{words[k]}={v:.2g}" for k, v in self.options.items() if k in words]
        return f"{self.optimizer}({', '.join(options)})"

    def __str__(self) -> str:
        return f"{self.line}, {self.steps} steps, {self.products} CG steps"


@dataclass(frozen=True)
class Tried:
    """One setting as the search met it.

    Attributes:
        family: Whose it is.
        line: What its curve in the picture shares.
        choice: The whole of it, in words.
        seconds: What it took.
        error: Its true relative error.
        most: Whether no larger budget is tried.
        run: Computes the hypergradient.
        peer: The same, where it is a loop by hand.
    """

    family: str
    line: str
    choice: str
    seconds: float
    error: float
    most: bool
    run: Callable[[], Any]
    peer: Choice | None = None

    @property
    def reached(self) -> bool:
        """Whether it is as exact as asked."""
        return self.error <= TARGET


@dataclass(frozen=True)
class Grid:
    """What is searched.

    Attributes:
        rates: Learning rates of momentum, as shares of 1 / the largest curvature.
        momenta: Its momenta.
        adam: Learning rates of Adam.
        histories: Pairs that L-BFGS keeps.
        first_order_steps: Numbers of steps.
        quasi_newton_steps: Those of L-BFGS.
        products: Numbers of conjugate gradient steps.
        tolerances: The library's, of the inner solver.
        cg_rtols: Those of the directions of `HessianFree`.
        rtols: Those of the adjoint solve.
    """

    rates: tuple[float, ...]
    momenta: tuple[float, ...]
    adam: tuple[float, ...]
    histories: tuple[int, ...]
    first_order_steps: tuple[int, ...]
    quasi_newton_steps: tuple[int, ...]
    products: tuple[int, ...]
    tolerances: tuple[float, ...]
    cg_rtols: tuple[float, ...]
    rtols: tuple[float, ...]

    def kinds(self, largest: float) -> Iterator[tuple[str, str, dict[str, Any], tuple[int, ...]]]:
        """Family, optimizer, its options, and the numbers of steps to look at."""
        for history in self.histories:
            options: dict[str, Any] = {"history_size": history, "tolerance_grad": 0.0}
            options["line_search_fn"] = "strong_wolfe"
            yield "hand-lbfgs", "LBFGS", options, self.quasi_newton_steps
        for momentum in self.momenta:
            for share in self.rates:
                options = {"lr": share / largest, "momentum": momentum, "nesterov": True}
                yield "hand-first-order", "SGD", options, self.first_order_steps
        for rate in self.adam:
            yield "hand-first-order", "Adam", {"lr": rate}, self.first_order_steps


FULL = Grid(
    rates=(0.25, 0.5, 1.0),
    momenta=(0.98, 0.95, 0.9),
    adam=(3e-4, 1e-3),
    histories=(10, 100),
    first_order_steps=(100, 200, 300, 400, 500, 600, 700, 800),
    quasi_newton_steps=(20, 30, 40, 45, 50, 55, 60, 70, 80, 100, 120, 160),
    products=(12, 15, 18, 21, 25, 30),
    tolerances=(0.3, 0.1, 0.07, 0.05, 0.03, 0.01),
    cg_rtols=(0.5, 0.3, 0.1),
    rtols=(4e-3, 2e-3, 1e-3, 5e-4),
)
QUICK = Grid(
    rates=(0.5,),
    momenta=(0.95,),
    adam=(1e-3,),
    histories=(10, 100),
    first_order_steps=(200, 300, 400),
    quasi_newton_steps=(30, 45, 60, 80),
    products=(15, 20, 30),
    tolerances=(0.1, 0.03, 0.01),
    cg_rtols=(0.3,),
    rtols=(3e-3, 1e-3),
)


class Setting:
    """A trained θ and tasks, with the exact hypergradient there."""

    def __init__(self, job: Job, training_steps: int, tasks: int) -> None:
        training = job.trainer().begin(job.outer)
        for step in range(training_steps):
            training.advance(job.training(step))
        self.problem = job.problem
        self.strength = float(job.problem.strength)
        self.theta: Params = tree_map(lambda leaf: leaf.detach().clone(), job.outer)
        held_out: TaskBatch = next(iter(job.held_out_tasks()))
        self.batch = held_out.part(0, tasks)
        self.others = held_out.part(tasks, held_out.count)
        self.tasks = self.batch.unstack()
        exact = hypergradient(
            self.problem,
            tree_map(lambda leaf: leaf.double(), self.theta),
            self.batch.to(torch.float64),
            inner_solver=HessianFree(max_steps=200, tol=1e-10),
            method=ImplicitCG(max_steps=5000, rtol=1e-10),
        )
        if not exact.ok:
            raise SystemExit(f"there is no truth to compare with: {exact.status}")
        self.exact = _vector(exact.gradient)
        self.residual = float(exact.diagnostics.inner.residual.max())
        linear = exact.diagnostics.linear
        assert linear is not None
        assert linear.curvature is not None
        self.smallest, self.largest = (float(one) for one in linear.curvature.mean(0))

    def error(self, gradient: Any) -> float:
        """Relative, of the mean over tasks."""
        return float((_vector(gradient) - self.exact).norm() / self.exact.norm())

    def accuracy(self) -> Accuracy:
        """On the held-out tasks that are not timed, each adapted to near its solution."""
        found = []
        for task in self.others.unstack():
            solver = HessianFree(max_steps=50, tol=0.1)
            solution = solve_inner(self.problem, self.theta, task, inner_solver=solver)
            with torch.no_grad():
                metrics = self.problem.metrics(solution.inner, self.theta, task.outer_batch)
            found.append(metrics["accuracy"])
        return Accuracy.of(torch.stack(found))

    # The library

    def ours(
        self, solver: InnerSolver | None, method: ImplicitCG, engine: Engine, inner: Any = None
    ) -> Callable[[], Params]:
        """One hypergradient of all tasks; without a solver ``inner`` is the solution."""

        def run() -> Params:
            gradient: Params = hypergradient(
                self.problem,
                self.theta,
                self.batch,
                inner_solver=solver,
                inner=inner,
                method=method,
                engine=engine,
            ).gradient
            return gradient

        return run

    def faster_engine(self) -> Engine:
        """Tasks at once or one after the other, whichever is faster here."""
        seconds: dict[Engine, float] = {}
        engines: tuple[Engine, ...] = ("batched", "loop")
        for engine in engines:
            run = self.ours(HessianFree(max_steps=100, tol=0.1), ImplicitCG(rtol=1e-2), engine)
            run()  # the first call is slower
            seconds[engine] = clocked(run)[1]
        return min(seconds, key=lambda one: seconds[one])

    def solved_by_us(self, solver: InnerSolver, engine: Engine) -> Any:
        """The inner solutions of all tasks, stacked."""
        if engine == "batched":
            return solve_inner(self.problem, self.theta, self.batch, inner_solver=solver).inner
        each = [solve_inner(self.problem, self.theta, t, inner_solver=solver) for t in self.tasks]
        return tree_map(lambda *leaves: torch.stack(leaves), *(one.inner for one in each))

    def search_ours(self, grid: Grid, engine: Engine) -> list[Tried]:
        """Every inner solver with every method; one inner solution serves all methods."""
        lines: dict[str, Callable[..., InnerSolver]] = {}
        for rtol in grid.cg_rtols:
            newton = partial(HessianFree, max_steps=100, cg_rtol=rtol)
            lines[f"HessianFree(cg_rtol={rtol:g})"] = newton
            lines[f"HessianFree(cg_rtol={rtol:g}, Gauss-Newton)"] = partial(
                newton, matrix="gauss-newton"
            )
        for memory in (10, 20):
            lines[f"LBFGS(memory={memory})"] = partial(LBFGS, max_steps=500, memory=memory)
        methods = [ImplicitCG(1000, rtol) for rtol in grid.rtols]
        methods.append(ImplicitCG(1000, 1e-3, correct=True))
        found: list[Tried] = []
        for line, make in lines.items():
            for tol in grid.tolerances:
                solver = make(tol=tol)
                z, inner = clocked(partial(self.solved_by_us, solver, engine))
                if inner > MARGIN * _cheapest(found):
                    break
                for method in methods:
                    after = self.ours(None, method, engine, z)
                    try:
                        gradient, linear = clocked(after)
                    except errors.SolveError:
                        continue
                    more = f"CG(rtol={method.rtol:g})" + ", corrected" * method.correct
                    found.append(
                        Tried(
                            "bilevel",
                            line,
                            f"{line}, tol={tol:g}, {more}, {engine}",
                            inner + linear,
                            self.error(gradient),
                            tol == grid.tolerances[-1],
                            self.ours(solver, method, engine),
                        )
                    )
        return found

    # Others

    def loss(self, leaves: Leaves, data: tuple[Tensor, ...]) -> Tensor:
        """Of one task."""
        params = dict(zip(self.theta, leaves, strict=True))
        loss: Tensor = torch.nn.functional.cross_entropy(self.problem.net(params, data[0]), data[1])
        return loss

    def objective(self, z: Leaves, x: Leaves, *data: Tensor) -> Tensor:
        """The inner objective of one task."""
        pull = sum(((a - b) ** 2).sum() for a, b in zip(z, x, strict=True))
        return self.loss(z, data) + 0.5 * self.strength * pull

    def iterates(
        self,
        x: Leaves,
        data: Leaves,
        optimizer: str,
        options: Mapping[str, Any],
        marks: Sequence[int],
    ) -> Iterator[Leaves]:
        """The inner variable after each of those numbers of steps."""
        z = [leaf.detach().clone().requires_grad_() for leaf in x]
        method = getattr(torch.optim, optimizer)(z, **options)

        def closure() -> Tensor:
            method.zero_grad()
            with torch.enable_grad():
                value = self.objective(tuple(z), x, *data)
                torch.autograd.backward(value)
            return value

        for done, mark in zip((0, *marks), marks, strict=False):
            if optimizer == "LBFGS":
                # One call takes many steps; the next goes on from there with the same pairs.
                more = mark - done
                method.param_groups[0].update(max_iter=more, max_eval=25 * more)
                method.step(closure)
            else:
                for _ in range(mark - done):
                    closure()
                    method.step()
            yield tuple(leaf.detach().clone() for leaf in z)

    def adjoints(self, z: Leaves, task: Any, counts: tuple[int, ...]) -> Iterator[list[Tensor]]:
        """The adjoint after each of those numbers of conjugate gradient steps."""
        z = tuple(leaf.detach().requires_grad_() for leaf in z)
        b = torch.autograd.grad(self.loss(z, task.outer_batch), z)
        slope = torch.autograd.grad(self.loss(z, task.inner_batch), z, create_graph=True)
        yield from conjugate_gradients(slope, z, b, self.strength, counts)

    def mean(self, adjoints: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The hypergradient from one adjoint for each task: −∂_x ∂_z G is λ times the identity."""
        sums = [torch.stack(leaves).sum(0) for leaves in zip(*adjoints, strict=True)]
        return [self.strength / len(adjoints) * one for one in sums]

    def solved(self, x: Leaves, data: Leaves, choice: Choice) -> Leaves:
        """The inner variable after all steps."""
        return next(self.iterates(x, data, choice.optimizer, choice.options, (choice.steps,)))

    def by_hand(self, choice: Choice) -> Callable[[], list[Tensor]]:
        """A loop over tasks, as one would write it without a library."""
        x = tuple(leaf.detach() for leaf in self.theta.values())

        def run() -> list[Tensor]:
            adjoints = []
            for task in self.tasks:
                z = self.solved(x, task.inner_batch, choice)
                adjoints.append(next(self.adjoints(z, task, (choice.products,))))
            return self.mean(adjoints)

        return run

    def by_torchopt(self, choice: Choice) -> Callable[[], list[Tensor]]:
        """TorchOpt's implicit gradient around the same steps."""
        gradient = torchopt_implicit(
            self.objective,
            lambda z, x, *data: self.loss(z, data),
            lambda x, *data: self.solved(tuple(t.detach() for t in x), data, choice),
            choice.products,
        )
        tasks = [(task.inner_batch, task.outer_batch) for task in self.tasks]
        return lambda: gradient(list(self.theta.values()), tasks)

    def search_by_hand(self, grid: Grid) -> list[Tried]:
        """Every optimizer after every number of steps, with every number of CG steps."""
        found: list[Tried] = []
        for family, optimizer, options, marks in grid.kinds(self.largest):
            for after in self._along(grid, family, optimizer, options, marks):
                found += after
                mine = [one for one in found if one.family == family]
                if after and after[0].seconds > MARGIN * _cheapest(mine):
                    break
        return found

    def _along(
        self,
        grid: Grid,
        family: str,
        optimizer: str,
        options: Mapping[str, Any],
        marks: tuple[int, ...],
    ) -> Iterator[list[Tried]]:
        """One run of an optimizer, which serves all numbers of steps, until it diverges."""
        x = tuple(leaf.detach() for leaf in self.theta.values())
        runs = [self.iterates(x, t.inner_batch, optimizer, options, marks) for t in self.tasks]
        inner = 0.0
        for mark in marks:
            zs, spent = clocked(partial(_nexts, runs))
            inner += spent
            if not all(leaf.isfinite().all() for z in zs for leaf in z):
                return
            pairs = zip(zs, self.tasks, strict=True)
            solves = [self.adjoints(z, task, grid.products) for z, task in pairs]
            after, linear = [], 0.0
            for products in grid.products:
                adjoints, spent = clocked(partial(_nexts, solves))
                linear += spent
                choice = Choice(optimizer, options, mark, products)
                after.append(
                    Tried(
                        family,
                        choice.line,
                        str(choice),
                        inner + linear,
                        self.error(self.mean(adjoints)),
                        mark == marks[-1],
                        self.by_hand(choice),
                        choice,
                    )
                )
            yield [one for one in after if math.isfinite(one.error)]


def _vector(gradient: Any) -> Tensor:
    return torch.cat([leaf.detach().reshape(-1).double() for leaf in tree_leaves(gradient)])


def _nexts(iterators: Iterable[Iterator[Any]]) -> list[Any]:
    return [next(one) for one in iterators]


def clocked(run: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the seconds it took."""
    started = time.process_time()
    value = run()
    return value, time.process_time() - started


def _cheapest(tried: Iterable[Tried]) -> float:
    """Seconds of the cheapest that reaches the target; infinite where none does."""
    return min((one.seconds for one in tried if one.reached), default=math.inf)
