import pytest
import torch

from bilevel import StructureError, hypergradient
from bilevel.problems import Equilibrium
from bilevel.pytree import tree_map
from bilevel.solvers import (
    GMRES,
    DenseExact,
    GradientDescent,
    Implicit,
    ImplicitCG,
    NeumannSeries,
    Unrolled,
)


def compute(example, method, inner_solver=None):
    return hypergradient(
        example.problem,
        example.outer,
        example.task,
        inner_solver=inner_solver or example.inner_solver,
        method=method,
    )


@pytest.mark.parametrize("tasks", [None, 2])
@pytest.mark.parametrize(
    "method",
    [
        DenseExact(),
        Implicit(GMRES(max_steps=200, rtol=1e-12)),
        # The adjoint fixed-point iteration v ← (DW)ᵀv + ∂_z f.
        NeumannSeries(terms=200, scale=1.0),
    ],
    ids=lambda method: type(method).__name__,
)
def test_methods_meet_the_formula(method, tasks, relative_error):
    example = Equilibrium.generated(tasks=tasks, seed=2)
    found = compute(example, method)
    assert found.ok
    assert relative_error(found.gradient, example.gradient) <= 1e-9


def test_unrolled_fixed_point_iteration_meets_the_formula(relative_error):
    example = Equilibrium.generated(seed=2)
    found = compute(example, Unrolled(), GradientDescent(lr=1.0, max_steps=150))
    assert relative_error(found.gradient, example.gradient) <= 1e-9


def test_jacobian_is_not_symmetric_and_says_so(inner_hessian):
    example = Equilibrium.example()
    with pytest.raises(StructureError, match="GENERAL"):
        compute(example, ImplicitCG())
    inner = compute(example, DenseExact()).inner
    jacobian = inner_hessian(example.problem, example.outer, example.task, inner)
    slopes = (1 - inner**2).unsqueeze(-1)
    blocks = torch.eye(6, dtype=inner.dtype) - slopes * example.outer["W"]
    torch.testing.assert_close(jacobian, torch.block_diag(*blocks))


def test_descent_fits_the_targets():
    example = Equilibrium.generated()
    outer = example.outer
    first = compute(example, DenseExact()).outer_value
    for _ in range(40):
        gradient = example.problem.exact_hypergradient(outer, example.task)
        outer = tree_map(lambda x, g: x - 0.1 * g, outer, gradient)
    last = hypergradient(
        example.problem,
        outer,
        example.task,
        inner_solver=example.inner_solver,
        method=DenseExact(),
    )
    assert last.ok
    assert last.outer_value < 0.3 * first


@pytest.mark.parametrize("setting", [{"norm": 1.0}, {"units": 0}, {"inputs": 0}])
def test_settings_are_checked(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Equilibrium.generated(**setting)
