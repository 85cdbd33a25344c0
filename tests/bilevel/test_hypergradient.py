import dataclasses

import pytest
import torch

from bilevel import Hypergradient, Proximal, Status, Task, TaskBatch, hypergradient, problem_from
from bilevel.solvers import GradientDescent, ImplicitCG, Unrolled
from tests.helpers import quadratic, quadratic_task, randn

F64 = torch.float64
GD = GradientDescent(0.9, 30)
CG = ImplicitCG(rtol=1e-8)


def run(task=None, x=None, **kwargs):
    settings = {"inner_solver": GD, "method": CG, **kwargs}
    task = quadratic_task(3) if task is None else task
    return hypergradient(quadratic(), randn(3) if x is None else x, task, **settings)


def two_leaves():
    return problem_from(
        lambda z, x, batch: 0.5 * ((z - x["a"] * x["b"]) ** 2).sum(),
        lambda z, x, batch: (z**2).sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x["a"]),
    )


def test_set_grad_writes_the_gradient_for_any_optimizer():
    x = {"a": randn(3).requires_grad_(), "b": torch.tensor(2.0, dtype=F64, requires_grad=True)}
    result = hypergradient(two_leaves(), x, inner_solver=GD, method=CG)
    result.set_grad(x)
    assert torch.equal(x["a"].grad, result.gradient["a"])
    before = x["a"].detach().clone()
    torch.optim.SGD(list(x.values()), lr=0.1).step()
    torch.testing.assert_close(x["a"].detach(), before - 0.1 * result.gradient["a"])


def test_set_grad_replaces_and_does_not_share():
    x = randn(3).requires_grad_()
    result = run(x=x)
    result.set_grad(x)
    result.set_grad(x)
    assert torch.equal(x.grad, result.gradient)
    x.grad.zero_()
    assert result.gradient.abs().sum() > 0


@pytest.mark.parametrize(
    "other",
    [lambda: {"x": randn(3)}, lambda: randn(4), lambda: [randn(3), randn(3)]],
    ids=["structure", "shape", "number"],
)
def test_set_grad_refuses_another_variable(other):
    with pytest.raises(ValueError, match="`outer` differs"):
        run().set_grad(other())


def test_set_grad_refuses_per_task_gradients():
    with pytest.raises(ValueError, match="reduction='mean'"):
        run(reduction="none").set_grad(randn(3))


@pytest.mark.parametrize("method", [CG, Unrolled()], ids=repr)
def test_counts_are_summed_over_tasks(method):
    one = run(method=method).diagnostics.counts
    three = run([quadratic_task(3, seed=i) for i in range(3)], method=method).diagnostics.counts
    assert three["gradients"] == 3 * one["gradients"]
    assert one["gradients"] == 30 + 1


def test_the_first_look_is_not_counted():
    problem = quadratic()
    counts = [
        hypergradient(
            problem, randn(3), quadratic_task(3), inner_solver=GD, method=CG
        ).diagnostics.counts
        for _ in range(2)
    ]
    assert counts[0] == counts[1]


def test_a_result_describes_itself():
    text = repr(run())
    assert text.startswith("Hypergradient(1 task, worst status")
    assert "inner residual" in text
    assert "linear residual" in text
    assert "linear" not in repr(run(method=Unrolled()))
    assert run(inner_solver=GradientDescent(0.9, 500, tol=1e-9)).summary().startswith("task 0: CON")


def test_results_are_frozen():
    result = run()
    assert isinstance(result, Hypergradient)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.gradient = None


def test_ok_wants_every_task_and_both_solves():
    assert run().ok
    assert not run(inner_solver=GradientDescent(0.9, 2, tol=1e-9)).ok
    assert not run(method=ImplicitCG(max_steps=1, rtol=1e-9)).ok
    mixed = run(
        [quadratic_task(3, condition=1.0), quadratic_task(3, condition=1e3)],
        inner_solver=GradientDescent(0.9, 50, tol=1e-9),
    )
    assert mixed.status == (Status.CONVERGED, Status.MAX_STEPS)
    assert not mixed.ok
    assert mixed.diagnostics.failed == ()


def test_values_are_those_of_the_objectives_at_the_solution():
    task, x = quadratic_task(3), randn(3)
    result = run(task, x)
    f = quadratic().outer_objective(result.inner, x, task.outer_batch)
    g = quadratic().inner_objective(result.inner, x, task.inner_batch)
    torch.testing.assert_close(result.outer_value, f[None])
    torch.testing.assert_close(result.inner_value, g[None])


def test_the_inner_value_includes_the_regularizer():
    problem = problem_from(
        lambda z, x, batch: (z**2).sum(), lambda z, x, batch: z.sum(), Proximal(4.0)
    )
    x = randn(2)
    result = hypergradient(problem, x, inner_solver=GradientDescent(0.1, 5), method=CG)
    z = result.inner
    torch.testing.assert_close(result.inner_value[0], (z**2).sum() + 2 * ((z - x) ** 2).sum())


def test_the_same_call_gives_the_same_bits():
    tasks = [quadratic_task(5, condition=50.0, seed=i) for i in range(3)]
    first, second = (run(tasks, randn(5)) for _ in range(2))
    assert torch.equal(first.gradient, second.gradient)
    assert torch.equal(first.state.inner[0], second.state.inner[0])


def test_a_state_is_detached_and_continues_the_inner_solve():
    task, x = quadratic_task(3, condition=30.0), randn(3)
    half = run(task, x, inner_solver=GradientDescent(0.9, 10))
    full = run(task, x, inner_solver=GradientDescent(0.9, 10), state=half.state)
    want = run(task, x, inner_solver=GradientDescent(0.9, 20))
    torch.testing.assert_close(full.inner, want.inner, rtol=1e-12, atol=0)
    assert not any(z.requires_grad for z in half.state.inner)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reduction": "sum"}, "`reduction` is 'sum'"),
        ({"method": ImplicitCG}, r"`method` is a ImplicitCG \(a class\)"),
        ({"method": "cg"}, "`method` is a str"),
        ({"inner_solver": "gd"}, "`inner_solver` is a str"),
        ({"inner_solver": None}, "no `inner` is given"),
        ({"task": torch.ones(3)}, "`task` is a Tensor"),
        ({"task": []}, "empty list"),
        ({"task": [torch.ones(3)]}, r"`task\[0\]` is a Tensor"),
        ({"x": {}}, "`outer` holds no tensor"),
        ({"x": {"w": 1.0}}, r"`outer\['w'\]` is a float"),
    ],
    ids=str,
)
def test_arguments_of_the_wrong_kind_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(**kwargs)


def test_a_problem_of_the_wrong_kind_is_named():
    with pytest.raises(ValueError, match="`problem` is a function"):
        hypergradient(lambda z: z, randn(3), inner_solver=GD, method=CG)


def test_a_start_for_another_number_of_tasks_is_refused():
    tasks = [quadratic_task(3, seed=i) for i in range(2)]
    with pytest.raises(ValueError, match="`inner` holds 3 tasks but `task` holds 2"):
        run(Task.stack(tasks), inner=torch.zeros(3, 3, dtype=F64))
    with pytest.raises(ValueError, match="one point per task"):
        run(tasks, inner=torch.zeros(2, 3, dtype=F64))


def test_a_state_of_other_tasks_is_refused():
    state = run([quadratic_task(3), quadratic_task(4, 3)]).state
    with pytest.raises(ValueError, match="`state` holds 2 groups"):
        run(state=state)
    with pytest.raises(ValueError, match=r"`state\.inner` is"):
        run([quadratic_task(3, seed=i) for i in range(2)], state=run().state)


def test_the_mean_weighs_tasks_of_a_batch():
    tasks = [quadratic_task(3, seed=i) for i in range(2)]
    stacked = Task.stack(tasks)
    weighted = TaskBatch(stacked.inner_batch, stacked.outer_batch, weights=torch.tensor([1.0, 3.0]))
    each = run(stacked, reduction="none").gradient
    torch.testing.assert_close(run(weighted).gradient, (each[0] + 3 * each[1]) / 4)


def test_a_task_may_be_left_out_for_a_problem_without_data():
    problem = problem_from(
        lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        lambda z, x, batch: z.sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x),
    )
    result = hypergradient(problem, randn(2), inner_solver=GD, method=CG)
    torch.testing.assert_close(result.gradient, torch.ones(2, dtype=F64))
