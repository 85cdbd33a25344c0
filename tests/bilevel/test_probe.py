import pytest
import torch

from bilevel import (
    DependenceError,
    ObjectiveError,
    Proximal,
    RandomnessError,
    Task,
    hypergradient,
    problem_from,
    solve_inner,
)
from bilevel.solvers import GradientDescent, ImplicitCG
from tests.helpers import randn

F64 = torch.float64
SETTINGS = {"inner_solver": GradientDescent(0.1, 3), "method": ImplicitCG()}


def counting(calls):
    def inner(z, x, batch):
        calls.append(tuple(batch.shape))
        return ((z - x) ** 2).sum() * batch.mean()

    return problem_from(inner, lambda z, x, batch: (z**2).sum(), Proximal(1.0))


def test_the_first_look_happens_once_for_each_problem_and_shape():
    calls = []
    problem = counting(calls)

    def evaluations(n):
        before = len(calls)
        solve_inner(problem, randn(3), Task(torch.ones(n)), inner_solver=GradientDescent(0.1, 0))
        return len(calls) - before

    # The look takes two, to see that they agree.
    assert evaluations(4) == 3
    assert evaluations(4) == 1
    assert evaluations(5) == 3
    assert evaluations(5) == 1


def test_a_second_problem_is_looked_at_too():
    def noisy(z, x, batch):
        return ((z - x) ** 2).sum() + torch.rand(()).double()

    for _ in range(2):
        problem = problem_from(noisy, lambda z, x, batch: z.sum(), Proximal(1.0))
        with pytest.raises(RandomnessError):
            hypergradient(problem, randn(3), **SETTINGS)


def test_a_failed_look_is_repeated():
    problem = problem_from(
        lambda z, x, batch: (z - x) ** 2, lambda z, x, batch: z.sum(), Proximal(1.0)
    )
    for _ in range(2):
        with pytest.raises(ObjectiveError, match="0-d"):
            hypergradient(problem, randn(3), **SETTINGS)


def test_an_inner_objective_that_ignores_inner_is_refused():
    problem = problem_from(
        lambda z, x, batch: (x**2).sum(), lambda z, x, batch: z.sum(), Proximal(1.0)
    )
    with pytest.raises(DependenceError, match="`inner_objective` does not depend on `inner`"):
        hypergradient(problem, randn(3), **SETTINGS)


def test_a_linear_inner_objective_is_taken_with_a_regularizer():
    problem = problem_from(
        lambda z, x, batch: 2.0 * z.sum(), lambda z, x, batch: (z**2).sum(), Proximal(1.0)
    )
    x = randn(3)
    solver = GradientDescent(1.0, 2)
    result = hypergradient(problem, x, inner_solver=solver, method=ImplicitCG())
    torch.testing.assert_close(result.gradient, 2 * (x - 2))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda z, x, b: [z["a"], z["b"]], None),
        (lambda z, x, b: {"a": z["a"] - x, "b": z["b"][:1]}, r"shapes \[\(2,\), \(1,\)\]"),
        (lambda z, x, b: {"a": z["a"] - x}, "shapes"),
        (lambda z, x, b: {"a": (z["a"] - x).float(), "b": z["b"].float()}, "torch.float32"),
        (lambda z, x, b: {"a": x, "b": x}, "does not depend on `inner`"),
    ],
    ids=["another container", "shape", "missing", "dtype", "independent"],
)
@pytest.mark.parametrize("tasks", [1, 2])
def test_a_stationarity_unlike_the_inner_variable_is_refused(value, message, tasks):
    problem = problem_from(
        None,
        lambda z, x, b: z["a"].sum(),
        initial_inner=lambda x, b: {"a": torch.zeros_like(x), "b": torch.zeros_like(x)},
        stationarity=value,
    )
    data = [Task(randn(1, seed=i)) for i in range(tasks)]
    if message is None:
        # A list is flattened in the same order; it is taken.
        solve_inner(problem, randn(2), data, inner_solver=GradientDescent(0.1, 1))
        return
    with pytest.raises((ObjectiveError, DependenceError), match=message):
        solve_inner(problem, randn(2), data, inner_solver=GradientDescent(0.1, 1))


def test_problems_that_define_nothing_say_what_to_write():
    from bilevel import BilevelProblem

    class Empty(BilevelProblem):
        regularizer = Proximal(1.0)

    with pytest.raises(ObjectiveError, match="write `inner_objective`"):
        hypergradient(Empty(), randn(2), **SETTINGS)

    class NoOuter(BilevelProblem):
        regularizer = Proximal(1.0)

        def inner_objective(self, inner, outer, batch):
            return inner.sum()

    with pytest.raises(ObjectiveError, match="defines no `outer_objective`"):
        hypergradient(NoOuter(), randn(2), **SETTINGS)

    class NoStart(NoOuter):
        regularizer = None

        def outer_objective(self, inner, outer, batch):
            return inner.sum()

    with pytest.raises(ObjectiveError, match="define `initial_inner"):
        hypergradient(NoStart(), randn(2), **SETTINGS)


def test_predict_and_loss_make_an_inner_objective():
    from bilevel import BilevelProblem

    class Fit(BilevelProblem):
        regularizer = Proximal(1.0)

        def predict(self, inner, outer, batch):
            return batch @ inner

        def loss(self, prediction, outer, batch):
            return 0.5 * (prediction**2).sum()

        def outer_objective(self, inner, outer, batch):
            return inner.sum()

    data, x = randn(4, 2), randn(2)
    result = hypergradient(
        Fit(),
        x,
        Task(data),
        inner_solver=GradientDescent(0.1, 300),
        method=ImplicitCG(rtol=1e-12),
    )
    want = torch.linalg.solve(data.mT @ data + torch.eye(2, dtype=F64), torch.ones(2, dtype=F64))
    torch.testing.assert_close(result.gradient, want, rtol=1e-8, atol=0)
