"""What other libraries get wrong, each as a test that passes here."""

import re

import pytest
import torch
from torch import nn

from bilevel import (
    BilevelWarning,
    DependenceError,
    InPlaceError,
    ObjectiveError,
    Proximal,
    SolveError,
    Status,
    Task,
    TaskBatch,
    argmin,
    hypergradient,
    problem_from,
    solve_inner,
    stateless,
)
from bilevel.solvers import (
    CG,
    LBFGS,
    ClosedForm,
    Dense,
    DenseExact,
    FirstOrder,
    GradientDescent,
    ImplicitCG,
    Neumann,
    NeumannSeries,
    TorchOptimizer,
    Unrolled,
)
from tests.helpers import (
    peak_saved,
    product,
    quadratic,
    quadratic_answer,
    quadratic_task,
    randn,
    spd,
)

F64 = torch.float64
SOLVERS = [CG(rtol=1e-10), Dense(), Neumann(terms=300, rtol=1e-10)]
IMPLICIT = [ImplicitCG(rtol=1e-12), DenseExact(), NeumannSeries(terms=2000, rtol=1e-12)]
METHODS = [*IMPLICIT, Unrolled()]


def close(got, want, rtol=1e-9, atol=0.0):
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def name(value):
    return type(value).__name__


def stack_of(tasks):
    """Stacked tasks whose data nobody reads."""
    return TaskBatch(torch.zeros(tasks, 1, dtype=F64), torch.zeros(tasks, 1, dtype=F64))


def isotropic(scale=2.0):
    """g = scale/2 ‖z‖² − zᵀx, f = ½ ‖z − 1‖²: z* = x / scale, dF/dx = (x / scale − 1) / scale."""
    return problem_from(
        lambda z, x, batch: 0.5 * scale * (z**2).sum() - (z * x).sum(),
        lambda z, x, batch: 0.5 * ((z - 1) ** 2).sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x),
    )


# Linear systems on which peers return zero, NaN or the previous iterate


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 2.0, 1e6])
def test_a_multiple_of_the_identity_is_solved_exactly(solver, scale):
    b = randn(2, 7)
    found = solver(lambda v: scale * v, b)
    close(found.value, b / scale, rtol=1e-9)
    assert found.status.tolist() == [Status.CONVERGED] * 2


def test_cg_solves_a_multiple_of_the_identity_in_one_step():
    assert CG(rtol=1e-12)(lambda v: 2 * v, randn(1, 20)).steps.tolist() == [1]


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_a_scalar_unknown_is_solved(solver):
    found = solver(lambda v: 4 * v, torch.tensor([[3.0]], dtype=F64))
    close(found.value, torch.tensor([[0.75]], dtype=F64))
    assert found.status.tolist() == [Status.CONVERGED]


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_a_zero_right_hand_side_returns_zero(solver):
    A = spd(6)[None].expand(2, 6, 6)
    b = torch.stack([torch.zeros(6, dtype=F64), randn(6)])
    found = solver(product(A), b)
    assert torch.equal(found.value[0], torch.zeros(6, dtype=F64))
    assert found.status.tolist() == [Status.CONVERGED] * 2
    assert found.residual[0] == 0
    close(found.value[1], torch.linalg.solve(A[1], b[1]), rtol=1e-7)


@pytest.mark.parametrize("solver", [*SOLVERS, CG(rtol=0.0), Neumann()], ids=repr)
@pytest.mark.parametrize(
    "A",
    [torch.zeros(3, 3, dtype=F64), torch.diag(torch.tensor([1.0, -1.0, 2.0], dtype=F64))],
    ids=["singular", "indefinite"],
)
def test_a_zero_right_hand_side_returns_zero_whatever_the_matrix(solver, A):
    found = solver(product(A[None]), torch.zeros(1, 3, dtype=F64))
    assert torch.equal(found.value, torch.zeros(1, 3, dtype=F64))
    assert found.status.tolist() == [Status.CONVERGED]
    assert found.residual.tolist() == [0.0]


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_a_zero_right_hand_side_ignores_a_warm_start(solver):
    zero = torch.zeros(1, 4, dtype=F64)
    found = solver(product(spd(4)[None]), zero, randn(1, 4))
    assert torch.equal(found.value, zero)
    assert found.status.tolist() == [Status.CONVERGED]


def test_cg_that_converges_before_the_last_step_stops_without_nan():
    A = torch.diag(torch.tensor([1.0, 1.0, 3.0, 3.0, 3.0], dtype=F64))[None]
    b = randn(1, 5)
    found = CG(max_steps=50, rtol=1e-12)(product(A), b)
    assert found.steps.item() == 2
    assert found.status.tolist() == [Status.CONVERGED]
    close(found.value, torch.linalg.solve(A, b), rtol=1e-12)


def test_cg_that_converges_on_the_last_permitted_step_is_converged():
    A = torch.diag(torch.tensor([1.0, 3.0], dtype=F64))[None]
    found = CG(max_steps=2, rtol=1e-12)(product(A), torch.ones(1, 2, dtype=F64))
    assert found.steps.item() == 2
    assert found.status.tolist() == [Status.CONVERGED]


def test_cg_one_step_short_says_so():
    A = torch.diag(torch.tensor([1.0, 3.0], dtype=F64))[None]
    found = CG(max_steps=1, rtol=1e-12)(product(A), torch.ones(1, 2, dtype=F64))
    assert found.status.tolist() == [Status.MAX_STEPS]
    assert found.residual.item() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_cg_without_a_tolerance_goes_on_after_exact_convergence_without_harm(dtype, scale):
    A = (spd(4, condition=20.0, largest=1.0) * scale).to(dtype)[None]
    b = randn(1, 4).to(dtype)
    found = CG(max_steps=100, rtol=0.0)(product(A), b)
    eps = torch.finfo(dtype).eps
    close(found.value, torch.linalg.solve(A, b), rtol=200 * eps, atol=200 * eps / scale)
    assert Status(found.status.item()).ok, Status(found.status.item())


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e-30),
        (torch.float32, 1e-41),
        (torch.float32, 1e30),
        (F64, 1e-200),
        (F64, 1e-310),
        (F64, 1e200),
    ],
    ids=str,
)
def test_tiny_and_huge_right_hand_sides_are_solved_like_any_other(solver, dtype, size):
    # Powers of two, so that scaling is exact down to the smallest numbers.
    A = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=dtype)[None]
    b = torch.tensor([[3.0, 3.0]], dtype=dtype) * size
    found = type(solver)(**{**vars(solver), "rtol": 1e-5})(product(A), b)
    assert found.status.tolist() == [Status.CONVERGED]
    close(found.value, b / 3, rtol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 3e38), (F64, 1.5e308)], ids=str)
def test_a_right_hand_side_whose_norm_overflows_is_solved(solver, dtype, size):
    b = torch.full((1, 4), size, dtype=dtype)
    found = type(solver)(**{**vars(solver), "rtol": 1e-5})(lambda v: 2 * v, b)
    assert found.status.tolist() == [Status.CONVERGED]
    close(found.value, b / 2, rtol=1e-4)


def test_an_indefinite_hessian_is_reported_with_its_negative_curvature():
    A = torch.diag(torch.tensor([2.0, -1.0, 3.0], dtype=F64))[None]
    found = CG(rtol=1e-10)(product(A), torch.ones(1, 3, dtype=F64))
    assert found.status.tolist() == [Status.INDEFINITE]
    assert -1.0 <= found.curvature_min.item() < 0
    assert found.value.isfinite().all()


@pytest.mark.parametrize("steps", range(1, 9))
def test_every_cg_step_is_the_best_point_of_its_krylov_space(steps):
    # Hestenes and Stiefel: x_k minimises the energy norm of the error over span{b, Ab, …}.
    n = 8
    A, b = spd(n, condition=50.0), randn(n)
    krylov = [b]
    for _ in range(steps - 1):
        krylov.append(A @ krylov[-1] / (A @ krylov[-1]).norm())
    K, _ = torch.linalg.qr(torch.stack(krylov, dim=1))
    want = K @ torch.linalg.solve(K.mT @ A @ K, K.mT @ b)
    found = CG(max_steps=steps, rtol=0.0)(product(A[None]), b[None])
    close(found.value[0], want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("factor", [1.05, 2.0, 10.0])
def test_a_neumann_scale_beyond_the_limit_is_reported(factor):
    A = spd(10, condition=20.0, largest=4.0)
    scale = factor * 2 / 4.0
    found = Neumann(terms=200, scale=scale)(product(A[None]), randn(1, 10))
    assert found.status.tolist() == [Status.DIVERGED]
    assert found.value.isfinite().all()


def test_a_neumann_scale_within_the_limit_is_not_reported():
    A = spd(10, condition=20.0, largest=4.0)
    found = Neumann(terms=400, scale=0.95 * 2 / 4.0, rtol=1e-6)(product(A[None]), randn(1, 10))
    assert found.status.tolist() == [Status.CONVERGED]


@pytest.mark.parametrize(("steps", "error"), [(5, 0.5), (20, 1e-5), (40, 1e-9)])
def test_cg_on_condition_50_is_as_fast_as_theory(steps, error):
    # Normal equations reach 0.03 in 20 steps; recursions with a stale residual diverge.
    task = quadratic_task(20, condition=50.0)
    x = randn(20, seed=5)
    want = quadratic_answer(task, x)
    z = torch.linalg.solve(task.inner_batch["A"], task.inner_batch["B"] @ x)
    result = hypergradient(
        quadratic(),
        x,
        task,
        inner_solver=None,
        inner=z,
        method=ImplicitCG(max_steps=steps, rtol=0.0),
    )
    assert (result.gradient - want).norm() <= error * want.norm()


# Whole hypergradients


@pytest.mark.parametrize("method", METHODS, ids=name)
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_hypergradient_of_an_isotropic_problem_is_exact(method, scale):
    x = torch.tensor([0.3, -2.0, 5.0], dtype=F64)
    solver = GradientDescent(lr=1 / scale, max_steps=20)
    result = hypergradient(isotropic(scale), x, inner_solver=solver, method=method)
    close(result.gradient, (x / scale - 1) / scale)
    assert result.ok


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_an_isotropic_toy_moves_to_its_solution_within_50_outer_steps(method):
    x = torch.zeros(2, dtype=F64)
    for _ in range(50):
        result = hypergradient(
            isotropic(), x, inner_solver=GradientDescent(lr=0.5, max_steps=5), method=method
        )
        x = x - 2.0 * result.gradient
    close(x, torch.full((2,), 2.0, dtype=F64), rtol=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=name)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_scalar_inner_variable_has_its_hypergradient(method, shape):
    x = torch.full(shape, 3.0, dtype=F64)
    result = hypergradient(
        isotropic(), x, inner_solver=GradientDescent(lr=0.5, max_steps=5), method=method
    )
    assert result.gradient.shape == torch.Size(shape)
    close(result.gradient, (x / 2 - 1) / 2)
    assert result.inner.shape == torch.Size(shape)


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_zero_dimensional_leaves_stand_beside_larger_ones(method):
    problem = problem_from(
        lambda z, x, batch: z["s"] ** 2 + (z["v"] ** 2).sum() + z["s"] * z["v"].sum() * 0.5,
        lambda z, x, batch: z["s"] + (z["v"] ** 3).sum(),
        Proximal(1.0),
    )
    x = {"s": torch.tensor(1.0, dtype=F64), "v": torch.tensor([2.0, -1.0], dtype=F64)}
    solver = GradientDescent(lr=0.2, max_steps=400)
    result = hypergradient(problem, x, inner_solver=solver, method=method)
    flat = torch.cat([x["s"][None], x["v"]])
    H = torch.tensor([[3, 0.5, 0.5], [0.5, 3, 0], [0.5, 0, 3]], dtype=F64)
    z = torch.linalg.solve(H, flat)
    want = torch.linalg.solve(H, torch.cat([torch.ones(1, dtype=F64), 3 * z[1:] ** 2]))
    close(result.gradient["s"], want[0])
    close(result.gradient["v"], want[1:])


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_an_outer_objective_that_is_stationary_in_the_inner_variable_gives_zero(method):
    # ∂f/∂z = 0 at z* = 1: the right-hand side of the adjoint system is exactly zero.
    x = torch.full((4,), 2.0, dtype=F64)
    result = hypergradient(
        isotropic(), x, inner_solver=GradientDescent(lr=0.5, max_steps=3), method=method
    )
    assert torch.equal(result.gradient, torch.zeros(4, dtype=F64))
    assert result.ok


@pytest.mark.parametrize("method", IMPLICIT, ids=name)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-30), (F64, 1e-200), (F64, 1e200)])
def test_a_tiny_or_huge_outer_objective_has_a_gradient_of_its_size(method, dtype, size):
    problem = problem_from(
        lambda z, x, batch: 0.5 * (z**2).sum() - (z * x).sum(),
        lambda z, x, batch: size * z.sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x),
    )
    x = torch.ones(5, dtype=dtype)
    if isinstance(method, ImplicitCG):
        method = ImplicitCG(rtol=1e-5)
    result = hypergradient(
        problem, x, inner_solver=GradientDescent(lr=1.0, max_steps=2), method=method
    )
    close(result.gradient, torch.full_like(x, size), rtol=1e-5)


def test_an_indefinite_inner_hessian_is_told_with_its_rayleigh_quotient():
    # A saddle at 0 with curvatures 1 and −2 along the axes.
    problem = problem_from(
        lambda z, x, batch: 0.5 * z[0] ** 2 - z[1] ** 2 + z @ x,
        lambda z, x, batch: z.sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x),
    )
    x = torch.zeros(2, dtype=F64)
    result = hypergradient(problem, x, inner_solver=None, inner=x, method=ImplicitCG())
    assert result.status == (Status.INDEFINITE,)
    assert not result.ok
    lowest = result.diagnostics.linear.curvature[0, 0].item()
    assert -2 <= lowest < 0
    assert result.diagnostics.linear.status == (Status.INDEFINITE,)
    assert "proximal strength" in result.summary()


@pytest.mark.parametrize("scale", [1.01, 3.0])
def test_a_neumann_series_beyond_the_limit_never_returns_silently(scale):
    x = torch.ones(3, dtype=F64)
    with pytest.raises(SolveError, match="DIVERGED"):
        hypergradient(
            isotropic(2.0),
            x,
            inner_solver=GradientDescent(lr=0.5, max_steps=2),
            method=NeumannSeries(terms=100, scale=scale),
        )


# Status comes from residuals


@pytest.mark.parametrize("steps", [20, 1000])
def test_an_inner_solve_that_ends_within_tolerance_is_converged(steps):
    # ‖∂g‖ halves at each step: after 20 steps it is 4 · 2⁻²⁰.
    result = solve_inner(
        isotropic(1.0),
        torch.full((4,), 2.0, dtype=F64),
        inner_solver=GradientDescent(lr=0.5, max_steps=steps, tol=4.01 * 2**-20),
    )
    assert result.status == (Status.CONVERGED,)
    assert result.steps.tolist() == [20]


def test_an_unsolved_inner_problem_is_told():
    # TorchOpt returns this gradient without a word.
    result = hypergradient(
        isotropic(1.0),
        torch.full((4,), 2.0, dtype=F64),
        inner_solver=GradientDescent(lr=0.01, max_steps=5, tol=1e-8),
        method=ImplicitCG(),
    )
    assert result.status == (Status.MAX_STEPS,)
    assert not result.ok
    want = 4 * 0.99**5
    close(result.diagnostics.inner.residual, torch.tensor([want], dtype=F64))


def test_a_budget_without_tolerance_is_a_budget():
    result = hypergradient(
        isotropic(1.0),
        torch.full((4,), 2.0, dtype=F64),
        inner_solver=GradientDescent(lr=0.01, max_steps=16),
        method=ImplicitCG(max_steps=5, rtol=0.0),
    )
    assert result.diagnostics.inner.status == (Status.BUDGET,)
    assert result.ok


# Gradients that are lost


def independent(direct):
    return problem_from(
        lambda z, x, batch: ((z - 3) ** 2).sum(),
        (lambda z, x, batch: (z * x).sum()) if direct else (lambda z, x, batch: (z**2).sum()),
        initial_inner=lambda x, batch: x,
    )


@pytest.mark.parametrize("method", IMPLICIT, ids=name)
def test_an_inner_solution_that_does_not_depend_on_outer_is_refused(method):
    # MAML-like code without a proximal regularizer: the argmin forgets where it started.
    with pytest.raises(DependenceError, match=r"(?s)depends on `outer`.*Proximal"):
        hypergradient(
            independent(direct=False),
            torch.ones(3, dtype=F64),
            inner_solver=GradientDescent(lr=0.1, max_steps=3),
            method=method,
        )


@pytest.mark.parametrize("method", IMPLICIT, ids=name)
def test_an_inner_solution_that_does_not_depend_on_outer_is_told_beside_a_direct_gradient(method):
    with pytest.warns(BilevelWarning, match="does not depend on `outer`"):
        result = hypergradient(
            independent(direct=True),
            torch.ones(3, dtype=F64),
            inner_solver=GradientDescent(lr=0.5, max_steps=3),
            method=method,
        )
    close(result.gradient, torch.full((3,), 3.0, dtype=F64))


@pytest.mark.parametrize("method", [Unrolled(), FirstOrder()], ids=name)
def test_methods_that_differentiate_the_start_take_that_problem(method):
    x = torch.ones(3, dtype=F64)
    result = hypergradient(
        independent(direct=False),
        x,
        inner_solver=GradientDescent(lr=0.1, max_steps=3),
        method=method,
    )
    slope = 0.8**3
    z = 3 + slope * (x - 3)
    want = 2 * z if isinstance(method, FirstOrder) else 2 * z * slope
    close(result.gradient, want)


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_an_unused_outer_leaf_is_named(method):
    problem = problem_from(
        lambda z, x, batch: 0.5 * ((z - x["used"]) ** 2).sum(),
        lambda z, x, batch: (z**2).sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x["used"]),
    )
    x = {"used": torch.ones(2, dtype=F64), "idle": [torch.ones(3, dtype=F64)]}
    solver = GradientDescent(lr=1.0, max_steps=2)
    with pytest.warns(BilevelWarning, match=re.escape("outer['idle'][0]")):
        result = hypergradient(problem, x, inner_solver=solver, method=method)
    assert result.diagnostics.unused == ("outer['idle'][0]",)
    assert torch.equal(result.gradient["idle"][0], torch.zeros(3, dtype=F64))
    close(result.gradient["used"], torch.full((2,), 2.0, dtype=F64))


@pytest.mark.parametrize("where", ["inner_objective", "outer_objective", "center", "initial_inner"])
@pytest.mark.parametrize("tasks", [1, 3])
def test_a_captured_tensor_that_requires_grad_is_refused(where, tasks):
    hidden = torch.tensor(2.0, dtype=F64, requires_grad=True)
    use = {
        key: (hidden if key == where else hidden.detach())
        for key in ("inner_objective", "outer_objective", "center", "initial_inner")
    }
    problem = problem_from(
        lambda z, x, batch: use["inner_objective"] * (z**2).sum(),
        lambda z, x, batch: use["outer_objective"] * z.sum(),
        Proximal(1.0, center=lambda x: use["center"] * x),
        initial_inner=lambda x, batch: use["initial_inner"] * x,
    )
    with pytest.raises(DependenceError, match=rf"(?s){where}.*requires grad"):
        hypergradient(
            problem,
            torch.ones(3, dtype=F64),
            stack_of(tasks),
            inner_solver=GradientDescent(lr=0.1, max_steps=3),
            method=ImplicitCG(),
        )


# Objectives that are wrong


def with_objectives(inner=None, outer=None):
    return problem_from(
        inner or (lambda z, x, batch: ((z - x) ** 2).sum()),
        outer or (lambda z, x, batch: (z**2).sum()),
        initial_inner=lambda x, batch: torch.zeros_like(x),
    )


def solve(problem, x, task=None, method=None):
    return hypergradient(
        problem,
        x,
        task,
        inner_solver=GradientDescent(lr=0.1, max_steps=3),
        method=method or ImplicitCG(),
    )


@pytest.mark.parametrize("method", [*METHODS, FirstOrder()], ids=name)
@pytest.mark.parametrize("which", ["inner", "outer"])
def test_nan_in_an_objective_is_an_error_and_leaves_outer_alone(method, which):
    x = torch.ones(3, dtype=F64, requires_grad=True)
    problem = with_objectives(
        **{which: lambda z, x, batch: ((z - x) ** 2).sum() + (z - 1.0e9).log().sum()}
    )
    with pytest.raises(SolveError, match="NON_FINITE"):
        solve(problem, x, method=method)
    assert torch.equal(x, torch.ones(3, dtype=F64))
    assert x.grad is None


@pytest.mark.parametrize("method", [*METHODS, FirstOrder()], ids=name)
def test_an_infinite_gradient_of_a_finite_objective_is_found(method):
    # √0: the value is 0, its derivative infinite.
    problem = with_objectives(outer=lambda z, x, batch: (z**2).sum() + (x * 0).abs().sqrt().sum())
    with pytest.raises(SolveError, match="NON_FINITE"):
        solve(problem, torch.ones(3, dtype=F64), method=method)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("which", ["inner", "outer"])
@pytest.mark.parametrize(
    ("value", "found"),
    [
        (lambda z, x, batch: (z - x) ** 2, r"shape \(3,\)"),
        (lambda z, x, batch: ((z - x) ** 2).sum().reshape(1), r"shape \(1,\)"),
        (lambda z, x, batch: 1.0, "float"),
        (lambda z, x, batch: None, "NoneType"),
        (lambda z, x, batch: {"loss": ((z - x) ** 2).sum()}, "dict"),
    ],
    ids=["vector", "one-element", "float", "none", "dict"],
)
def test_an_objective_that_returns_no_scalar_tensor_is_refused(tasks, which, value, found):
    with pytest.raises(ObjectiveError, match=rf"`{which}_objective` returned.*{found}"):
        solve(with_objectives(**{which: value}), torch.ones(3, dtype=F64), stack_of(tasks))


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("which", ["inner", "outer"])
def test_data_of_another_dtype_is_named(tasks, which):
    # A matrix product refuses mixed dtypes; the message must say which argument.
    problem = with_objectives(
        **{which: lambda z, x, batch: ((batch["data"] @ z - (batch["data"] @ x)) ** 2).sum()}
    )
    data = {"data": torch.ones(tasks, 2, 3, dtype=torch.float32)}
    batch = TaskBatch(**{f"{which}_batch": data})
    with pytest.raises(ObjectiveError, match=rf"dtype.*{which}_batch\['data'\]"):
        solve(problem, torch.ones(3, dtype=F64), batch)


@pytest.mark.parametrize("tasks", [1, 3])
def test_an_objective_promoted_by_its_data_names_the_data(tasks):
    problem = with_objectives(inner=lambda z, x, batch: ((batch * z - x) ** 2).sum())
    batch = TaskBatch(torch.ones(tasks, 3, dtype=F64))
    with pytest.raises(ObjectiveError, match=r"returned torch.float64 but.*inner_batch"):
        solve(problem, torch.ones(3), batch)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("which", ["inner", "outer"])
def test_data_on_another_device_is_named(tasks, which):
    problem = with_objectives(
        **{which: lambda z, x, batch: ((batch["data"] @ z - x.sum()) ** 2).sum()}
    )
    data = {"data": torch.ones(tasks, 2, 3, dtype=F64, device="meta")}
    batch = TaskBatch(**{f"{which}_batch": data})
    with pytest.raises(ObjectiveError, match=rf"device.*{which}_batch\['data'\]"):
        solve(problem, torch.ones(3, dtype=F64), batch)


def test_an_outer_variable_on_another_device_is_named():
    problem = problem_from(
        lambda z, x, batch: (((z - batch) * x) ** 2).sum(),
        lambda z, x, batch: (z**2).sum(),
        initial_inner=lambda x, batch: torch.zeros(3, dtype=F64),
    )
    with pytest.raises(ObjectiveError, match=r"`outer` has device|`outer` .*meta|meta.*`outer`"):
        solve(problem, torch.ones(3, dtype=F64, device="meta"), Task(torch.ones(3, dtype=F64)))


def test_an_integer_outer_leaf_is_named():
    with pytest.raises(ValueError, match=r"`outer\['count'\]` is torch.int64"):
        solve(with_objectives(), {"count": torch.tensor(3)})


# Traces left behind


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("which", ["inner", "outer"])
@pytest.mark.parametrize("guarded", [False, True], ids=["plain", "no_grad"])
def test_an_objective_that_changes_the_outer_variable_is_refused(tasks, which, guarded):
    def value(z, x, batch):
        with torch.set_grad_enabled(not guarded):
            x["w"].mul_(2)
        return ((z - x["w"]) ** 2).sum()

    problem = problem_from(
        value if which == "inner" else lambda z, x, batch: ((z - x["w"]) ** 2).sum(),
        value if which == "outer" else lambda z, x, batch: ((z - x["w"]) ** 2).sum(),
        initial_inner=lambda x, batch: torch.zeros(3, dtype=F64),
    )
    x = {"w": torch.ones(3, dtype=F64, requires_grad=True)}
    with pytest.raises(InPlaceError, match=f"{which}_objective"):
        solve(problem, x, stack_of(tasks))
    assert torch.equal(x["w"], torch.ones(3, dtype=F64))


@pytest.mark.parametrize("tasks", [1, 3])
def test_an_objective_that_changes_the_inner_variable_is_refused(tasks):
    def value(z, x, batch):
        z.clamp_(min=0)
        return ((z - x) ** 2).sum()

    with pytest.raises(InPlaceError, match="inner_objective"):
        solve(with_objectives(inner=value), torch.ones(3, dtype=F64), stack_of(tasks))


@pytest.mark.parametrize("tasks", [1, 3])
def test_an_objective_that_changes_its_data_is_refused(tasks):
    def value(z, x, batch):
        batch["images"].div_(255)
        return ((z - x) ** 2).sum() * batch["images"].mean()

    images = torch.ones(tasks, 4, dtype=F64)
    with pytest.raises(InPlaceError, match=re.escape("inner_batch['images']")):
        solve(with_objectives(inner=value), torch.ones(3, dtype=F64), TaskBatch({"images": images}))


@pytest.mark.parametrize("function", ["initial_inner", "center", "strength"])
def test_a_start_or_regularizer_that_changes_the_outer_variable_is_refused(function):
    def spoil(name, x):
        if name == function:
            x.mul_(2)
        return x

    problem = problem_from(
        lambda z, x, batch: (z**2).sum(),
        lambda z, x, batch: z.sum(),
        Proximal(
            lambda x: spoil("strength", x).abs().sum(), center=lambda x: spoil("center", x) + 0
        ),
        initial_inner=lambda x, batch: spoil("initial_inner", x) + 0,
    )
    x = torch.ones(3, dtype=F64)
    with pytest.raises(InPlaceError):
        solve(problem, x)
    assert torch.equal(x, torch.ones(3, dtype=F64))


@pytest.mark.parametrize("method", [*METHODS, FirstOrder()], ids=name)
def test_inputs_and_their_grad_are_not_touched(method):
    task = quadratic_task(4, condition=5.0)
    before = [x.clone() for x in (*task.inner_batch.values(), *task.outer_batch.values())]
    x = randn(4).requires_grad_()
    want = x.detach().clone()
    solver = GradientDescent(lr=0.5, max_steps=100)
    hypergradient(quadratic(), x, task, inner_solver=solver, method=method)
    assert torch.equal(x, want)
    assert x.grad is None
    assert x.requires_grad
    after = (*task.inner_batch.values(), *task.outer_batch.values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_hypergradient_carries_no_graph():
    x = torch.ones(3, dtype=F64, requires_grad=True)
    result = solve(isotropic(), x)
    assert not result.gradient.requires_grad
    assert not result.inner.requires_grad
    assert not result.outer_value.requires_grad


def test_hypergradients_work_under_no_grad():
    x = torch.ones(3, dtype=F64)
    with torch.no_grad():
        quiet = solve(isotropic(), x)
    assert torch.equal(quiet.gradient, solve(isotropic(), x).gradient)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_batch_norm_statistics_are_not_touched(tasks, mode):
    tracked = mode == "eval"
    module = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=tracked), nn.Tanh(), nn.Linear(4, 1)
    ).double()
    module.train(mode == "train")
    if tracked:
        module[1].running_mean += 0.3
        module[1].running_var *= 2
    before = {key: value.clone() for key, value in module.state_dict().items()}
    params, net = stateless(module)

    def loss(w, batch):
        return ((net(w, batch[0]) - batch[1]) ** 2).mean()

    problem = problem_from(
        lambda w, x, batch: loss(w, batch), lambda w, x, batch: loss(w, batch), Proximal(2.0)
    )
    data = [
        Task(*((randn(6, 3, seed=2 * i + j), randn(6, 1, seed=50 + 2 * i + j)) for j in (0, 1)))
        for i in range(tasks)
    ]
    result = hypergradient(
        problem,
        params,
        data,
        inner_solver=GradientDescent(lr=0.1, max_steps=20),
        method=ImplicitCG(),
    )
    assert all(leaf.isfinite().all() for leaf in result.gradient.values())
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_module_given_to_stateless_may_change_afterwards():
    module = nn.Linear(2, 1).double()
    params, net = stateless(module)
    x = randn(3, 2)
    want = net(params, x)
    with torch.no_grad():
        module.weight.zero_()
    assert torch.equal(net(params, x), want)


# Options that peers drop, memory that peers lose


def test_optimizer_options_are_kept():
    # Betty rebuilds optimizers from their defaults: lr 0.5 became 0.001.
    result = solve_inner(
        isotropic(1.0),
        torch.ones(1, dtype=F64),
        inner_solver=TorchOptimizer(torch.optim.SGD, max_steps=1, lr=0.5),
    )
    close(result.inner, torch.tensor([0.5], dtype=F64))


def test_solvers_keep_no_state_between_calls():
    solver = TorchOptimizer(torch.optim.Adam, max_steps=7, lr=0.1)
    x = randn(3)
    first = solve_inner(isotropic(), x, inner_solver=solver)
    second = solve_inner(isotropic(), x, inner_solver=solver)
    assert torch.equal(first.inner, second.inner)


def test_an_implicit_gradient_does_not_depend_on_the_inner_solver():
    # hypertorch#8: must the optimizer and the linearised map match? Here they need not.
    task = quadratic_task(5, condition=8.0)
    x = randn(5, seed=3)
    want = quadratic_answer(task, x)
    solvers = [
        GradientDescent(lr=0.5, max_steps=500),
        GradientDescent(lr=0.3, momentum=0.6, max_steps=500),
        TorchOptimizer("SGD", max_steps=500, lr=0.3, momentum=0.6),
        LBFGS(tol=1e-11),
        ClosedForm(lambda x, batch: torch.linalg.solve(batch["A"], batch["B"] @ x)),
    ]
    for solver in solvers:
        result = hypergradient(
            quadratic(), x, task, inner_solver=solver, method=ImplicitCG(rtol=1e-12)
        )
        close(result.gradient, want, rtol=1e-8)


def test_a_wrong_closed_form_is_reported():
    result = hypergradient(
        isotropic(2.0),
        torch.ones(3, dtype=F64),
        inner_solver=ClosedForm(lambda x, batch: x),
        method=ImplicitCG(),
    )
    assert result.status == (Status.MAX_STEPS,)


@pytest.mark.parametrize("method", [ImplicitCG(), DenseExact(), NeumannSeries(5)], ids=name)
def test_memory_of_implicit_methods_does_not_grow_with_inner_steps(method):
    x = torch.ones(50, dtype=F64)

    def run(steps):
        solver = GradientDescent(lr=0.4, max_steps=steps)
        hypergradient(isotropic(), x, inner_solver=solver, method=method)

    assert peak_saved(lambda: run(2)) == peak_saved(lambda: run(200)) > 0


@pytest.mark.parametrize("method", [ImplicitCG(rtol=1e-12), Unrolled()], ids=name)
def test_the_argmin_of_an_isotropic_problem_has_its_exact_derivative(method):
    x = torch.tensor([1.0, -2.0], dtype=F64, requires_grad=True)
    z = argmin(isotropic(4.0), x, inner_solver=GradientDescent(lr=0.25, max_steps=3), method=method)
    (z**2).sum().backward()
    close(x.grad, 2 * x.detach() / 16)
