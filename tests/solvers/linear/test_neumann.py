import pytest
import torch

from bilevel import Status
from bilevel.solvers import Neumann
from tests.helpers import product, randn, spd

F64 = torch.float64


@pytest.mark.parametrize("terms", [1, 2, 7])
def test_the_sum_is_the_series_of_the_docstring(terms):
    A, b, a = spd(5, largest=1.0), randn(5), 0.8
    power, total = b, torch.zeros(5, dtype=F64)
    for _ in range(terms):
        total = total + a * power
        power = power - a * (A @ power)
    found = Neumann(terms=terms, scale=a)(product(A[None]), b[None])
    torch.testing.assert_close(found.value[0], total, rtol=1e-12, atol=0)
    assert found.steps.tolist() == [terms]
    assert found.status.tolist() == [Status.BUDGET]


@pytest.mark.parametrize("terms", [3, 30])
def test_the_residual_obeys_the_bound_and_is_the_true_one(terms):
    A, b = spd(10, condition=20.0, largest=1.0)[None], randn(1, 10)
    found = Neumann(terms=terms, scale=1.0)(product(A), b)
    true = (b - product(A)(found.value)).norm() / b.norm()
    torch.testing.assert_close(found.residual[0], true, rtol=1e-9, atol=1e-14)
    assert true <= (1 - 1 / 20) ** terms


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_the_scale_is_found_for_each_task(size):
    A = torch.stack([spd(8, condition=5.0, seed=i) * size * 10.0**i for i in range(3)])
    b = randn(3, 8)
    found = Neumann(terms=200, rtol=1e-8)(product(A), b)
    assert found.status.tolist() == [Status.CONVERGED] * 3
    torch.testing.assert_close(found.value, torch.linalg.solve(A, b), rtol=1e-6, atol=0)


def test_a_tolerance_stops_early():
    A, b = spd(8, condition=3.0, largest=1.0)[None], randn(1, 8)
    found = Neumann(terms=500, scale=1.0, rtol=1e-6)(product(A), b)
    assert 1 < found.steps.item() < 60
    assert found.status.tolist() == [Status.CONVERGED]


def test_a_tolerance_out_of_reach_is_told():
    A, b = spd(8, condition=1e3, largest=1.0)[None], randn(1, 8)
    found = Neumann(terms=10, scale=1.0, rtol=1e-6)(product(A), b)
    assert found.status.tolist() == [Status.MAX_STEPS]


def test_one_diverging_task_does_not_reach_the_others():
    A = torch.stack([spd(4, largest=1.0), spd(4, largest=1e3), spd(4, seed=3, largest=1.0)])
    b = randn(3, 4)
    found = Neumann(terms=300, scale=1.0)(product(A), b)
    assert found.status[1] == Status.DIVERGED
    for i in (0, 2):
        alone = Neumann(terms=300, scale=1.0)(product(A[i : i + 1]), b[i : i + 1])
        torch.testing.assert_close(found.value[i], alone.value[0], rtol=1e-12, atol=0)


def test_divergence_is_proved_by_curvature_while_the_residual_still_falls():
    # The third entry diverges, but is so small that after two terms the residual has shrunk.
    A = torch.diag(torch.tensor([1.0, 1.1, 3.0], dtype=F64))[None]
    b = torch.tensor([[1.0, 1.0, 0.2]], dtype=F64)
    found = Neumann(terms=3, scale=0.9)(product(A), b)
    assert found.residual.item() < 1
    assert found.status.tolist() == [Status.DIVERGED]
    assert found.curvature_max.item() > 2 / 0.9


def test_negative_curvature_is_told():
    A = torch.diag(torch.tensor([1.0, -1.0], dtype=F64))[None]
    found = Neumann(terms=1, scale=0.1)(product(A), torch.tensor([[0.1, 1.0]], dtype=F64))
    assert found.status.item() in (Status.INDEFINITE, Status.DIVERGED)
    assert found.curvature_min.item() < 0


def test_unsymmetric_contractions_are_solved():
    A = torch.eye(6, dtype=F64) + 0.1 * randn(6, 6, seed=4)
    b = randn(1, 6)
    found = Neumann(terms=300, scale=1.0, rtol=1e-10)(product(A[None]), b)
    assert found.status.tolist() == [Status.CONVERGED]
    torch.testing.assert_close(found.value[0], torch.linalg.solve(A, b[0]), rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"terms": 0},
        {"scale": 0.0},
        {"scale": -1.0},
        {"scale": float("inf")},
        {"rtol": 1.0},
        {"rtol": -1.0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` is"):
        Neumann(**arguments)
