import pytest
import torch

from bilevel import ObjectiveError, Proximal, Status, Task, hypergradient, problem_from, solve_inner
from bilevel.solvers import ClosedForm, ImplicitCG, Unrolled
from tests.helpers import randn

F64 = torch.float64


def problem(size=1.0):
    return problem_from(
        lambda z, x, d: 0.5 * size * ((z - d) ** 2).sum(),
        lambda z, x, d: (z**2).sum(),
        Proximal(2.0 * size),
    )


def right(x, d):
    return (d + 2 * x) / 3


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_right_formula_is_converged(size, dtype):
    x, tasks = randn(3).to(dtype), [Task(randn(3, seed=i).to(dtype)) for i in range(2)]
    found = solve_inner(problem(size), x, tasks, inner_solver=ClosedForm(right))
    assert found.status == (Status.CONVERGED,) * 2
    assert torch.equal(found.inner[1], right(x, tasks[1].inner_batch))


def test_a_formula_that_forgot_the_regularizer_is_told_with_its_residual():
    x, d = randn(3), randn(3, seed=1)
    found = solve_inner(problem(), x, Task(d), inner_solver=ClosedForm(lambda x, d: d))
    assert found.status == (Status.MAX_STEPS,)
    torch.testing.assert_close(found.residual[0], (2 * (d - x)).norm())


def test_its_own_tolerance_is_absolute():
    x, d = randn(3), randn(3, seed=1)
    off = ClosedForm(lambda x, d: right(x, d) + 1e-4, tol=1e-2)
    assert solve_inner(problem(), x, Task(d), inner_solver=off).ok
    strict = ClosedForm(off.fn, tol=1e-6)
    assert not solve_inner(problem(), x, Task(d), inner_solver=strict).ok


@pytest.mark.parametrize("method", [ImplicitCG(rtol=1e-12), Unrolled()], ids=repr)
def test_the_formula_gives_the_hypergradient_by_both_routes(method):
    x, d = randn(3), randn(3, seed=1)
    result = hypergradient(problem(), x, Task(d), inner_solver=ClosedForm(right), method=method)
    torch.testing.assert_close(result.gradient, 2 * right(x, d) * 2 / 3, rtol=1e-10, atol=0)
    assert result.ok


def test_a_formula_of_another_shape_is_refused():
    with pytest.raises(ObjectiveError, match=r"\[\(2,\)\].*\[\(3,\)\]"):
        solve_inner(
            problem(),
            randn(3),
            Task(randn(3)),
            inner_solver=ClosedForm(lambda x, d: d[:2]),
        )
