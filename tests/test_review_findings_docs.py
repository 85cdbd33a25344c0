"""What the first readers of the documentation stumbled over."""

import pytest
import torch

from bilevel import (
    DependenceError,
    SolveError,
    StructureError,
    compare,
    doctor,
    hypergradient,
    problem_from,
)
from bilevel.problems import Cournot
from bilevel.solvers import DenseExact, GradientDescent, ImplicitCG, ProximalGradient


@pytest.mark.parametrize("solver", [GradientDescent, ProximalGradient])
def test_a_rate_to_be_learned_is_refused(solver):
    """Its gradient would be lost in silence."""
    with pytest.raises(ValueError, match=r"`lr`.*requires grad.*would be lost"):
        solver(lr=torch.tensor(0.1, requires_grad=True))


def test_a_lost_dependence_names_the_usual_cause():
    problem = problem_from(
        lambda z, x, _: 0.5 * (z - x.exp().item()).square().sum(),
        lambda z, x, _: z.sum(),
        initial_inner=lambda x, _: torch.zeros(3),
    )
    with pytest.raises(DependenceError, match=r"inner_objective.*\.item\(\)"):
        hypergradient(
            problem,
            torch.tensor(0.3),
            inner_solver=GradientDescent(lr=0.5),
            method=ImplicitCG(),
        )


def test_an_equilibrium_is_sent_to_a_solver_that_can():
    example = Cournot.example()
    with pytest.raises(StructureError, match=r"Implicit\(GMRES\(\)\)"):
        hypergradient(
            example.problem,
            example.outer,
            example.task,
            inner_solver=example.inner_solver,
            method=ImplicitCG(),
        )


def flat_valley():
    return problem_from(
        lambda z, x, _: 0.5 * (z.sum() - x.sum()).square(),
        lambda z, x, _: (z - 1).square().sum(),
        initial_inner=lambda x, _: torch.zeros(2, dtype=torch.float64),
    )


def test_a_singular_hessian_is_named_where_a_dense_solve_fails():
    problem = problem_from(
        lambda z, x, _: 0.5 * (z.sum() - x.sum()).square(),
        lambda z, x, _: z[0].square() + 0.5 * z[1],
        initial_inner=lambda x, _: torch.zeros(2),
    )
    with pytest.raises(SolveError, match="singular"):
        hypergradient(
            problem, torch.ones(1), inner_solver=GradientDescent(lr=0.5), method=DenseExact()
        )


def test_doctor_does_not_ask_for_more_steps_in_a_flat_valley():
    found = doctor(
        flat_valley(),
        torch.ones(1, dtype=torch.float64),
        inner_solver=GradientDescent(lr=0.5, tol=1e-10),
        method=ImplicitCG(),
    )
    names = [one.kind for one in found.findings]
    assert "inner problem not solved" not in names
    assert not found.ok


def test_a_method_that_points_the_wrong_way_gets_no_arrow():
    """One step into a valley of the wrong bend: nothing is accurate, and the best is uphill."""
    problem = problem_from(
        lambda z, x, _: (z.cosh() - x * z).sum(),
        lambda z, x, _: (z - 0.5).square().sum(),
        initial_inner=lambda x, _: torch.zeros_like(x),
    )
    found = compare(
        problem,
        torch.full((2,), 2.0, dtype=torch.float64),
        methods={"CG": ImplicitCG()},
        inner_solver=GradientDescent(lr=0.01, max_steps=1),
    )
    assert found.recommendation.cosine < 0
    assert "points the wrong way (cosine -1.00)" in found.advice
    assert "→" not in str(found)


def test_an_error_without_an_estimate_sends_to_doctor():
    problem = problem_from(
        lambda z, x, _: (z.square() * (z.square() - 2) / 4 - x * z).sum(),
        lambda z, x, _: (z - 0.5).square().sum(),
        initial_inner=lambda x, _: torch.full_like(x, 0.62),
    )
    found = compare(
        problem,
        torch.zeros(1, dtype=torch.float64),
        methods={"CG": ImplicitCG()},
        inner_solver=GradientDescent(lr=0.01, max_steps=1),
    )
    assert "inf" not in found.advice
    assert "`doctor`" in found.advice
