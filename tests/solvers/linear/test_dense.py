import pytest
import torch

from bilevel import Status
from bilevel.solvers import Dense
from tests.helpers import product, randn, spd

F64 = torch.float64


def test_systems_of_any_symmetry_are_solved():
    A = torch.stack([spd(5), randn(5, 5, seed=1) + 6 * torch.eye(5, dtype=F64)])
    b = randn(2, 5)
    found = Dense()(product(A), b)
    torch.testing.assert_close(found.value, torch.linalg.solve(A, b), rtol=1e-11, atol=0)
    assert found.status.tolist() == [Status.CONVERGED] * 2


def test_the_spectrum_of_a_symmetric_matrix_is_reported():
    found = Dense()(product(spd(6, condition=100.0, largest=2.0)[None]), randn(1, 6))
    assert found.curvature_min.item() == pytest.approx(0.02)
    assert found.curvature_max.item() == pytest.approx(2.0)


def test_the_spectrum_of_an_unsymmetric_matrix_is_unknown():
    A = torch.tensor([[[1.0, 5.0], [0.0, 1.0]]], dtype=F64)
    found = Dense()(product(A), randn(1, 2))
    assert found.curvature_min.isnan().all()
    assert found.status.tolist() == [Status.CONVERGED]


def test_an_indefinite_matrix_is_solved_all_the_same_and_told():
    A = torch.diag(torch.tensor([1.0, -2.0], dtype=F64))[None]
    found = Dense()(product(A), torch.ones(1, 2, dtype=F64))
    torch.testing.assert_close(found.value, torch.tensor([[1.0, -0.5]], dtype=F64))
    assert found.status.tolist() == [Status.INDEFINITE]
    assert found.curvature_min.item() == -2.0


def test_a_singular_matrix_is_not_finite_and_does_not_disturb_its_neighbour():
    A = torch.stack([torch.zeros(3, 3, dtype=F64), spd(3)])
    b = randn(2, 3)
    found = Dense()(product(A), b)
    assert found.status.tolist() == [Status.NON_FINITE, Status.CONVERGED]
    want = torch.linalg.solve(A[1], b[1])
    torch.testing.assert_close(found.value[1], want, rtol=1e-11, atol=0)


def test_a_nan_matrix_is_not_finite_and_does_not_disturb_its_neighbour():
    A = torch.stack([spd(3) * float("nan"), spd(3)])
    found = Dense()(product(A), randn(2, 3))
    assert found.status.tolist() == [Status.NON_FINITE, Status.CONVERGED]


def test_float32_systems_are_factorised_in_float64():
    A = spd(8, condition=1e5, largest=1.0).float()[None]
    b = randn(1, 8).float()
    want = torch.linalg.solve(A.double(), b.double())
    found = Dense()(product(A), b)
    assert found.value.dtype == torch.float32
    torch.testing.assert_close(found.value.double(), want, rtol=1e-6, atol=0)


def test_larger_systems_than_permitted_are_refused():
    with pytest.raises(ValueError, match="more than `max_n` = 3"):
        Dense(max_n=3)(lambda v: v, torch.ones(1, 4))


@pytest.mark.parametrize("arguments", [{"rtol": 0.0}, {"rtol": 1.0}, {"max_n": 0}], ids=str)
def test_settings_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` is"):
        Dense(**arguments)
