"""`Kernels(compile=...)`: the same numbers, and a clear word where it cannot be done."""

from dataclasses import replace

import pytest
import torch

from bilevel import Kernels, Proximal, Task, errors, hypergradient, problem_from
from bilevel.problems import Equilibrium, FewShot, HyperCleaning, Logistic
from bilevel.pytree import tree_map
from bilevel.solvers import GMRES, GradientDescent, HessianFree, Implicit, ImplicitCG

F64 = torch.float64
QUICK = Kernels(compile="aot_eager")  # traces and differentiates as the compiler's front does
METHOD = ImplicitCG(max_steps=5, rtol=0.0)


def both(example, task, kernels=QUICK, **settings):
    settings = {"inner_solver": GradientDescent(lr=0.05, max_steps=3), "method": METHOD, **settings}
    return [
        hypergradient(example.problem, example.outer, task, kernels=one, **settings)
        for one in (None, kernels)
    ]


def agree(wanted, found, rtol=1e-9):
    def leaves(tree):
        return tree.values() if isinstance(tree, dict) else [tree]

    for a, b in zip(leaves(wanted.gradient), leaves(found.gradient), strict=True):
        torch.testing.assert_close(b, a, rtol=rtol, atol=1e-12)
    assert found.status == wanted.status
    torch.testing.assert_close(found.inner_value, wanted.inner_value)
    torch.testing.assert_close(
        found.diagnostics.inner.residual, wanted.diagnostics.inner.residual, rtol=1e-6, atol=1e-12
    )


@pytest.mark.parametrize(
    ("make", "reduction"), [(Logistic, "mean"), (HyperCleaning, "none"), (FewShot, "mean")]
)
def test_the_numbers_are_the_same(make, reduction):
    example = make.example()
    agree(*both(example, example.task, reduction=reduction), rtol=1e-4)


@pytest.mark.parametrize("engine", [{"engine": "loop"}, {"task_chunk": 2}])
def test_stacked_tasks_and_one_after_the_other(engine):
    example = HyperCleaning.example()
    assert isinstance(example.task, Task)
    agree(*both(example, [example.task] * 3, **engine))


def test_the_compiler_and_rounded_steps_go_together():
    example = FewShot.example()
    example = replace(example, outer=tree_map(lambda leaf: leaf.float(), example.outer))
    task = Task.stack([example.task]) if isinstance(example.task, Task) else example.task
    kernels = Kernels(compile="aot_eager", precision="bf16")
    wanted, found = both(example, task.to(torch.float32), kernels=kernels)
    assert found.status == wanted.status
    # Both are rounded, and not in the same places.
    gap = found.diagnostics.inner.residual / wanted.diagnostics.inner.residual - 1
    assert 0 < gap.abs().max() < 0.1


def test_other_inner_solvers_and_estimates():
    example = Logistic.example()
    method = ImplicitCG(rtol=1e-10, error_estimate=True, correct=True, check_minimum=True)
    agree(*both(example, example.task, inner_solver=HessianFree(tol=1e-6), method=method))


def scaled():
    """A problem with an attribute of its own."""

    def inner(z, x, batch):
        return problem.scale * ((z - batch) ** 2).sum() + (z**2 * x).sum()

    problem = problem_from(inner, lambda z, x, batch: z.sum(), Proximal(1.0))
    problem.scale = 1.0
    return problem


def gradient(problem, data, kernels=QUICK):
    x = torch.ones(data.shape[-1], dtype=F64)
    return hypergradient(
        problem,
        x,
        Task(data),
        inner_solver=GradientDescent(lr=0.1, max_steps=2),
        method=METHOD,
        kernels=kernels,
    ).gradient


def test_what_changes_on_the_problem_is_seen():
    problem, data = scaled(), torch.arange(3.0, dtype=F64)
    before = gradient(problem, data)
    problem.scale = 3.0
    after = gradient(problem, data)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, gradient(problem, data, None))


@pytest.mark.slow
def test_many_shapes_are_compiled():
    problem = scaled()
    for n in range(2, 14):
        data = torch.arange(float(n), dtype=F64)
        torch.testing.assert_close(gradient(problem, data), gradient(problem, data, None))


def test_what_the_compiler_cannot_follow_is_refused():
    def inner(z, x, batch):
        if z.detach().sum().item() > 1e9:
            return z.sum()
        return ((z - x) ** 2).sum()

    problem = problem_from(inner, lambda z, x, batch: z.sum(), Proximal(1.0))
    with pytest.raises(errors.ObjectiveError, match=r"cannot be compiled .*compile=False"):
        gradient(problem, torch.zeros(2, dtype=F64))


def test_an_equilibrium_is_refused():
    example = Equilibrium.example()
    with pytest.raises(errors.ObjectiveError, match="an equilibrium has no inner objective"):
        both(example, example.task, method=Implicit(GMRES()))


def test_an_objective_that_cannot_be_stacked_is_refused():
    def inner(z, x, batch):
        return ((z - x) ** 2).sum() if float(batch.detach()) > 0 else (z**2).sum()

    problem = problem_from(inner, lambda z, x, batch: z.sum(), Proximal(1.0))
    tasks = [Task(torch.tensor(1.0, dtype=F64))] * 2
    with (
        pytest.warns(errors.BilevelWarning, match="cannot be stacked"),
        pytest.raises(errors.ObjectiveError, match=r"compil.*engine='loop'"),
    ):
        hypergradient(
            problem,
            torch.ones(2, dtype=F64),
            tasks,
            inner_solver=GradientDescent(lr=0.1, max_steps=2),
            method=METHOD,
            kernels=QUICK,
        )


@pytest.mark.parametrize("value", ["", 1, None])
def test_what_is_no_backend_is_refused(value):
    with pytest.raises(ValueError, match="`compile` is"):
        Kernels(compile=value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
def test_the_default_backend():
    example = HyperCleaning.example()
    agree(*both(example, example.task, kernels=Kernels(compile=True)))
