"""The ends of a spectrum, against dense eigenvalues."""

import pytest
import torch

from bilevel import Operator
from bilevel.spectrum import extreme_eigenvalues, extreme_singular_values
from tests.helpers import product, randn, spd


def ends(matrices):
    return torch.linalg.eigvalsh(matrices)[:, [0, -1]]


def test_all_steps_find_the_ends_of_each_task():
    matrices = randn(4, 30, 30)
    matrices = matrices + matrices.mT
    found = extreme_eigenvalues(product(matrices), torch.zeros(4, 30).double(), steps=100)
    torch.testing.assert_close(found, ends(matrices), rtol=1e-12, atol=1e-12)


def test_full_reorthogonalisation_finds_the_small_end_at_high_condition():
    matrices = torch.stack([spd(80, 1e10, largest=1.0), spd(80, 1e3, seed=1, largest=5.0)])
    found = extreme_eigenvalues(product(matrices), torch.zeros(2, 80).double(), steps=80)
    torch.testing.assert_close(found, ends(matrices), rtol=1e-4, atol=0.0)


def test_few_steps_stay_inside_and_find_the_large_end():
    matrices = spd(200, 1e4, largest=3.0).unsqueeze(0)
    found = extreme_eigenvalues(product(matrices), torch.zeros(1, 200).double(), steps=40)
    low, high = found[0].tolist()
    assert 3e-4 < low < 0.1
    assert high == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize("value", [2.0, -1.0, 0.0])
def test_a_multiple_of_the_identity_has_one_eigenvalue(value):
    found = extreme_eigenvalues(lambda v: value * v, torch.zeros(3, 7).double(), steps=7)
    torch.testing.assert_close(found, torch.full((3, 2), value).double())


def test_tasks_that_end_early_leave_the_others_alone():
    matrices = torch.stack([torch.eye(12).double(), spd(12, 50.0), torch.ones(12, 12).double()])
    found = extreme_eigenvalues(product(matrices), torch.zeros(3, 12).double(), steps=12)
    torch.testing.assert_close(found, ends(matrices), rtol=1e-9, atol=1e-12)


def test_float32_products_are_enough_for_float32_accuracy():
    matrices = spd(40, 100.0).unsqueeze(0)
    found = extreme_eigenvalues(product(matrices.float()), torch.zeros(1, 40), steps=40)
    torch.testing.assert_close(found, ends(matrices), rtol=1e-5, atol=0.0)


def test_singular_values_of_a_general_matrix():
    matrices = randn(2, 15, 15)
    operator = Operator(product(matrices), product(matrices.mT))
    found = extreme_singular_values(operator, torch.zeros(2, 15).double(), steps=15)
    values = torch.linalg.svdvals(matrices)
    torch.testing.assert_close(found, values[:, [-1, 0]], rtol=1e-6, atol=0.0)


def test_what_is_not_finite_is_nan():
    found = extreme_eigenvalues(lambda v: v / 0.0, torch.zeros(2, 4).double(), steps=4)
    assert found.isnan().all()


def test_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    extreme_eigenvalues(lambda v: v, torch.zeros(1, 4), steps=4)
    assert torch.equal(before, torch.get_rng_state())
