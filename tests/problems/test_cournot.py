import pytest
import torch

from bilevel import StructureError, hypergradient
from bilevel.problems import Cournot
from bilevel.solvers import GMRES, DenseExact, Implicit, ImplicitCG, NeumannSeries


def compute(example, method):
    return hypergradient(
        example.problem,
        example.outer,
        example.task,
        inner_solver=example.inner_solver,
        method=method,
    )


@pytest.mark.parametrize("tasks", [None, 3])
@pytest.mark.parametrize("firms", [2, 8, 30])
def test_methods_meet_the_formula(tasks, firms, relative_error):
    example = Cournot.generated(firms, tasks, seed=1)
    methods = [
        DenseExact(),
        Implicit(GMRES(max_steps=200, rtol=1e-12)),
        NeumannSeries(terms=800, scale=1 / example.lipschitz),
    ]
    for method in methods:
        found = compute(example, method)
        assert found.ok
        assert relative_error(found.gradient, example.gradient) <= 1e-9


def test_no_firm_gains_by_moving_alone():
    example = Cournot.example()
    batch = example.task.inner_batch
    quantities = example.problem.equilibrium(example.outer, batch)
    assert (quantities > 0).all()

    def profit(i, quantity):
        moved = quantities.clone()
        moved[i] = quantity
        price = batch["demand"] * torch.exp(-moved.sum() / batch["scale"])
        cost = batch["cost"][i] * quantity + 0.5 * batch["slope"][i] * quantity**2
        return price * quantity - cost - example.outer[i] * quantity

    for i, quantity in enumerate(quantities):
        others = torch.linspace(0.0, 3.0, 301, dtype=torch.float64)
        assert profit(i, quantity) >= max(profit(i, other) for other in others)


def test_jacobian_is_that_of_the_game(inner_hessian):
    example = Cournot.example()
    batch = example.task.inner_batch
    inner = example.problem.equilibrium(example.outer, batch)
    written = example.problem.jacobian(inner, batch)
    found = inner_hessian(example.problem, example.outer, example.task, inner)
    torch.testing.assert_close(found, written)
    assert (written - written.mT).norm() > 0.1
    with pytest.raises(StructureError, match="GENERAL"):
        compute(example, ImplicitCG())


def test_descent_taxes_the_dirtiest_firms_most():
    example = Cournot.example()
    outer = example.outer
    first = compute(example, DenseExact())
    for _ in range(100):
        outer = outer - 1.0 * example.problem.exact_hypergradient(outer, example.task)
    last = hypergradient(
        example.problem,
        outer,
        example.task,
        inner_solver=example.inner_solver,
        method=DenseExact(),
    )
    assert last.outer_value < first.outer_value
    emissions = example.task.outer_batch["emissions"]
    assert torch.corrcoef(torch.stack([outer, emissions]))[0, 1] > 0.5


def test_settings_are_checked():
    with pytest.raises(ValueError, match="firms"):
        Cournot.generated(firms=1)
