import pytest
import torch

from bilevel import Status
from bilevel.status import members, residual_status, status_codes, worst

ORDER = ["CONVERGED", "BUDGET", "MAX_STEPS", "INDEFINITE", "DIVERGED", "NON_FINITE"]


def test_statuses_are_ordered_from_best_to_worst():
    assert [status.name for status in sorted(Status)] == ORDER


@pytest.mark.parametrize("status", Status, ids=lambda s: s.name)
def test_every_status_says_what_it_means_and_what_to_do(status):
    assert status.meaning
    assert status.cure


def test_ok_and_usable_are_what_the_design_says():
    assert [s.name for s in Status if s.ok] == ORDER[:2]
    assert [s.name for s in Status if not s.usable] == ORDER[4:]


@pytest.mark.parametrize(
    ("residual", "asked", "want"),
    [
        (0.5, True, Status.CONVERGED),
        (1.0, True, Status.CONVERGED),
        (1.1, True, Status.MAX_STEPS),
        (1.1, False, Status.BUDGET),
        (float("nan"), True, Status.NON_FINITE),
        (float("nan"), False, Status.NON_FINITE),
        (float("inf"), True, Status.NON_FINITE),
    ],
)
def test_the_residual_decides(residual, asked, want):
    codes = residual_status(torch.tensor([residual]), torch.ones(1), asked=asked)
    assert members(codes) == (want,)
    assert codes.dtype == torch.int8


def test_worst_is_taken_task_by_task():
    a = torch.tensor([0, 5, 1], dtype=torch.int8)
    b = torch.tensor([2, 0, 1], dtype=torch.int8)
    assert members(worst(a, b)) == (Status.MAX_STEPS, Status.NON_FINITE, Status.BUDGET)


def test_codes_fill_a_batch():
    codes = status_codes(3, Status.DIVERGED, torch.device("cpu"))
    assert members(codes) == (Status.DIVERGED,) * 3
