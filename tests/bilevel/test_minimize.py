import math
from collections import deque

import pytest
import torch

from bilevel import (
    ErrorDrivenAccuracy,
    FixedAccuracy,
    OuterStatus,
    Proximal,
    ScheduledAccuracy,
    SolveError,
    Task,
    minimize,
    problem_from,
)
from bilevel.minimize import _remember
from bilevel.problems import Logistic, Quadratic, Ridge
from bilevel.solvers import CG, LBFGS, MINRES, DenseExact, FirstOrder, Implicit, ImplicitCG
from tests.helpers import quadratic, quadratic_task, randn

F64 = torch.float64
POLICIES = [
    ErrorDrivenAccuracy(),
    FixedAccuracy(),
    ScheduledAccuracy("quadratic"),
    ScheduledAccuracy("cubic"),
    ScheduledAccuracy("exponential"),
]


def quadratic_minimum(example):
    """The least outer value of a `Quadratic`, whose F is a quadratic in x, by dense algebra."""
    x = torch.zeros_like(example.outer)
    g0 = example.problem.exact_hypergradient(x, example.task)
    columns = [
        example.problem.exact_hypergradient(e, example.task) - g0
        for e in torch.eye(len(x), dtype=F64)
    ]
    best = torch.linalg.solve(torch.stack(columns, 1), -g0)
    task = example.task
    z = example.problem.solution(best, task.inner_batch)
    return best, float(example.problem.outer_objective(z, best, task.outer_batch))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: repr(p)[:40])
def test_every_policy_reaches_the_minimum(policy):
    example = Quadratic.generated(20, 4, condition=50.0)
    found = minimize(
        example.problem,
        example.outer,
        example.task,
        inner_solver=LBFGS(max_steps=2000),
        method=ImplicitCG(),
        accuracy=policy,
    )
    best, value = quadratic_minimum(example)
    assert abs(found.value - value) < 1e-5 * abs(value)
    if found.status is OuterStatus.CONVERGED:
        torch.testing.assert_close(found.outer, best, rtol=2e-3, atol=2e-3)
    assert found.counts == found.steps[-1].counts
    values = [step.value for step in found.steps]
    assert values[-1] < values[0]
    assert "products" in repr(found)


def test_no_outer_learning_rate_on_any_scale():
    """The same problem in other units needs no other setting."""
    for scale in (1e-3, 1.0, 1e3):
        problem = problem_from(
            lambda z, x, b, scale=scale: 0.5 * ((z - x["a"] / scale) ** 2).sum(),
            lambda z, x, b: ((z - 2.0) ** 2).sum(),
            initial_inner=lambda x, b: torch.zeros_like(x["a"]),
        )
        outer = {"a": torch.zeros(3, dtype=F64)}
        found = minimize(problem, outer, inner_solver=LBFGS(), method=ImplicitCG())
        torch.testing.assert_close(
            found.outer["a"], torch.full((3,), 2.0 * scale, dtype=F64), rtol=1e-2, atol=0
        )
        assert outer["a"].equal(torch.zeros(3, dtype=F64))


def test_the_error_stays_under_its_fraction():
    """The true error of the last hypergradient is below the fraction allowed."""
    example = Quadratic.generated(40, 5, condition=1e3)
    policy = ErrorDrivenAccuracy(fraction=0.3)
    seen = []

    class Watched(type(policy)):
        def controller(self, residual):
            inner = super().controller(residual)
            judge = inner.judge

            def watched(result, gradient):
                verdict = judge(result, gradient)
                if verdict:
                    seen.append(gradient)
                return verdict

            inner.judge = watched
            return inner

    points = []
    found = minimize(
        example.problem,
        example.outer,
        example.task,
        inner_solver=LBFGS(max_steps=3000),
        method=ImplicitCG(),
        accuracy=Watched(0.3),
        callback=points.append,
    )
    assert found.status is OuterStatus.CONVERGED
    # The last hypergradient belongs to the point that was returned.
    exact = example.problem.exact_hypergradient(found.outer, example.task)
    assert (seen[-1] - exact).norm() <= 1.5 * 0.3 * seen[-1].norm()
    assert len(seen) >= len(points)


def test_it_spends_less_than_tight_tolerances():
    example = Quadratic.generated(60, 5, condition=300.0, seed=1)
    settings = {"inner_solver": LBFGS(max_steps=5000), "method": ImplicitCG()}
    adaptive, tight = (
        minimize(example.problem, example.outer, example.task, accuracy=policy, **settings)
        for policy in (None, FixedAccuracy(1e-8, 1e-8))
    )
    assert abs(adaptive.value - tight.value) < 1e-6 * abs(tight.value)
    assert adaptive.counts["products"] < tight.counts["products"]
    assert adaptive.counts["gradients"] < tight.counts["gradients"]


@pytest.mark.parametrize(
    "method", [DenseExact(), Implicit(CG()), Implicit(MINRES())], ids=lambda m: repr(m)[:24]
)
def test_other_implicit_methods(method):
    example = Ridge.example()
    found = minimize(
        example.problem,
        example.outer,
        example.task,
        inner_solver=LBFGS(max_steps=2000),
        method=method,
        max_steps=8,
    )
    assert found.value < 0.95 * found.steps[0].value


def test_stacked_tasks_and_lists_of_shapes():
    example = Logistic.example(tasks=3)
    settings = {"inner_solver": LBFGS(max_steps=2000), "method": ImplicitCG(), "max_steps": 15}
    stacked = minimize(example.problem, example.outer, example.task, **settings)
    listed = minimize(example.problem, example.outer, example.task.unstack(), **settings)
    assert stacked.value < stacked.steps[0].value
    assert math.isclose(stacked.value, listed.value, rel_tol=1e-6)
    shapes = [quadratic_task(n, 3, condition=5.0, seed=n) for n in (4, 6)]
    mixed = minimize(quadratic(), randn(3), shapes, **settings)
    assert mixed.value < mixed.steps[0].value


def test_a_trial_where_the_problem_is_undefined_is_only_a_longer_step():
    problem = problem_from(
        lambda z, x, b: 0.5 * ((z - x) ** 2).sum(),
        lambda z, x, b: (z - x.log()).sum(),
        initial_inner=lambda x, b: torch.zeros_like(x),
    )
    found = minimize(
        problem, torch.full((2,), 5.0, dtype=F64), inner_solver=LBFGS(), method=ImplicitCG()
    )
    torch.testing.assert_close(found.outer, torch.ones(2, dtype=F64), rtol=1e-2, atol=0)


def test_a_problem_that_fails_at_the_start_raises():
    problem = problem_from(
        lambda z, x, b: (x.log() * z).sum() + (z**2).sum(),
        lambda z, x, b: (z**2).sum(),
        initial_inner=lambda x, b: torch.zeros_like(x),
    )
    with pytest.raises(SolveError, match="NON_FINITE"):
        minimize(problem, -torch.ones(2, dtype=F64), inner_solver=LBFGS(), method=ImplicitCG())


def test_steps_run_out():
    example = Ridge.example()
    found = minimize(
        example.problem,
        example.outer,
        example.task,
        inner_solver=LBFGS(max_steps=2000),
        method=ImplicitCG(),
        max_steps=2,
        tol=1e-9,
    )
    assert found.status is OuterStatus.MAX_STEPS
    assert len(found.steps) == 3


def test_a_budget_ends_at_the_step_that_exceeds_it():
    example = Ridge.example()
    place = (example.problem, example.outer, example.task)
    settings = {"inner_solver": LBFGS(max_steps=2000), "method": ImplicitCG(), "max_steps": 6}
    whole = minimize(*place, **settings)
    costs = [step.counts["gradients"] + step.counts["products"] for step in whole.steps]
    assert len(costs) == 7
    found = minimize(*place, **settings, budget=costs[2])
    assert found.status is OuterStatus.BUDGET
    assert costs[2] <= found.counts["gradients"] + found.counts["products"] < costs[4]
    generous = minimize(*place, **settings, budget=10 * costs[-1])
    assert generous.status is whole.status is OuterStatus.MAX_STEPS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": FirstOrder()}, "`method` is FirstOrder.*implicit"),
        ({"tol": 2.0}, "`tol` is 2.0"),
        ({"max_steps": 0}, "`max_steps` is 0"),
        ({"budget": 0}, "`budget` is 0"),
        ({"budget": float("nan")}, "`budget` is nan"),
        ({"budget": "3"}, "`budget` is '3'"),
        ({"inner_solver": 3}, "`inner_solver` is a int"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    settings = {"inner_solver": LBFGS(), "method": ImplicitCG(), **change}
    problem = problem_from(
        lambda z, x, b: 0.5 * (z**2).sum(), lambda z, x, b: z.sum(), Proximal(1.0)
    )
    with pytest.raises(ValueError, match=message):
        minimize(problem, randn(2), Task(), **settings)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ErrorDrivenAccuracy(fraction=0.0), "`fraction` is 0.0"),
        (lambda: ErrorDrivenAccuracy(every=0), "`every` is 0"),
        (lambda: FixedAccuracy(inner=1.0), "`inner` is 1.0"),
        (lambda: ScheduledAccuracy("linear"), "`kind` is 'linear'"),
        (lambda: ScheduledAccuracy(first=-1), "`first` is -1"),
    ],
)
def test_a_wrong_setting_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_sequences_are_those_of_hoag():
    at = {
        kind: [ScheduledAccuracy(kind).at(k) for k in (1, 2, 3)]
        for kind in ("quadratic", "cubic", "exponential")
    }
    assert at["quadratic"] == pytest.approx([0.1, 0.025, 0.1 / 9])
    assert at["cubic"] == pytest.approx([0.1, 0.0125, 0.1 / 27])
    assert at["exponential"] == pytest.approx([0.1, 0.09, 0.081])


def test_a_model_that_a_step_contradicts_is_forgotten():
    # Kept, it would propose the same short step for ever.
    s, up = torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([2.0, 0.0], dtype=F64)
    pairs = deque(maxlen=5)
    _remember(pairs, s, up)
    assert len(pairs) == 1
    _remember(pairs, s, -up)
    assert not pairs
