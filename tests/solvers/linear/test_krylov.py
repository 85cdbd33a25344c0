"""What is special to MINRES, GMRES, BiCGStab and the normal equations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import Operator, Status, StructureError
from bilevel.solvers import GMRES, MINRES, BiCGStab, JacobiPreconditioner, NormalCG
from tests.helpers import product, randn, spd

F64 = torch.float64


def symmetric(A):
    return Operator.symmetric(product(A))


def indefinite(n, seed=0):
    basis = torch.linalg.qr(randn(n, n, seed=seed))[0]
    values = torch.cat([torch.linspace(-2.0, -0.5, n // 2), torch.linspace(0.3, 3.0, n - n // 2)])
    return basis @ torch.diag(values.double()) @ basis.mT


def skewed(n, seed=0):
    return torch.eye(n, dtype=F64) + 0.4 * randn(n, n, seed=seed) / n**0.5


@settings(max_examples=20)
@given(n=st.integers(2, 14), seed=st.integers(0, 10**6))
def test_minres_solves_indefinite_systems_and_sees_it(n, seed):
    A, b = indefinite(n, seed)[None], randn(1, n, seed=seed + 1)
    found = MINRES(max_steps=300, rtol=1e-10)(symmetric(A), b)
    assert found.status.tolist() == [Status.CONVERGED]
    torch.testing.assert_close(found.value, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-8)


def test_minres_reports_the_curvature_that_it_met():
    A, b = indefinite(12)[None], randn(1, 12)
    found = MINRES(rtol=1e-8)(symmetric(A), b)
    assert -2.0 <= found.curvature_min.item() < 0
    assert 0 < found.curvature_max.item() <= 3.0


def krylov_minimum(A, b, k):
    """The least residual over the Krylov space of dimension k, by dense least squares."""
    columns, v = [], b
    for _ in range(k):
        columns.append(v / v.norm())
        v = A @ columns[-1]
    basis = torch.linalg.qr(torch.stack(columns, -1))[0]
    y = torch.linalg.lstsq(A @ basis, b.unsqueeze(-1)).solution
    return (b - (A @ basis @ y).squeeze(-1)).norm() / b.norm()


@pytest.mark.parametrize("k", [1, 3, 6])
def test_minres_and_gmres_have_the_least_residual_of_the_krylov_space(k):
    A, b = indefinite(12), randn(12)
    want = krylov_minimum(A, b, k)
    for solver in (MINRES(max_steps=k, rtol=0.0), GMRES(max_steps=k, rtol=0.0)):
        found = solver(symmetric(A[None]), b[None])
        assert found.steps.tolist() == [k]
        torch.testing.assert_close(found.residual[0], want, rtol=1e-8, atol=0)
        true = (b - A @ found.value[0]).norm() / b.norm()
        torch.testing.assert_close(true, want, rtol=1e-8, atol=0)


def test_gmres_needs_no_more_steps_than_unknowns():
    A, b = skewed(12)[None], randn(1, 12)
    found = GMRES(rtol=1e-12)(product(A), b)
    assert found.status.tolist() == [Status.CONVERGED]
    assert found.steps.item() <= 12


@pytest.mark.parametrize("restart", [1, 3, 10])
def test_gmres_restarts(restart):
    A, b = torch.stack([skewed(20), skewed(20, seed=1)]), randn(2, 20)
    found = GMRES(max_steps=500, rtol=1e-10, restart=restart)(product(A), b)
    assert found.status.tolist() == [Status.CONVERGED] * 2
    torch.testing.assert_close(found.value, torch.linalg.solve(A, b), rtol=1e-7, atol=1e-9)
    spent = GMRES(max_steps=7, rtol=0.0, restart=restart)(product(A), b)
    assert spent.steps.tolist() == [7, 7]


def test_gmres_that_stagnates_gives_up_and_says_so():
    # A cyclic shift: no progress before step n, so that a shorter restart never makes any.
    A, b = torch.eye(8, dtype=F64).roll(1, 0)[None], torch.eye(8, dtype=F64)[:1]
    found = GMRES(max_steps=400, rtol=1e-8, restart=4)(product(A), b)
    assert found.status.tolist() == [Status.MAX_STEPS]
    assert found.residual.item() == pytest.approx(1.0)
    assert found.steps.item() < 20
    whole = GMRES(max_steps=400, rtol=1e-8, restart=8)(product(A), b)
    assert whole.status.tolist() == [Status.CONVERGED]


def test_a_restart_of_no_step_is_refused():
    with pytest.raises(ValueError, match="`restart` is 0"):
        GMRES(restart=0)


def test_bicgstab_breaks_down_without_harm():
    # A skew-symmetric matrix: ⟨r, A r⟩ = 0 in the first step.
    A = torch.stack([torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64), spd(2)])
    b = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=F64)
    found = BiCGStab(rtol=1e-8)(product(A), b)
    assert found.status.tolist() == [Status.MAX_STEPS, Status.CONVERGED]
    assert found.residual[0] <= 1.0


@pytest.mark.parametrize("seed", range(5))
def test_bicgstab_keeps_its_best_iterate(seed):
    A, b = indefinite(30, seed)[None], randn(1, 30, seed=seed)
    before = 1.0
    for steps in range(1, 30, 4):
        residual = BiCGStab(max_steps=steps, rtol=0.0)(product(A), b).residual.item()
        assert residual <= before * (1 + 1e-9)
        before = residual


@pytest.mark.parametrize("solver", [GMRES, BiCGStab, MINRES])
def test_a_preconditioned_residual_is_still_that_of_the_matrix(solver):
    scale = torch.logspace(0, 3, 15, dtype=F64)
    A = (spd(15, condition=3.0, largest=1.0) * scale * scale.unsqueeze(-1))[None]
    b = randn(1, 15)
    plain = solver(max_steps=2000, rtol=1e-7)(symmetric(A), b)
    found = solver(max_steps=2000, rtol=1e-7, preconditioner=JacobiPreconditioner())
    found = found(symmetric(A), b)
    assert found.status.tolist() == [Status.CONVERGED]
    assert found.steps.item() < plain.steps.item()
    assert (b - product(A)(found.value)).norm() <= 1.001e-7 * b.norm()


def test_normal_equations_need_the_transpose():
    with pytest.raises(StructureError, match=r"Operator\.symmetric"):
        NormalCG()(product(spd(3)[None]), randn(1, 3))


def test_normal_equations_solve_what_others_cannot():
    A, b = torch.eye(8, dtype=F64).roll(1, 0)[None], randn(1, 8)
    found = NormalCG(rtol=1e-10)(Operator(product(A), product(A.mT)), b)
    assert found.status.tolist() == [Status.CONVERGED]
    assert found.steps.tolist() == [1]
