import subprocess
import sys

import pytest
import torch

from bilevel import Operator, Status, Structure, StructureError
from bilevel.solvers import SciPy
from tests.helpers import product, randn, spd

F64 = torch.float64
SYMMETRIC = ["cg", "minres"]
GENERAL = ["gmres", "lgmres", "bicgstab", "qmr", "lsmr", "lsqr", "gcrotmk", "tfqmr"]


@pytest.mark.parametrize("name", SYMMETRIC + GENERAL)
def test_every_solver_of_scipy_solves_symmetric_systems(name):
    A = torch.stack([spd(15, condition=50.0, seed=i) * 10.0**i for i in (-3, 0, 3)])
    b = randn(3, 15)
    found = SciPy(name, rtol=1e-8, max_steps=200)(Operator.symmetric(product(A)), b)
    assert found.status.tolist() == [Status.CONVERGED] * 3
    torch.testing.assert_close(found.value, torch.linalg.solve(A, b), rtol=1e-5, atol=1e-6)
    assert (found.steps > 0).all()


@pytest.mark.parametrize("name", GENERAL)
def test_general_solvers_solve_systems_without_symmetry(name):
    A, b = torch.eye(12, dtype=F64) + 0.1 * randn(2, 12, 12, seed=3), randn(2, 12)
    found = SciPy(name, rtol=1e-8)(Operator(product(A), product(A.mT)), b)
    assert found.status.tolist() == [Status.CONVERGED] * 2
    torch.testing.assert_close(found.value, torch.linalg.solve(A, b), rtol=1e-5, atol=1e-7)
    assert SciPy(name).needs == Structure.GENERAL


@pytest.mark.parametrize("name", SYMMETRIC)
def test_symmetric_solvers_say_what_they_need(name):
    assert SciPy(name).needs == Structure.SYMMETRIC


@pytest.mark.parametrize("name", ["qmr", "lsmr", "lsqr"])
def test_a_transpose_that_is_not_known_is_told(name):
    with pytest.raises(StructureError, match="transposed"):
        SciPy(name)(product(spd(3)[None]), randn(1, 3))


def test_options_are_passed_on():
    A, b = spd(30, condition=1e4, largest=1.0)[None], randn(1, 30)
    short = SciPy("gmres", max_steps=2, options={"restart": 3})(product(A), b)
    assert short.status.tolist() == [Status.MAX_STEPS]
    assert short.steps.item() < 20


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="`name` is 'spsolve'; pass one of: cg, minres"):
        SciPy("spsolve")


def test_scipy_is_not_imported_before_it_is_used():
    code = "import sys, bilevel.solvers; sys.exit('scipy.sparse.linalg' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_minres_that_stops_early_by_its_own_measure_is_asked_for_more():
    q, _ = torch.linalg.qr(randn(100, 100, seed=1))
    A = (q * torch.logspace(-4, 0, 100, dtype=F64)) @ q.T
    b = randn(1, 100, seed=2)
    found = SciPy("minres", rtol=1e-6, max_steps=1000)(Operator.symmetric(product(A[None])), b)
    assert found.status.tolist() == [Status.CONVERGED]
    assert (b - found.value @ A).norm() <= 1e-6 * b.norm()
    assert found.steps.item() < 1000
