import pytest
import torch

from bilevel import Operator, Status
from bilevel.solvers import CG, Nystrom
from tests.helpers import product, randn, spd

F64 = torch.float64


def low_rank(n, rank, seed=0):
    factor = randn(n, rank, seed=seed)
    return factor @ factor.mT


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_the_value_is_that_of_the_papers_formula(rank):
    n, rho = 12, 0.1
    H, b = spd(n, condition=20.0, largest=1.0), randn(n)
    index = torch.arange(rank) * n // rank
    C, M = H[:, index], H[index][:, index]
    inner = torch.linalg.solve(M + C.mT @ C / rho, C.mT @ b)
    want = b / rho - C @ inner / rho**2
    found = Nystrom(rank=rank, rho=rho)(product(H[None]), b[None])
    torch.testing.assert_close(found.value[0], want, rtol=1e-8, atol=1e-10)
    assert found.steps.tolist() == [rank]
    assert found.status.tolist() == [Status.BUDGET]


def test_a_matrix_of_low_rank_is_inverted_with_its_damping():
    H = torch.stack([low_rank(30, 5, seed=i) for i in range(2)])
    b = randn(2, 30)
    found = Nystrom(rank=8, rho=0.5)(product(H), b)
    want = torch.linalg.solve(H + 0.5 * torch.eye(30, dtype=F64), b)
    torch.testing.assert_close(found.value, want, rtol=1e-8, atol=1e-9)


def test_the_residual_is_that_of_the_undamped_system():
    H, b = spd(10, largest=1.0)[None], randn(1, 10)
    found = Nystrom(rank=10, rho=0.5, rtol=1e-3)(product(H), b)
    true = (b - product(H)(found.value)).norm() / b.norm()
    torch.testing.assert_close(found.residual[0], true)
    assert found.status.tolist() == [Status.MAX_STEPS]


def test_more_columns_than_unknowns_are_all_of_them():
    H, b = spd(6, largest=1.0)[None], randn(1, 6)
    found = Nystrom(rank=50, rho=1e-12, rtol=1e-8)(product(H), b)
    assert found.status.tolist() == [Status.CONVERGED]
    assert found.steps.tolist() == [6]


def test_a_negative_block_is_told():
    H = torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=F64))[None]
    found = Nystrom(rank=3, rho=0.1)(product(H), torch.ones(1, 3, dtype=F64))
    assert found.status.tolist() == [Status.INDEFINITE]
    assert found.curvature_min.item() == pytest.approx(-2.0)
    assert found.curvature_max.item() == pytest.approx(3.0)


def test_the_result_is_the_same_at_every_call():
    H, b = spd(9)[None], randn(1, 9)
    one, two = (Nystrom(rank=4)(Operator.symmetric(product(H)), b).value for _ in range(2))
    assert torch.equal(one, two)


def test_what_the_columns_miss_is_told_by_the_residual():
    H, b = spd(20, condition=100.0, largest=100.0)[None], randn(1, 20)
    found = Nystrom(rank=10, rho=0.01, rtol=1e-2)(product(H), b)
    assert found.status.tolist() == [Status.MAX_STEPS]
    assert found.residual.item() > 1
    assert CG(rtol=1e-2)(product(H), b).status.tolist() == [Status.CONVERGED]


@pytest.mark.parametrize(
    "arguments",
    [{"rank": 0}, {"rho": 0.0}, {"rho": float("inf")}, {"rho": float("nan")}, {"rtol": 1.0}],
    ids=str,
)
def test_settings_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` is"):
        Nystrom(**arguments)
