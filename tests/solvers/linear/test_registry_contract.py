"""What every registered linear solver does; a new one is tested by being registered."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel.solvers  # noqa: F401  # registers
from bilevel import Operator, Status, Structure
from bilevel.registry import LINEAR_SOLVERS
from bilevel.solvers.linear import cycles
from tests.helpers import product, randn, spd

F64 = torch.float64
NAMES = LINEAR_SOLVERS.names()
# The Nyström method is a solver of full accuracy only with all columns and hardly any damping.
SETTINGS = {"nystrom": {"rank": 100, "rho": 1e-13}}


def build(name, rtol=1e-12):
    return LINEAR_SOLVERS.build(name, **SETTINGS.get(name, {})).toward(rtol, 6000)


def budget(solver):
    """The name of the setting that limits its steps, or None for a direct solver."""
    return next((f.name for f in fields(solver) if f.name in ("max_steps", "terms")), None)


def limited(name, steps, rtol):
    solver = build(name, 1e-5)
    if budget(solver) is None:
        pytest.skip("a direct solver")
    return replace(solver, **{budget(solver): steps, "rtol": rtol})


def short(name):
    """Not so patient where there is nothing to find."""
    solver = build(name, 1e-8)
    return solver if budget(solver) is None else replace(solver, **{budget(solver): 60})


def symmetric(A):
    return Operator.symmetric(product(A))


def general(A):
    return Operator(product(A), product(A.mT))


def true_residual(A, b, found):
    r = b.double() - product(A.double())(found.value.double())
    return r.norm(dim=-1) / b.double().norm(dim=-1)


def relative_error(A, b, found):
    want = torch.linalg.solve(A.double(), b.double())
    return (found.value.double() - want).norm(dim=-1) / want.norm(dim=-1)


def assert_honest(A, b, found, rtol):
    """No claim of convergence without the residual, and the residual reported is the true one."""
    true = true_residual(A, b, found)
    # Of the product itself, A being of size 1; a nearly singular matrix has large solutions.
    rounding = 1e-14 * (1 + found.value.norm(dim=-1) / b.norm(dim=-1))
    for i, status in enumerate(found.status.tolist()):
        if status == Status.CONVERGED:
            assert true[i] <= 1.01 * rtol + rounding[i]
        if status != Status.NON_FINITE:
            assert (found.residual[i] - true[i]).abs() <= 1e-3 * true[i] + rounding[i] + 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_definite_systems_agree_with_the_dense_solve(name):
    A = torch.stack([spd(20, condition=100.0, seed=i, largest=1.0) for i in range(3)])
    b = randn(3, 20)
    found = build(name)(symmetric(A), b)
    assert relative_error(A, b, found).max() <= 1e-9
    assert_honest(A, b, found, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_float32_systems_agree_with_the_dense_solve(name):
    A = torch.stack([spd(20, condition=100.0, seed=i, largest=1.0) for i in range(3)]).float()
    b = randn(3, 20).float()
    found = build(name, 1e-6)(symmetric(A), b)
    assert found.value.dtype == torch.float32
    assert found.residual.dtype == F64
    assert found.status.dtype == torch.int8
    assert found.steps.dtype == torch.int64
    assert relative_error(A, b, found).max() <= 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_tasks(name):
    conditions = [1.0, 10.0, 200.0]
    A = torch.stack([spd(12, condition=c, seed=i, largest=1.0) for i, c in enumerate(conditions)])
    b = randn(3, 12) * torch.tensor([[1.0], [1e-8], [1e8]], dtype=F64)
    solver = build(name, 1e-8)
    found = solver(symmetric(A), b)
    for i in range(3):
        alone = solver(symmetric(A[i : i + 1]), b[i : i + 1])
        scale = alone.value.norm()
        assert (found.value[i] - alone.value[0]).norm() <= 1e-12 * scale
        assert found.status[i] == alone.status[0]
        assert found.steps[i] == alone.steps[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_right_hand_side_has_the_solution_zero(name):
    A, b = torch.stack([spd(5), spd(5)]), randn(2, 5)
    b[0] = 0.0
    found = build(name, 1e-8)(symmetric(A), b, start=randn(2, 5, seed=1))
    assert found.value[0].tolist() == [0.0] * 5
    assert found.status.tolist() == [Status.CONVERGED] * 2
    assert found.residual[0] == 0.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["rhs", "matrix"])
def test_a_nan_stays_in_its_task(name, where):
    A = torch.stack([spd(6, seed=i, largest=1.0) for i in range(3)])
    b = randn(3, 6)
    want = torch.linalg.solve(A, b)
    if where == "rhs":
        b[1, 2] = float("nan")
    else:
        A[1, 3, 4] = float("nan")
    found = build(name, 1e-10)(symmetric(A), b)
    assert found.status.tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    torch.testing.assert_close(found.value[[0, 2]], want[[0, 2]], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_matrix_is_told_without_a_tolerance_too(name):
    A = torch.stack([spd(6) * float("nan"), spd(6, largest=1.0)])
    found = limited(name, 3, 0.0)(symmetric(A), randn(2, 6))
    assert found.status[0] == Status.NON_FINITE
    assert found.status[1] == Status.BUDGET
    assert found.value[1].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_start_at_the_solution_takes_no_step(name):
    A, b = spd(6, largest=1.0)[None], randn(1, 6)
    solver = build(name, 1e-8)
    found = solver(symmetric(A), b, torch.linalg.solve(A, b))
    assert found.status.tolist() == [Status.CONVERGED]
    if budget(solver) is not None:
        assert found.steps.tolist() == [0]


@pytest.mark.parametrize("name", NAMES)
def test_a_start_near_the_solution_saves_steps(name):
    A, b = spd(30, condition=300.0, largest=1.0)[None], randn(1, 30)
    solver = build(name, 1e-6)
    if budget(solver) is None:
        pytest.skip("a direct solver")
    near = torch.linalg.solve(A, b) * (1 + 1e-5 * randn(1, 30, seed=1))
    assert solver(symmetric(A), b, near).steps < solver(symmetric(A), b).steps


@pytest.mark.parametrize("name", NAMES)
def test_a_spent_budget_is_told_with_the_true_residual(name):
    A, b = spd(60, condition=1e4, largest=1.0)[None], randn(1, 60)
    found = limited(name, 2, 1e-10)(symmetric(A), b)
    assert found.status.tolist() == [Status.MAX_STEPS]
    assert_honest(A, b, found, 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_tolerance_the_budget_is_all_that_is_asked(name):
    A, b = spd(60, condition=1e4, largest=1.0)[None], randn(1, 60)
    found = limited(name, 2, 0.0)(symmetric(A), b)
    assert found.status.tolist() == [Status.BUDGET]
    assert_honest(A, b, found, 0.0)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 10))
def test_indefinite_matrices_are_claimed_solved_only_where_they_are(name, seed, n):
    basis = torch.linalg.qr(randn(n, n, seed=seed))[0]
    values = torch.linspace(-1.0, 1.0, n, dtype=F64)
    A, b = (basis @ torch.diag(values) @ basis.mT)[None], randn(1, n, seed=seed + 1)
    assert_honest(A, b, short(name)(symmetric(A), b), 1e-8)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 10))
def test_singular_matrices_without_a_solution_are_never_claimed_solved(name, seed, n):
    A, b = torch.zeros(1, n + 1, n + 1, dtype=F64), randn(1, n + 1, seed=seed + 1)
    A[0, :n, :n] = spd(n, seed=seed, largest=1.0)
    found = short(name)(symmetric(A), b)
    assert not Status(found.status.item()).ok
    assert_honest(A, b, found, 1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_matrix_is_not_solved(name):
    A = torch.stack([torch.zeros(4, 4, dtype=F64), spd(4, largest=1.0)])
    found = build(name, 1e-8)(symmetric(A), randn(2, 4))
    assert not Status(found.status[0].item()).ok
    assert found.status[1] == Status.CONVERGED


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 12))
def test_systems_without_symmetry(name, seed, n):
    solver = build(name, 1e-10)
    if solver.needs != Structure.GENERAL:
        pytest.skip("needs symmetry")
    A = torch.eye(n, dtype=F64) + 0.3 * randn(2, n, n, seed=seed) / n**0.5
    b = randn(2, n, seed=seed + 1)
    found = solver(general(A), b)
    assert found.status.tolist() == [Status.CONVERGED] * 2
    assert relative_error(A, b, found).max() <= 1e-8


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12)
@given(
    n=st.integers(1, 12),
    tasks=st.integers(1, 3),
    log=st.floats(0.0, 2.0),
    seed=st.integers(0, 10**6),
)
def test_random_definite_systems_are_solved(name, n, tasks, log, seed):
    matrices = [spd(n, condition=10**log, seed=seed + i, largest=1.0) for i in range(tasks)]
    A, b = torch.stack(matrices), randn(tasks, n, seed=seed)
    found = build(name, 1e-9)(symmetric(A), b)
    assert found.status.tolist() == [Status.CONVERGED] * tasks
    assert_honest(A, b, found, 1e-9)
    assert relative_error(A, b, found).max() <= 1.1e-7


@pytest.mark.parametrize("name", NAMES)
def test_one_unknown(name):
    found = build(name)(symmetric(torch.full((2, 1, 1), 4.0, dtype=F64)), torch.ones(2, 1).double())
    torch.testing.assert_close(found.value, torch.full((2, 1), 0.25, dtype=F64), rtol=1e-11, atol=0)
    assert found.status.tolist() == [Status.CONVERGED] * 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize(("of_a", "of_b"), [(1e-30, 1.0), (1e30, 1.0), (1.0, 1e-30), (1.0, 1e30)])
def test_scales_do_not_matter(name, dtype, of_a, of_b):
    if name == "nystrom" and of_a != 1.0:
        pytest.skip("its damping has the units of the matrix")
    A = (spd(8, condition=50.0, largest=1.0)[None] * of_a).to(dtype)
    b = (randn(1, 8) * of_b).to(dtype)
    found = build(name, 1e-5)(symmetric(A), b)
    assert found.status.tolist() == [Status.CONVERGED]
    want = torch.linalg.solve(A.double() / of_a, b.double() / of_b)
    got = found.value.double() * of_a / of_b
    assert (got - want).norm() <= 1e-3 * want.norm()


@pytest.mark.parametrize("name", NAMES)
def test_large_and_small_scales_together(name):
    if name == "nystrom":
        pytest.skip("its damping has the units of the matrix")
    A = torch.stack([spd(8, seed=1) * 1e-30, spd(8, seed=2), spd(8, seed=3) * 1e30])
    b = randn(3, 8) * torch.tensor([[1e30], [1.0], [1e-30]], dtype=F64)
    found = build(name, 1e-10)(symmetric(A), b)
    assert found.status.tolist() == [Status.CONVERGED] * 3
    torch.testing.assert_close(found.value, torch.linalg.solve(A, b), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_asking_the_device_rarely_changes_nothing(name, monkeypatch):
    # On an accelerator finished tasks run along for a few rounds.
    conditions = [1.0, 10.0, 200.0]
    A = torch.stack([spd(12, condition=c, seed=i, largest=1.0) for i, c in enumerate(conditions)])
    A, b = torch.cat([A, -A[1:2], float("nan") * A[:1]]), randn(5, 12)
    b[0] = 0.0
    often = short(name)(symmetric(A), b)
    monkeypatch.setattr(cycles, "check_interval", lambda device: 8)
    rarely = short(name)(symmetric(A), b)
    assert often.status.tolist() == rarely.status.tolist()
    assert often.steps.tolist() == rarely.steps.tolist()
    torch.testing.assert_close(often.value, rarely.value, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(often.residual, rarely.residual, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_settings_out_of_range_are_refused(name):
    for key, value in [("rtol", -1.0), ("rtol", 1.0), ("max_steps", 0), ("terms", 0)]:
        if key in {f.name for f in fields(build(name))}:
            with pytest.raises(ValueError, match=f"`{key}` is"):
                replace(build(name), **{key: value})


@pytest.mark.parametrize("name", NAMES)
def test_only_an_instance_is_a_preconditioner(name):
    if "preconditioner" not in {f.name for f in fields(build(name))}:
        pytest.skip("takes no preconditioner")
    with pytest.raises(ValueError, match="`preconditioner` is 'jacobi'; pass an instance"):
        replace(build(name), preconditioner="jacobi")
