"""What a reader found wrong in error estimates, comparisons and adaptive accuracy; mended."""

import pytest
import torch

from bilevel import (
    DependenceError,
    OuterStatus,
    Proximal,
    Task,
    compare,
    hypergradient,
    minimize,
    problem_from,
)
from bilevel.solvers import GradientDescent, ImplicitCG, Unrolled
from tests.helpers import randn

F64 = torch.float64


def test_a_refused_newton_step_is_no_agreement():
    """The residual would grow: the same gradient twice says nothing of its error."""
    problem = problem_from(
        lambda z, x, b: (1 + (z - x) ** 2).sqrt().sum(),
        lambda z, x, b: ((z - 1) ** 2).sum(),
        initial_inner=lambda x, b: torch.zeros_like(x),
    )
    found = compare(
        problem,
        torch.full((40,), 5.0, dtype=F64),
        inner_solver=GradientDescent(0.1, max_steps=10),
        methods={"cg": ImplicitCG(), "unrolled": Unrolled()},
        reference="estimate",
    )
    assert not found.ok
    assert "No error is known" in str(found)


@pytest.mark.parametrize("start", [0.0, 1e-2])
def test_solves_whose_budget_binds_are_never_called_converged(start):
    stiff = torch.tensor([1.0, 100.0, 1e4], dtype=F64)
    problem = problem_from(
        lambda z, x, b: 0.5 * (stiff * z * z).sum(),
        lambda z, x, b: ((z - 1) ** 2).sum(),
        Proximal(1.0),
    )
    found = minimize(
        problem,
        torch.full((3,), start, dtype=F64),
        inner_solver=GradientDescent(1e-4, max_steps=20),
        method=ImplicitCG(),
        max_steps=20,
    )
    assert found.status in (OuterStatus.INACCURATE, OuterStatus.FAILED)


def test_an_outer_objective_out_of_the_graph_is_named():
    problem = problem_from(
        lambda z, x, b: (z**2).sum(), lambda z, x, b: ((z.detach() - 1) ** 2).sum(), Proximal(1.0)
    )
    with pytest.raises(DependenceError, match="`outer_objective` depends neither on"):
        hypergradient(problem, randn(2), inner_solver=GradientDescent(0.3, 5), method=ImplicitCG())


@pytest.mark.parametrize("key", [[0, 1], torch.tensor(0)])
def test_a_key_that_tells_no_task_apart_is_refused(key):
    with pytest.raises(ValueError, match="`key` is a"):
        Task(key=key)
