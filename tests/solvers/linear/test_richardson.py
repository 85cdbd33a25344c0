import pytest
import torch

from bilevel import Operator, Status
from bilevel.solvers import JacobiPreconditioner, Neumann, Richardson
from tests.helpers import product, randn, spd

F64 = torch.float64


def test_without_a_preconditioner_it_is_the_neumann_series():
    A, b = spd(8, largest=1.0)[None], randn(1, 8)
    one = Richardson(max_steps=7, rtol=0.0, step=0.8)(product(A), b)
    other = Neumann(terms=7, scale=0.8)(product(A), b)
    assert torch.equal(one.value, other.value)


def test_a_preconditioner_saves_steps():
    scale = torch.logspace(0, 2, 10, dtype=F64)
    off = 0.05 * randn(10, 10)
    A = ((torch.eye(10, dtype=F64) + off + off.mT) * scale * scale.unsqueeze(-1))[None]
    operator, b = Operator.symmetric(product(A)), randn(1, 10)
    plain = Richardson(max_steps=500, rtol=1e-6)(operator, b)
    found = Richardson(max_steps=500, rtol=1e-6, preconditioner=JacobiPreconditioner())(operator, b)
    assert plain.status.tolist() == [Status.MAX_STEPS]
    assert found.status.tolist() == [Status.CONVERGED]
    assert found.steps.item() < 60


def test_a_preconditioner_that_does_not_contract_is_told():
    # Entries twice the diagonal: I − M A has eigenvalue −2 n.
    A, b = (torch.eye(6, dtype=F64) + 2)[None], randn(1, 6)
    found = Richardson(preconditioner=JacobiPreconditioner())(Operator.symmetric(product(A)), b)
    assert found.status.tolist() == [Status.DIVERGED]
    assert found.value.isfinite().all()


@pytest.mark.parametrize("arguments", [{"step": 0.0}, {"step": float("inf")}], ids=str)
def test_settings_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="`step` is"):
        Richardson(**arguments)
