"""What CG does about negative curvature, learns of the spectrum, and keeps for its next use."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import Operator, SolveError, Status, StructureError
from bilevel.solvers import CG, MINRES, JacobiPreconditioner, RecyclingPreconditioner
from bilevel.solvers.linear.lanczos import smallest_ritz_value
from tests.helpers import product, randn, spd

F64 = torch.float64


def symmetric(A):
    return Operator.symmetric(product(A))


def with_values(values, seed=0):
    n = len(values)
    basis = torch.linalg.qr(randn(n, n, seed=seed))[0]
    return basis @ torch.diag(torch.as_tensor(values, dtype=F64)) @ basis.mT


def mixed(seed=0):
    """A definite task between two indefinite ones."""
    matrices = [
        with_values(torch.linspace(-0.5, 2.0, 10), seed),
        spd(10, largest=1.0, seed=seed),
        with_values(torch.linspace(-3.0, 1.0, 10), seed + 1),
    ]
    return torch.stack(matrices), randn(3, 10, seed=seed)


def true_residual(A, b, value):
    return (b - product(A)(value)).norm(dim=-1) / b.norm(dim=-1)


STATUSES = [Status.INDEFINITE, Status.CONVERGED, Status.INDEFINITE]


@pytest.mark.parametrize("policy", ["truncate", "damp", "ggn", "minres"])
@pytest.mark.parametrize("seed", [0, 5])
def test_every_policy_tells_and_leaves_good_tasks_as_they_are(policy, seed):
    A, b = mixed(seed)
    operator = replace(symmetric(A), gauss_newton=product(A @ A + torch.eye(10, dtype=F64)))
    plain = CG(rtol=1e-9)(operator, b)
    found = CG(rtol=1e-9, indefinite=policy)(operator, b)
    assert found.status.tolist() == STATUSES
    assert torch.equal(found.value[1], plain.value[1])
    assert found.steps[1] == plain.steps[1]
    torch.testing.assert_close(found.residual, true_residual(A, b, found.value))
    assert (found.curvature_min[[0, 2]] < 0).all()
    assert (found.damping is not None) == (policy == "damp")


def test_the_error_names_tasks_finding_and_cure():
    A, b = mixed()
    with pytest.raises(SolveError, match=r"tasks \[0, 2\].*pᵀAp / pᵀp = -.*`indefinite`"):
        CG(indefinite="error")(symmetric(A), b)
    found = CG(indefinite="error")(symmetric(A[1:2]), b[1:2])
    assert found.status.tolist() == [Status.CONVERGED]


@settings(max_examples=20)
@given(low=st.floats(-100.0, -1e-4), n=st.integers(2, 15), seed=st.integers(0, 10**6))
def test_the_damping_is_about_the_least_that_helps(low, n, seed):
    A, b = with_values(torch.linspace(low, 1.0, n), seed)[None], randn(1, n, seed=seed)
    found = CG(rtol=1e-9, indefinite="damp")(symmetric(A), b)
    if found.status.item() == Status.CONVERGED:  # negative curvature was not met
        assert found.damping.item() == 0.0
        return
    damped = symmetric(A).damped(found.damping)
    again = CG(rtol=1e-9)(damped, b)
    assert again.status.item() < Status.INDEFINITE
    torch.testing.assert_close(found.value, again.value)
    half = CG(rtol=1e-9)(symmetric(A).damped(found.damping / 2), b)
    assert half.status.item() == Status.INDEFINITE
    assert found.damping.item() <= 2.001 * -low


def test_damping_is_zero_where_none_was_needed():
    A, b = mixed()
    found = CG(indefinite="damp")(symmetric(A), b)
    assert found.damping[1] == 0.0
    assert (found.damping[[0, 2]] > 0).all()
    good = CG(indefinite="damp")(symmetric(A[1:2]), b[1:2])
    assert good.damping.tolist() == [0.0]


def test_a_zero_matrix_is_damped_too():
    b = randn(1, 4)
    found = CG(indefinite="damp")(symmetric(torch.zeros(1, 4, 4, dtype=F64)), b)
    assert found.status.tolist() == [Status.INDEFINITE]
    torch.testing.assert_close(found.value * found.damping, b, rtol=1e-4, atol=0)


def test_ggn_solves_with_the_gauss_newton_matrix():
    A, b = mixed()
    G = A @ A + torch.eye(10, dtype=F64)
    operator = replace(symmetric(A), gauss_newton=product(G))
    found = CG(rtol=1e-10, indefinite="ggn")(operator, b)
    want = torch.linalg.solve(G, b)
    torch.testing.assert_close(found.value[[0, 2]], want[[0, 2]], rtol=1e-7, atol=1e-9)


def test_ggn_without_a_gauss_newton_matrix_is_refused_with_a_cure():
    A, b = mixed()
    with pytest.raises(StructureError, match="`predict` and `loss`"):
        CG(indefinite="ggn")(symmetric(A), b)
    assert CG(indefinite="ggn")(symmetric(A[1:2]), b[1:2]).status.tolist() == [Status.CONVERGED]


def test_minres_finds_the_saddle():
    A, b = mixed()
    found = CG(rtol=1e-10, indefinite="minres")(symmetric(A), b)
    torch.testing.assert_close(found.value, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-8)
    assert found.residual.max() <= 1e-9


@pytest.mark.parametrize("policy", ["damp", "minres"])
def test_policies_work_with_a_preconditioner(policy):
    A, b = mixed()
    found = CG(rtol=1e-8, indefinite=policy, preconditioner=JacobiPreconditioner())(symmetric(A), b)
    assert found.status[1] == Status.CONVERGED
    assert found.value.isfinite().all()
    torch.testing.assert_close(found.residual, true_residual(A, b, found.value))


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="`indefinite` is 'ignore'; pass one of: truncate, error"):
        CG(indefinite="ignore")


# The Lanczos matrix


def ritz(table):
    """Ritz values of one task, by an independent path."""
    table = table[table[:, 0].isfinite()]
    off = table[:-1, 1]
    T = torch.diag(table[:, 0]) + torch.diag(off, 1) + torch.diag(off, -1)
    return torch.linalg.eigvalsh(T)


@pytest.mark.parametrize("solver", [CG, MINRES])
def test_ritz_values_lie_in_the_spectrum_and_find_its_ends(solver):
    A = torch.stack([spd(30, condition=c, seed=i, largest=1.0) for i, c in enumerate([10.0, 1e3])])
    b = randn(2, 30)
    errors = []
    for steps in (4, 12, 28):
        found = solver(max_steps=steps, rtol=0.0)(symmetric(A), b)
        assert found.lanczos.shape == (2, steps, 2)
        for i, bottom in enumerate([0.1, 1e-3]):
            values = ritz(found.lanczos[i])
            assert values.min() >= bottom * (1 - 1e-6)
            assert values.max() <= 1 + 1e-9
        errors.append([1 - values.max(), values.min() - bottom])
    assert errors[0][0] > errors[1][0] >= errors[2][0] - 1e-12
    assert errors[2][0] < 1e-9
    assert errors[0][1] > errors[1][1] > errors[2][1]


def test_cg_and_minres_build_the_same_matrix():
    A, b = spd(15, largest=1.0)[None], randn(1, 15)
    one = CG(max_steps=8, rtol=0.0)(symmetric(A), b).lanczos
    other = MINRES(max_steps=8, rtol=0.0)(symmetric(A), b).lanczos
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_the_lanczos_matrix_ends_with_its_task():
    A = torch.stack([torch.eye(8, dtype=F64), spd(8)])
    found = CG(rtol=1e-10)(symmetric(A), randn(2, 8))
    assert found.steps[0] == 1
    torch.testing.assert_close(found.lanczos[0, 0, 0].item(), 1.0)
    assert found.lanczos[0, 1:].isnan().all()
    assert found.lanczos[1, : found.steps[1], 0].isfinite().all()


def test_at_most_128_steps_are_recorded():
    A, b = spd(200, condition=1e5, largest=1.0)[None], randn(1, 200)
    assert CG(max_steps=150, rtol=0.0)(symmetric(A), b).lanczos.shape == (1, 128, 2)


def test_negative_curvature_is_seen_by_the_ritz_values():
    A, b = mixed()
    found = CG(rtol=1e-9)(symmetric(A), b)
    low = smallest_ritz_value(found.lanczos)
    for i in range(3):
        torch.testing.assert_close(low[i], ritz(found.lanczos[i])[0], rtol=1e-9, atol=1e-12)
    assert (low[[0, 2]] < 0).all()
    assert (low >= torch.linalg.eigvalsh(A)[:, 0] - 1e-9).all()


def test_without_a_step_there_is_no_ritz_value():
    found = CG()(symmetric(spd(3)[None]), torch.zeros(1, 3, dtype=F64))
    assert found.lanczos.shape == (1, 0, 2)
    assert smallest_ritz_value(found.lanczos).tolist() == [float("inf")]


@pytest.mark.parametrize("solver", [CG, MINRES])
def test_a_preconditioned_solve_tells_nothing_of_the_matrix(solver):
    solver = solver(preconditioner=JacobiPreconditioner())
    assert solver(symmetric(spd(4)[None]), randn(1, 4)).lanczos is None


# Pairs


def test_the_first_pairs_are_kept():
    A, b = spd(20, condition=100.0, largest=1.0)[None].expand(2, 20, 20), randn(2, 20)
    b[1] = 0.0
    found = CG(rtol=1e-8, preconditioner=RecyclingPreconditioner(pairs=4))(symmetric(A), b)
    pairs = found.pairs
    assert pairs.s.shape == pairs.y.shape == (4, 2, 20)
    assert pairs.valid.tolist() == [[True, False]] * 4
    for s, y in zip(pairs.s[:, 0], pairs.y[:, 0], strict=True):
        torch.testing.assert_close(A[0] @ s, y)
        assert s.norm().item() == pytest.approx(1.0)
    # Conjugate directions of one solve.
    gram = pairs.s[:, 0] @ pairs.y[:, 0].T
    assert (gram - gram.diag().diag()).abs().max() < 1e-6 * gram.diag().max()


def test_a_short_solve_keeps_older_pairs_in_front():
    A, b = spd(12, condition=50.0, largest=1.0)[None], randn(1, 12)
    recycling = RecyclingPreconditioner(pairs=6)
    first = CG(rtol=1e-8, preconditioner=recycling)(symmetric(A), b).pairs
    operator = replace(symmetric(A), recycled_pairs=first)
    second = CG(max_steps=2, rtol=0.0, preconditioner=recycling)(operator, randn(1, 12, seed=1))
    assert second.steps.tolist() == [2]
    assert torch.equal(second.pairs.s[:4], first.s[2:])
    assert second.pairs.valid.all()
    assert not torch.equal(second.pairs.s[4:], first.s[4:])
    # None at all keeps every one; fewer or more slots keep the newest.
    third = CG(preconditioner=recycling)(operator, torch.zeros(1, 12, dtype=F64))
    assert torch.equal(third.pairs.s, first.s)
    zero = torch.zeros(1, 12, dtype=F64)
    fewer = CG(preconditioner=RecyclingPreconditioner(pairs=2))(operator, zero).pairs
    assert torch.equal(fewer.s, first.s[4:])
    more = CG(preconditioner=RecyclingPreconditioner(pairs=8))(operator, zero).pairs
    assert torch.equal(more.s[2:], first.s)
    assert more.valid[:, 0].tolist() == [False] * 2 + [True] * 6


def test_nothing_is_kept_unasked():
    assert CG()(symmetric(spd(4)[None]), randn(1, 4)).pairs is None
