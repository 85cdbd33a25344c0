"""Defects that a fresh reader found in `Kernels` and its neighbours, each with its reproduction."""

import copy
import pickle

import pytest
import torch

from bilevel import (
    BilevelProblem,
    Kernels,
    Proximal,
    Task,
    TaskBatch,
    Trainer,
    errors,
    hypergradient,
    problem_from,
)
from bilevel.problems import Logistic, Ridge
from bilevel.solvers import LBFGS, GradientDescent, ImplicitCG

F64 = torch.float64
QUICK = Kernels(compile="aot_eager")
STEPS = GradientDescent(lr=0.1, max_steps=50)


def run(problem, task=None, kernels=QUICK, outer=None, **settings):
    outer = torch.zeros(3, dtype=F64) if outer is None else outer
    settings = {"inner_solver": STEPS, "method": ImplicitCG(), **settings}
    return hypergradient(problem, outer, task, kernels=kernels, **settings)


def square(z, x, batch):
    return (z**2).sum()


class Shifted(BilevelProblem):
    """An inner solution that an attribute moves."""

    regularizer = Proximal(1.0)

    def __init__(self, target=1.0):
        self.target = target

    def inner_objective(self, inner, outer, batch):
        return ((inner - self.target) ** 2).sum()

    def outer_objective(self, inner, outer, batch):
        return (inner**2).sum()


class Squared(torch.autograd.Function):
    """Its second derivative is lost in what is compiled."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 2 * x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, while it traces
def test_a_second_derivative_that_the_compiler_loses_is_refused():
    problem = problem_from(
        lambda z, x, b: Squared.apply(z - 1).sum() + ((z - x) ** 2).sum(), square, Proximal(1.0)
    )
    for _ in range(2):
        with pytest.raises(errors.ObjectiveError, match=r"the compiled Hessian product of .*away"):
            run(problem)


def test_a_copy_of_a_problem_compiles_its_own():
    problem = Shifted(1.0)
    run(problem)
    for copied in (copy.deepcopy(problem), copy.copy(problem)):
        copied.target = 5.0
        torch.testing.assert_close(run(copied).inner, run(copied, kernels=None).inner)
    torch.testing.assert_close(run(problem).inner, run(problem, kernels=None).inner)


def test_a_compiled_problem_is_pickled():
    problem = Shifted(1.0)
    run(problem)
    again = pickle.loads(pickle.dumps(problem))
    torch.testing.assert_close(run(again).inner, run(problem).inner)


def test_an_objective_set_anew_is_compiled_anew():
    problem = problem_from(lambda z, x, b: ((z - 1) ** 2).sum(), square, Proximal(1.0))
    run(problem)
    problem.inner_objective = lambda z, x, b: ((z - 5) ** 2).sum()
    torch.testing.assert_close(run(problem).inner, run(problem, kernels=None).inner)


class Config:
    def __init__(self, target):
        self.target = target

    def __repr__(self):
        return "Config()"


def test_what_the_compiler_would_take_for_a_constant_is_refused():
    problem = problem_from(
        lambda z, x, b: ((z - b[1].target) ** 2).sum() + b[0].sum(), square, Proximal(1.0)
    )
    batch = TaskBatch(inner_batch=[torch.ones(1, 3, dtype=F64), Config(1.0)])
    with pytest.raises(errors.ObjectiveError, match=r"the batch holds a Config.*compile=False"):
        run(problem, batch)


@pytest.mark.parametrize("change", ["entry", "data"])
def test_other_data_in_the_same_batch_are_seen(change):
    problem = problem_from(lambda z, x, b: ((z - b["t"]) ** 2).sum(), square, Proximal(1.0))
    data = {"t": torch.ones(1, 3, dtype=F64)}
    batch = TaskBatch(inner_batch=data)
    run(problem, batch, None)
    new = torch.full((1, 3), 5.0, dtype=F64)
    if change == "entry":
        data["t"] = new
    else:
        data["t"].data = new
    wanted = run(problem, TaskBatch(inner_batch={"t": new}), None).inner
    torch.testing.assert_close(run(problem, batch, None).inner, wanted)


def test_a_failure_leaves_autograd_as_it_was():
    def inner(z, x, b):
        found = torch.utils.checkpoint.checkpoint(
            lambda q: torch.tanh(q @ b) ** 2, z, use_reentrant=False
        )
        return found.sum() + ((z - x) ** 2).sum()

    problem = problem_from(inner, square, Proximal(1.0))
    task = Task(torch.eye(3, dtype=F64))
    wanted = run(problem, task, None).gradient
    with pytest.raises(errors.ObjectiveError, match="cannot be compiled"):
        run(problem, task)
    torch.testing.assert_close(run(problem, task, None).gradient, wanted)
    with torch.autograd.graph.save_on_cpu():
        pass


def test_a_start_that_is_a_solution_is_no_disagreement():
    generator = torch.Generator().manual_seed(0)
    features = 3 * torch.randn(200, 30, generator=generator)
    task = Task((features, torch.randn(200, generator=generator)))
    problem = problem_from(
        lambda z, x, b: (
            torch.nn.functional.softplus(-b[1] * (b[0] @ z)).mean() + 0.05 * ((z - x) ** 2).sum()
        ),
        square,
        initial_inner=lambda x, b: torch.zeros_like(x),
    )
    outer = torch.zeros(30)
    solver = LBFGS(max_steps=300, tol=1e-6)
    solved = run(problem, task, None, outer, inner_solver=solver).inner
    run(problem, task, QUICK, outer, inner=solved)


def test_a_task_that_is_not_finite_does_not_fail_the_others():
    problem = problem_from(lambda z, x, b: ((z - b) ** 2).sum(), square, Proximal(1.0))
    tasks = [Task(torch.full((3,), value, dtype=F64)) for value in (1.0, float("nan"))]
    assert run(problem, tasks).status == run(problem, tasks, None).status


@pytest.mark.slow
def test_an_attribute_that_never_rests_is_told():
    problem = Shifted()

    def change():
        for i in range(40):
            problem.target = 1.0 + i
            run(problem)

    with pytest.raises(errors.ObjectiveError, match="pass what changes between calls as a tensor"):
        change()


def test_an_unknown_backend_and_a_sparse_batch_are_refused():
    problem = problem_from(lambda z, x, b: (b @ z).square().sum(), square, Proximal(1.0))
    sparse = Task(torch.eye(3, dtype=F64).to_sparse_coo())
    with pytest.raises(errors.ObjectiveError, match=r"layout torch.sparse_coo.*compile=False"):
        run(problem, sparse)
    with pytest.raises(errors.ObjectiveError, match=r"nonsense.*name of a backend"):
        run(problem, Task(torch.eye(3, dtype=F64)), Kernels(compile="nonsense"))


@pytest.mark.parametrize("base", [Ridge, Logistic])
def test_an_evaluation_may_ask_for_the_metrics(base):
    class Own(base):
        def evaluate(self, inner, outer, batch):
            metrics = {**self.metrics(inner, outer, batch), "sum": inner.sum()}
            return self.outer_objective(inner, outer, batch), metrics

    example = base.example()
    found = run(Own(), example.task, None, example.outer, inner_solver=example.inner_solver)
    assert "sum" in found.metrics
    assert len(found.metrics) == 2


def test_a_distance_is_that_of_the_point_at_the_time():
    problem = problem_from(lambda z, x, b: ((z - 1) ** 4).sum(), square, Proximal(1.0))
    solver = GradientDescent(lr=1e-3, max_steps=20)
    outer = torch.full((3,), 3.0)
    wanted = run(problem, None, None, outer, inner_solver=solver).diagnostics.inner_distance
    found = run(problem, None, None, outer, inner_solver=solver)
    found.inner.mul_(1000)
    torch.testing.assert_close(found.diagnostics.inner_distance, wanted)


@pytest.mark.parametrize("kernels", ["bf16", Kernels, {}])
def test_what_is_no_kernels_is_refused(kernels):
    with pytest.raises(ValueError, match=r"`kernels` is .*pass Kernels"):
        run(Shifted(), None, kernels)
    with pytest.raises(ValueError, match=r"`kernels` is .*pass Kernels"):
        Trainer(
            Shifted(),
            inner_solver=STEPS,
            method=ImplicitCG(),
            optimizer=lambda leaves: torch.optim.SGD(leaves, lr=0.1),
            kernels=kernels,
        )


def test_an_evaluation_of_the_wrong_kind_is_refused():
    problem = Shifted()
    problem.evaluate = lambda inner, outer, batch: (inner**2).sum()
    with pytest.raises(errors.ObjectiveError, match="`evaluate` returned a Tensor"):
        run(problem, None, None)
    with pytest.raises(ValueError, match="`refine` is 'yes'"):
        ImplicitCG(refine="yes")
