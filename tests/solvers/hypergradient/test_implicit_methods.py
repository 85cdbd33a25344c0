import pytest
import torch

from bilevel import Status, Structure, StructureError, Task, hypergradient, problem_from
from bilevel.solvers import (
    CG,
    Dense,
    DenseExact,
    GradientDescent,
    Implicit,
    ImplicitCG,
    Neumann,
    NeumannSeries,
)
from tests.helpers import quadratic, quadratic_answer, quadratic_task, randn

F64 = torch.float64
EXACT = [
    ImplicitCG(rtol=1e-13),
    DenseExact(),
    NeumannSeries(terms=3000, rtol=1e-12),
    Implicit(CG(rtol=1e-13)),
    Implicit(Dense()),
    Implicit(Neumann(terms=3000, rtol=1e-12)),
]


def solved(task, x):
    return torch.linalg.solve(task.inner_batch["A"], task.inner_batch["B"] @ x)


def at_solution(task, x, method, **kwargs):
    return hypergradient(
        quadratic(), x, task, inner_solver=None, inner=solved(task, x), method=method, **kwargs
    )


@pytest.mark.parametrize("method", EXACT, ids=repr)
@pytest.mark.parametrize("condition", [1.0, 20.0])
def test_exact_methods_meet_dense_algebra(method, condition):
    task, x = quadratic_task(6, 4, condition=condition), randn(4, seed=3)
    result = at_solution(task, x, method)
    want = quadratic_answer(task, x)
    assert (result.gradient - want).norm() <= 1e-9 * want.norm()
    assert result.diagnostics.linear.status == (Status.CONVERGED,)


@pytest.mark.parametrize("method", EXACT, ids=repr)
def test_a_point_off_the_solution_gives_the_formula_at_that_point(method):
    # ∂f/∂x − (∂²g/∂x∂z)ᵀ H⁻¹ ∂f/∂z, whether or not the point is stationary.
    task, x, z = quadratic_task(4), randn(4), randn(4, seed=9)
    A, B = task.inner_batch["A"], task.inner_batch["B"]
    want = x / 7 + B.mT @ torch.linalg.solve(A, z - task.outer_batch["target"])
    result = hypergradient(quadratic(), x, task, inner_solver=None, inner=z, method=method)
    torch.testing.assert_close(result.gradient, want, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(result.diagnostics.inner.residual[0], (A @ z - B @ x).norm())


@pytest.mark.parametrize("terms", [1, 4])
def test_the_neumann_series_meets_its_own_formula(terms):
    task, x, a = quadratic_task(4), randn(4), 0.7
    A, B = task.inner_batch["A"], task.inner_batch["B"]
    power = solved(task, x) - task.outer_batch["target"]
    v = torch.zeros(4, dtype=F64)
    for _ in range(terms):
        v, power = v + a * power, power - a * (A @ power)
    result = at_solution(task, x, NeumannSeries(terms=terms, scale=a))
    torch.testing.assert_close(result.gradient, x / 7 + B.mT @ v, rtol=1e-11, atol=1e-12)
    assert result.diagnostics.counts["products"] == terms


@pytest.mark.parametrize(
    "method",
    [
        ImplicitCG(rtol=1e-12, damping=0.3),
        DenseExact(damping=0.3),
        NeumannSeries(terms=500, rtol=1e-11, damping=0.3),
        Implicit(CG(rtol=1e-12), damping=0.3),
    ],
    ids=repr,
)
def test_damping_is_added_to_the_matrix_and_the_residual_is_that_of_the_undamped_system(method):
    task, x = quadratic_task(4), randn(4)
    A, B = task.inner_batch["A"], task.inner_batch["B"]
    rhs = solved(task, x) - task.outer_batch["target"]
    v = torch.linalg.solve(A + 0.3 * torch.eye(4, dtype=F64), rhs)
    result = at_solution(task, x, method)
    torch.testing.assert_close(result.gradient, x / 7 + B.mT @ v, rtol=1e-8, atol=1e-10)
    true = (rhs - A @ v).norm() / rhs.norm()
    torch.testing.assert_close(result.diagnostics.linear.residual[0], true, rtol=1e-6, atol=0)
    assert result.status == (Status.MAX_STEPS,)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("make", [ImplicitCG, DenseExact, NeumannSeries], ids=lambda c: c.__name__)
def test_damping_out_of_range_is_refused(make, value):
    with pytest.raises(ValueError, match="`damping`"):
        make(damping=value)


def equilibrium(structure=None):
    A = torch.tensor([[0.2, 0.7], [-0.7, 0.1]], dtype=F64)
    return A, problem_from(
        None,
        lambda z, x, batch: (z**2).sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x),
        stationarity=lambda z, x, batch: z - A @ z - x,
        structure=structure,
    )


@pytest.mark.parametrize(
    "method",
    [DenseExact(), Implicit(Dense()), NeumannSeries(terms=400, scale=1.0, rtol=1e-12)],
    ids=repr,
)
def test_unsymmetric_equilibria_use_the_transposed_jacobian(method):
    A, problem = equilibrium()
    x = randn(2)
    J = torch.eye(2, dtype=F64) - A
    z = torch.linalg.solve(J, x)
    want = torch.linalg.solve(J.mT, 2 * z)
    result = hypergradient(problem, x, inner_solver=None, inner=z, method=method)
    torch.testing.assert_close(result.gradient, want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", [ImplicitCG(), Implicit(CG())], ids=repr)
def test_cg_refuses_what_is_not_declared_symmetric(method):
    _, problem = equilibrium()
    with pytest.raises(StructureError, match=r"needs .* SYMMETRIC.*GENERAL"):
        hypergradient(problem, randn(2), inner_solver=GradientDescent(0.5, 3), method=method)


def test_a_declared_structure_is_checked():
    _, problem = equilibrium(Structure.SYMMETRIC)
    with pytest.raises(StructureError, match=r"promises.*SYMMETRIC.*not symmetric.*GENERAL"):
        hypergradient(problem, randn(2), inner_solver=GradientDescent(0.5, 3), method=ImplicitCG())


@pytest.mark.parametrize("steps", [1, 3])
def test_cg_spends_its_budget_and_no_more(steps):
    task, x = quadratic_task(8, condition=100.0), randn(8)
    result = at_solution(task, x, ImplicitCG(max_steps=steps, rtol=0.0))
    assert result.diagnostics.counts["products"] == steps
    assert result.diagnostics.linear.steps.tolist() == [steps]
    assert result.status == (Status.BUDGET,)


def test_a_warm_adjoint_saves_steps():
    task, x = quadratic_task(20, condition=100.0), randn(20)
    cold = at_solution(task, x, ImplicitCG(rtol=1e-8))
    near = x + 1e-5 * randn(20, seed=1)
    warm = at_solution(task, near, ImplicitCG(rtol=1e-8), state=cold.state)
    again = at_solution(task, near, ImplicitCG(rtol=1e-8))
    assert warm.diagnostics.linear.steps < again.diagnostics.linear.steps
    want = quadratic_answer(task, near)
    assert (warm.gradient - want).norm() <= 1e-6 * want.norm()


def test_dense_exact_refuses_large_problems():
    with pytest.raises(ValueError, match="`max_n` = 3"):
        at_solution(quadratic_task(4), randn(4), DenseExact(max_n=3))


def test_implicit_takes_a_linear_solver_only():
    with pytest.raises(ValueError, match="`linear_solver`"):
        Implicit(CG)


@pytest.mark.parametrize("method", EXACT[:3], ids=repr)
def test_float32_is_accurate_to_float32(method):
    task, x = quadratic_task(6, condition=20.0), randn(6)
    single = Task(
        {key: value.float() for key, value in task.inner_batch.items()},
        {key: value.float() for key, value in task.outer_batch.items()},
    )
    loose = {ImplicitCG: ImplicitCG(rtol=1e-6), NeumannSeries: NeumannSeries(500, rtol=1e-6)}
    method = loose.get(type(method), method)
    z = solved(task, x).float()
    result = hypergradient(
        quadratic(), x.float(), single, inner_solver=None, inner=z, method=method
    )
    want = quadratic_answer(task, x)
    assert result.gradient.dtype == torch.float32
    assert (result.gradient.double() - want).norm() <= 1e-4 * want.norm()
