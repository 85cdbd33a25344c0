import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import Status
from bilevel.solvers import CG
from tests.helpers import product, randn, spd

F64 = torch.float64


@settings(max_examples=30)
@given(n=st.integers(1, 12), log=st.floats(0.0, 4.0), seed=st.integers(0, 10**6))
def test_random_positive_definite_systems_are_solved(n, log, seed):
    A = spd(n, condition=10**log, seed=seed, largest=1.0)[None]
    b = randn(1, n, seed=seed)
    found = CG(max_steps=400, rtol=1e-11)(product(A), b)
    assert found.status.tolist() == [Status.CONVERGED]
    assert (product(A)(found.value) - b).norm() <= 1.001e-11 * b.norm()
    assert found.residual.item() <= 1e-11


@pytest.mark.parametrize("condition", [2.0, 50.0, 1e4])
def test_the_error_falls_as_fast_as_the_bound_of_the_docstring(condition):
    A, b = spd(40, condition=condition, largest=1.0), randn(40)
    want = torch.linalg.solve(A, b)
    rate = (math.sqrt(condition) - 1) / (math.sqrt(condition) + 1)
    first = (want @ A @ want).sqrt()
    for k in (1, 5, 15):
        error = CG(max_steps=k, rtol=0.0)(product(A[None]), b[None]).value[0] - want
        assert (error @ A @ error).sqrt() <= 2 * rate**k * first * (1 + 1e-9)


def test_the_residual_reported_is_the_true_one():
    A, b = spd(10, condition=1e3)[None], randn(1, 10)
    for steps in (2, 5, 8):
        found = CG(max_steps=steps, rtol=1e-14)(product(A), b)
        true = (b - product(A)(found.value)).norm() / b.norm()
        torch.testing.assert_close(found.residual[0], true, rtol=1e-6, atol=1e-15)
        assert found.status.tolist() == [Status.MAX_STEPS]


def test_convergence_is_claimed_only_where_the_true_residual_holds():
    # float32 and κ = 1e6: the recurrence converges, the true residual cannot.
    A = spd(20, condition=1e6, largest=1.0).float()[None]
    b = randn(1, 20).float()
    found = CG(max_steps=2000, rtol=1e-7)(product(A), b)
    true = (b.double() - product(A.double())(found.value.double())).norm() / b.double().norm()
    if found.status.item() == Status.CONVERGED:
        assert true <= 1e-6
    else:
        assert found.status.item() == Status.MAX_STEPS
        assert 0.1 < found.residual.item() / true.item() < 10


def test_a_warm_start_at_the_solution_takes_no_step():
    A, b = spd(6)[None], randn(1, 6)
    found = CG(rtol=1e-8)(product(A), b, torch.linalg.solve(A, b))
    assert found.steps.tolist() == [0]
    assert found.status.tolist() == [Status.CONVERGED]


def test_a_warm_start_saves_steps():
    A, b = spd(30, condition=1e3)[None], randn(1, 30)
    cold = CG(rtol=1e-8)(product(A), b)
    near = torch.linalg.solve(A, b) + 1e-6 * randn(1, 30, seed=1)
    warm = CG(rtol=1e-8)(product(A), b, near)
    assert warm.steps.item() < cold.steps.item()
    assert warm.status.tolist() == [Status.CONVERGED]


def test_a_warm_start_that_is_not_finite_is_ignored():
    A, b = spd(4)[None], randn(1, 4)
    found = CG(rtol=1e-10)(product(A), b, torch.full((1, 4), float("nan"), dtype=F64))
    torch.testing.assert_close(found.value, torch.linalg.solve(A, b), rtol=1e-8, atol=0)


def test_every_task_has_its_own_scalars_and_stop():
    A = torch.stack([spd(8, condition=c, seed=i) for i, c in enumerate([1.0, 10.0, 1e3])])
    b = randn(3, 8) * torch.tensor([[1.0], [1e-20], [1e20]], dtype=F64)
    found = CG(rtol=1e-9)(product(A), b)
    for i in range(3):
        alone = CG(rtol=1e-9)(product(A[i : i + 1]), b[i : i + 1])
        torch.testing.assert_close(found.value[i], alone.value[0], rtol=1e-9, atol=0)
        assert found.steps[i] == alone.steps[0]
    assert found.steps[0] == 1


def test_a_nan_matrix_of_one_task_does_not_reach_the_others():
    A = torch.stack([spd(4), spd(4) * float("nan"), spd(4, seed=2)])
    b = randn(3, 4)
    found = CG(rtol=1e-10)(product(A), b)
    assert found.status.tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    for i in (0, 2):
        want = torch.linalg.solve(A[i], b[i])
        torch.testing.assert_close(found.value[i], want, rtol=1e-8, atol=0)


def test_a_nan_right_hand_side_is_not_finite():
    b = randn(2, 4)
    b[1, 2] = float("nan")
    found = CG()(product(spd(4)[None].expand(2, 4, 4)), b)
    assert found.status.tolist() == [Status.CONVERGED, Status.NON_FINITE]


def test_curvature_lies_within_the_spectrum():
    A = spd(12, condition=100.0, largest=1.0)[None]
    found = CG(rtol=1e-10)(product(A), randn(1, 12))
    assert found.curvature_min.item() >= 0.01 * (1 - 1e-9)
    assert found.curvature_min < found.curvature_max
    assert found.curvature_max.item() <= 1 + 1e-9


def test_indefinite_curvature_keeps_the_last_good_iterate():
    # b = e₁ + e₂ gives pᵀAp = 1 − ε > 0 first, and negative curvature afterwards.
    A = torch.diag(torch.tensor([1.0, -0.5], dtype=F64))[None]
    b = torch.ones(1, 2, dtype=F64)
    found = CG(rtol=1e-8)(product(A), b)
    assert found.status.tolist() == [Status.INDEFINITE]
    assert found.steps.tolist() == [1]
    # Steepest descent's first step: α = bᵀb / bᵀAb = 4.
    torch.testing.assert_close(found.value, 4 * b)
    assert found.curvature_min.item() < 0


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_dtype_is_inherited_and_scalars_are_float64(dtype):
    found = CG()(lambda v: 2 * v, torch.ones(1, 3, dtype=dtype))
    assert found.value.dtype == dtype
    assert found.residual.dtype == F64
    assert found.status.dtype == torch.int8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_steps": 0}, "`max_steps` is 0"),
        ({"rtol": -1e-3}, "`rtol` is"),
        ({"rtol": 1.0}, "`rtol` is"),
        ({"rtol": float("nan")}, "`rtol` is"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CG(**arguments)


def test_arguments_of_wrong_shape_are_named():
    with pytest.raises(ValueError, match="`rhs`"):
        CG()(lambda v: v, torch.ones(3))
    with pytest.raises(ValueError, match="`rhs`"):
        CG()(lambda v: v, torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="`start`"):
        CG()(lambda v: v, torch.ones(1, 3), torch.ones(1, 2))
    with pytest.raises(ValueError, match="`start`"):
        CG()(lambda v: v, torch.ones(1, 3), torch.ones(1, 3, dtype=F64))
