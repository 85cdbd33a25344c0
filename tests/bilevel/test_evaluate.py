"""`evaluate` and `solve_inner`: what needs no hypergradient."""

import pytest
import torch

from bilevel import (
    InPlaceError,
    ObjectiveError,
    Proximal,
    Status,
    Structure,
    Task,
    evaluate,
    hypergradient,
    problem_from,
    solve_inner,
)
from bilevel.problems import FewShot, Ridge, Sinusoid
from bilevel.registry import PROBLEMS
from bilevel.solvers import GMRES, GradientDescent, Implicit, ImplicitCG
from tests.helpers import randn

SOLVER = GradientDescent(0.1, 20)


def fitting(metrics=None):
    def loss(z, x, batch):
        rows, targets = batch
        return ((rows @ z - targets) ** 2).mean()

    return problem_from(loss, loss, Proximal(1.0), metrics=metrics)


def regression(rows, seed, outer_rows=5):
    return Task(
        (randn(rows, 3, seed=seed), randn(rows, seed=seed + 1)),
        (randn(outer_rows, 3, seed=seed + 2), randn(outer_rows, seed=seed + 3)),
    )


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_the_numbers_are_those_of_a_hypergradient(name):
    example = PROBLEMS[name].example()
    symmetric = example.problem.structure.satisfies(Structure.SYMMETRIC)
    method = ImplicitCG() if symmetric else Implicit(GMRES())
    place = (example.problem, example.outer, example.task)
    found = evaluate(*place, inner_solver=SOLVER)
    result = hypergradient(*place, inner_solver=SOLVER, method=method)
    torch.testing.assert_close(found.outer_value, result.outer_value)
    torch.testing.assert_close(found.value, result.inner_value, equal_nan=True)
    assert found.metrics.keys() == result.metrics.keys()
    for key, value in found.metrics.items():
        torch.testing.assert_close(value, result.metrics[key])


@pytest.mark.parametrize("problem", [Ridge, Sinusoid, FewShot])
def test_nothing_has_a_graph(problem):
    example = problem.example()
    found = evaluate(example.problem, example.outer, example.task, inner_solver=SOLVER)
    assert not found.outer_value.requires_grad
    assert not any(value.requires_grad for value in found.metrics.values())


def test_a_list_of_tasks_keeps_its_order():
    problem = fitting(metrics=lambda z, x, batch: {"rows": torch.tensor(float(len(batch[0])))})
    tasks = [regression(rows, 10 * i, i + 2) for i, rows in enumerate((4, 6, 4, 5))]
    x = randn(3)
    together = evaluate(problem, x, tasks, inner_solver=SOLVER)
    assert together.metrics["rows"].tolist() == [2, 3, 4, 5]
    for i, task in enumerate(tasks):
        alone = evaluate(problem, x, task, inner_solver=SOLVER)
        torch.testing.assert_close(together.outer_value[i : i + 1], alone.outer_value)
        torch.testing.assert_close(together.inner[i], alone.inner)
    assert together.ok


def test_a_stack_of_tasks():
    tasks = [regression(4, seed) for seed in (0, 10)]
    found = evaluate(fitting(), randn(3), Task.stack(tasks), inner_solver=SOLVER)
    assert found.outer_value.shape == (2,)
    assert found.inner.shape == (2, 3)
    assert found.metrics == {}


def test_an_inner_solution_needs_no_outer_batch():
    problem, x, task = fitting(), randn(3), regression(4, 0)
    found = solve_inner(problem, x, Task(task.inner_batch), inner_solver=SOLVER)
    whole = solve_inner(problem, x, task, inner_solver=SOLVER)
    torch.testing.assert_close(found.inner, whole.inner)


@pytest.mark.parametrize("first", [True, False])
def test_what_is_evaluated_needs_its_batch(first):
    """Also where the problem was looked at by `solve_inner` before."""
    problem, task = fitting(), Task(regression(4, 0).inner_batch)
    if not first:
        solve_inner(problem, randn(3), task, inner_solver=SOLVER)
    with pytest.raises(ObjectiveError, match=r"came without its `outer_batch`; pass Task\(outer"):
        evaluate(problem, randn(3), task, inner_solver=SOLVER)
    with pytest.raises(ObjectiveError, match="came without its `outer_batch`"):
        hypergradient(problem, randn(3), task, inner_solver=SOLVER, method=ImplicitCG())
    with pytest.raises(ObjectiveError, match="came without its `inner_batch`"):
        solve_inner(problem, randn(3), Task(), inner_solver=SOLVER)


def test_a_type_error_of_the_users_own_is_passed_on():
    def wrong(z, x, batch):
        return z + "1"

    problem = problem_from(wrong, lambda z, x, batch: z.sum(), Proximal(1.0))
    with pytest.raises(TypeError):
        solve_inner(problem, randn(3), Task(torch.ones(1)), inner_solver=SOLVER)


def test_a_float32_start_is_named_among_what_to_convert():
    problem = problem_from(
        lambda z, x, batch: ((z - x) ** 2).sum(),
        lambda z, x, batch: z.sum(),
        initial_inner=lambda x, batch: torch.zeros(3),
    )
    with pytest.raises(ObjectiveError, match=r"`inner` is torch.float32.*`initial_inner` returns"):
        solve_inner(problem, randn(3), inner_solver=SOLVER)


def test_metrics_have_the_same_names_for_every_shape():
    problem = fitting(metrics=lambda z, x, batch: {f"of {len(batch[0])}": z.sum()})
    with pytest.raises(ObjectiveError, match=r"of 5.*of 6.*the same names"):
        evaluate(
            problem,
            randn(3),
            [regression(4, 0, 5), regression(4, 10, 6)],
            inner_solver=SOLVER,
        )


def test_an_objective_may_differentiate_inside_itself():
    def slope(z, x, batch):
        (d,) = torch.autograd.grad((z**3).sum(), z, create_graph=True)
        return (d**2).sum()

    problem = problem_from(lambda z, x, batch: ((z - x) ** 2).sum(), slope, Proximal(1.0))
    x = randn(2)
    result = hypergradient(problem, x, inner_solver=SOLVER, method=ImplicitCG())
    found = evaluate(problem, x, inner_solver=SOLVER)
    torch.testing.assert_close(found.outer_value, result.outer_value)


def test_a_value_that_is_not_finite_is_a_status():
    problem = problem_from(
        lambda z, x, batch: ((z - x) ** 2).sum(),
        lambda z, x, batch: (z.sum() * batch - 1).sqrt(),
        Proximal(1.0),
    )
    tasks = [Task(outer_batch=torch.tensor(v, dtype=torch.float64)) for v in (5.0, 0.0)]
    found = evaluate(problem, torch.ones(2, dtype=torch.float64), tasks, inner_solver=SOLVER)
    assert found.status[0].ok
    assert found.status[1] is Status.NON_FINITE
    assert not found.ok


def test_a_state_of_other_tasks_is_refused():
    tasks = [regression(4, seed) for seed in (0, 10, 20)]
    state = solve_inner(fitting(), randn(3), Task.stack(tasks[:2]), inner_solver=SOLVER).state
    with pytest.raises(ValueError, match=r"`state.inner` is \(2, 3\) but the tasks need \(3, 3\)"):
        evaluate(fitting(), randn(3), Task.stack(tasks), inner_solver=SOLVER, state=state)


def test_a_task_that_failed_begins_anew():
    problem, task, x = fitting(), regression(4, 0), randn(3)
    wild = solve_inner(problem, x, task, inner_solver=GradientDescent(1e200, 20))
    assert wild.status == (Status.NON_FINITE,)
    found = solve_inner(problem, x, task, inner_solver=SOLVER, state=wild.state)
    torch.testing.assert_close(
        found.inner, solve_inner(problem, x, task, inner_solver=SOLVER).inner
    )


def test_metrics_cannot_change_the_solution():
    problem = problem_from(
        lambda z, x, batch: ((z - x) ** 2).sum(),
        lambda z, x, batch: z.sum(),
        Proximal(1.0),
        metrics=lambda z, x, batch: {"twice": z.mul_(2.0).sum()},
    )
    x = randn(2)
    kept = solve_inner(problem, x, inner_solver=SOLVER).inner
    found = evaluate(problem, x, inner_solver=SOLVER)
    torch.testing.assert_close(found.inner, kept)
    torch.testing.assert_close(found.state.inner[0][0], kept)


def test_a_batch_that_is_changed_is_noticed():
    calls = []

    def counting(z, x, batch):
        calls.append(1)
        return z.sum() * (batch.mul_(2.0) if len(calls) > 2 else batch).sum()

    problem = problem_from(lambda z, x, batch: ((z - x) ** 2).sum(), counting, Proximal(1.0))
    with pytest.raises(InPlaceError, match="changed a batch"):
        evaluate(problem, randn(2), Task(outer_batch=randn(1)), inner_solver=SOLVER)


def test_metrics_of_other_shapes_are_named():
    problem = fitting(metrics=lambda z, x, batch: {"residuals": batch[0] @ z - batch[1]})
    tasks = [regression(4, 0, 5), regression(4, 10, 6)]
    with pytest.raises(ObjectiveError, match=r"\(5,\).*\(6,\).*0-d tensors"):
        evaluate(problem, randn(3), tasks, inner_solver=SOLVER)


@pytest.mark.parametrize("error", [AttributeError("no attribute 'foo'"), TypeError()])
def test_what_has_nothing_to_do_with_the_batch_is_passed_on(error):
    def wrong(z, x, batch):
        raise error

    problem = problem_from(wrong, lambda z, x, batch: z.sum(), Proximal(1.0))
    with pytest.raises(type(error)):
        solve_inner(problem, randn(3), inner_solver=SOLVER)
