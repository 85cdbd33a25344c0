"""`refine=True`: an ill-conditioned adjoint system in float32, solved to float32."""

import pytest
import torch

from bilevel import Proximal, Task, errors, hypergradient, problem_from
from bilevel.problems import Quadratic, Ridge
from bilevel.solvers import CG, DenseExact, GradientDescent, Implicit, ImplicitCG, NeumannSeries

F64 = torch.float64


def ill_conditioned(kappa, seed=0):
    """Ridge regression in float32 at its solution, whose Hessian has that condition number."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=F64, generator=generator)

    n, rows = 60, 120
    orthogonal, _ = torch.linalg.qr(randn(rows, n))
    spread = kappa ** (0.5 * torch.linspace(0.0, 1.0, n, dtype=F64))
    features = orthogonal * spread * rows**0.5
    truth = randn(n)
    other = randn(rows, n)
    train = (features.float(), (features @ truth + 0.1 * randn(rows)).float())
    held_out = (other.float(), (other @ truth + randn(rows)).float())
    outer = torch.full((n,), -20.0)
    problem, task = Ridge(), Task(train, held_out)
    inner = problem.solution(outer, train)
    exact = hypergradient(
        problem,
        outer.double(),
        Task(*(tuple(x.double() for x in data) for data in (train, held_out))),
        inner_solver=None,
        inner=inner.double(),
        method=DenseExact(),
    ).gradient
    return problem, outer, task, inner, exact


def error(case, method):
    problem, outer, task, inner, exact = case
    found = hypergradient(problem, outer, task, inner_solver=None, inner=inner, method=method)
    return float((found.gradient.double() - exact).norm() / exact.norm()), found


@pytest.mark.parametrize("kappa", [1e3, 1e4, 1e5])
def test_the_adjoint_has_the_digits_of_its_dtype(kappa):
    case = ill_conditioned(kappa)
    plain, before = error(case, ImplicitCG(max_steps=4000, rtol=1e-7))
    refined, after = error(case, ImplicitCG(max_steps=4000, rtol=1e-7, refine=True))
    assert refined < 5e-7
    assert refined < 0.3 * plain
    assert after.diagnostics.linear.residual.item() <= 1e-7
    assert after.diagnostics.linear.status[0].name == "CONVERGED"
    assert before.diagnostics.linear.status[0].name == "MAX_STEPS"


def test_the_residual_reported_is_true_and_costs_are_counted():
    problem, outer, task, inner, _ = case = ill_conditioned(1e4)
    _, found = error(case, ImplicitCG(max_steps=4000, rtol=1e-6, refine=True))
    hessian = problem.hessian(outer, task.inner_batch)
    rows, targets = (x.double() for x in task.outer_batch)
    rhs = rows.mT @ (rows @ inner.double() - targets) / len(targets)
    adjoint = found.state.adjoint[0][0].double()
    # What was returned is rounded to float32, of which the largest eigenvalue makes more.
    rounding = torch.linalg.eigvalsh(hessian).max() * 6e-8 * adjoint.norm() / rhs.norm()
    assert (hessian @ adjoint - rhs).norm() / rhs.norm() <= 1e-6 + rounding
    assert found.diagnostics.counts["gradients"] == 2
    assert found.diagnostics.counts["products"] > found.diagnostics.linear.steps.item()


def test_any_linear_solver_is_refined():
    case = ill_conditioned(1e4)
    for method in (Implicit(CG(max_steps=4000, rtol=1e-7), refine=True), DenseExact(refine=True)):
        assert error(case, method)[0] < 5e-7


def test_nothing_changes_in_float64():
    example = Quadratic.example()
    settings = {"inner_solver": GradientDescent(lr=0.05, max_steps=200)}
    run = [
        hypergradient(
            example.problem,
            example.outer,
            example.task,
            method=ImplicitCG(rtol=1e-9, refine=refine),
            **settings,
        )
        for refine in (False, True)
    ]
    for a, b in zip(*(torch.utils._pytree.tree_leaves(one.gradient) for one in run), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_task_with_negative_curvature_keeps_what_it_has():
    problem = problem_from(
        lambda z, x, batch: 0.5 * (batch * z**2).sum() + (x * z).sum(),
        lambda z, x, batch: z.sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x),
    )
    batch = torch.tensor([[1.0, 2.0], [1.0, -2.0]])
    tasks = [Task(batch[0]), Task(batch[1])]
    runs = [
        hypergradient(
            problem,
            torch.ones(2),
            tasks,
            inner_solver=None,
            inner=[torch.zeros(2)] * 2,
            method=ImplicitCG(refine=refine),
            reduction="none",
        )
        for refine in (False, True)
    ]
    assert [one.name for one in runs[1].diagnostics.linear.status] == ["CONVERGED", "INDEFINITE"]
    torch.testing.assert_close(runs[1].gradient[1], runs[0].gradient[1], rtol=0, atol=0)


def test_what_cannot_be_refined_is_refused():
    with pytest.raises(ValueError, match=r"`damping` is 0\.1 and `refine` True"):
        ImplicitCG(damping=0.1, refine=True)
    with pytest.raises(ValueError, match="`refine` needs a tolerance"):
        NeumannSeries(refine=True)
    own = torch.arange(1.0, 4.0)
    problem = problem_from(
        lambda z, x, batch: (own @ z) ** 2, lambda z, x, batch: z.sum(), Proximal(1.0)
    )
    with pytest.raises(errors.StructureError, match=r"in float64, which fails .*refine=False"):
        hypergradient(
            problem,
            torch.ones(3),
            inner_solver=GradientDescent(lr=0.01),
            method=ImplicitCG(refine=True),
        )
