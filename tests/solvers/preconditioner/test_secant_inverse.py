"""The compact inverse is that of the BFGS recursion, for each task's own last pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import SecantPairs
from bilevel.solvers.preconditioner.secant_inverse import SecantInverse
from tests.helpers import product, randn, spd

F64 = torch.float64


def matrices(n, tasks, seed=0, condition=10.0):
    return torch.stack([spd(n, condition, seed=seed + i) for i in range(tasks)])


def recursion(pairs, n):
    """B of one task by its definition, densely."""
    eye = torch.eye(n, dtype=F64)
    inverse = (
        eye if not pairs else eye * (pairs[-1][0] @ pairs[-1][1] / pairs[-1][1].square().sum())
    )
    for s, y in pairs:
        left = eye - torch.outer(s, y) / (s @ y)
        inverse = left @ inverse @ left.T + torch.outer(s, s) / (s @ y)
    return inverse


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 6),
    count=st.integers(1, 4),
    kept=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), max_size=9),
    seed=st.integers(0, 999),
)
def test_it_is_the_recursion_on_the_pairs_that_each_task_kept(n, count, kept, seed):
    matrix = matrices(n, 3, seed)
    inverse, histories = SecantInverse(count, randn(3, n)), [[], [], []]
    for i, flags in enumerate(kept):
        s = randn(3, n, seed=seed + 1 + i)
        y = product(matrix)(s)
        inverse.add(s, y, torch.tensor(flags))
        for history, flag, pair in zip(histories, flags, zip(s, y, strict=True), strict=True):
            history += [pair] * flag
    v = randn(3, n, seed=seed + 77)
    found = inverse(v)
    for task, history in enumerate(histories):
        want = recursion(history[-count:], n) @ v[task]
        torch.testing.assert_close(found[task], want, rtol=1e-7, atol=1e-7)
        assert bool(inverse.empty[task]) == (not history)
    again = SecantInverse.of(inverse.pairs())(v)
    torch.testing.assert_close(again, found, rtol=1e-9, atol=1e-9)


def test_a_task_that_forgets_begins_anew_and_its_neighbour_does_not():
    matrix, n = matrices(4, 2), 4
    inverse, s = SecantInverse(3, randn(2, n)), randn(2, n, seed=1)
    inverse.add(s, product(matrix)(s), torch.tensor([True, True]))
    v = randn(2, n, seed=2)
    before = inverse(v)
    inverse.forget(torch.tensor([True, False]))
    after = inverse(v)
    torch.testing.assert_close(after[0], inverse.scale[0] * v[0])
    torch.testing.assert_close(after[1], before[1])
    assert inverse.empty.tolist() == [True, False]


def test_what_an_invalid_slot_holds_is_of_no_consequence():
    matrix = matrices(3, 1)
    s = randn(3, 1, 3, seed=1)
    y = (matrix @ s.mT).mT
    spoilt = s.clone()
    spoilt[1] = float("nan")  # as uninitialised memory may be
    valid = torch.tensor([[True], [False], [True]])
    found = SecantInverse.of(SecantPairs(spoilt, y, valid))
    wanted = SecantInverse.of(SecantPairs(s[[0, 2]], y[[0, 2]], valid[[0, 2]]))
    v = randn(1, 3, seed=5)
    torch.testing.assert_close(found(v), wanted(v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_pairs_of_every_precision_give_a_direction_of_descent(dtype):
    matrix = matrices(5, 1)
    inverse = SecantInverse(10, randn(1, 5).to(dtype))
    for seed in range(12):
        s = randn(1, 5, seed=seed)
        inverse.add(s.to(dtype), product(matrix)(s).to(dtype), torch.tensor([True]))
    v = randn(1, 5, seed=99).to(dtype)
    found = inverse(v)
    assert found.dtype == dtype
    assert (found.double() * v.double()).sum() > 0
