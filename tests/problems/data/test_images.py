"""Pools of image classes: checks and splits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilevel.problems.data import ImageClasses


def numbered(classes, examples=2):
    """A pool in which the pixels of class i are all i."""
    images = torch.arange(classes, dtype=torch.float32)[:, None, None, None, None]
    return ImageClasses(
        images.expand(classes, examples, 1, 2, 2).clone(), tuple(f"c{i}" for i in range(classes))
    )


@given(
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    left=st.integers(0, 3),
    seed=st.integers(0, 2**40),
)
def test_split_parts_are_disjoint_and_keep_names_with_images(sizes, left, seed):
    pool = numbered(sum(sizes) + left)
    parts = pool.split(sizes, seed)
    assert [len(part) for part in parts] == sizes
    names = [name for part in parts for name in part.names]
    assert len(set(names)) == len(names)
    for part in parts:
        for name, images in zip(part.names, part.images, strict=True):
            assert (images == float(name[1:])).all()


def test_split_depends_on_the_seed_alone():
    pool = numbered(40)
    state = torch.get_rng_state()
    first = pool.split((30, 10), 3)
    torch.manual_seed(17)
    again = pool.split((30, 10), 3)
    assert first[0].names == again[0].names
    assert first[1].names == again[1].names
    assert first[0].names != pool.split((30, 10), 4)[0].names
    torch.set_rng_state(state)
    pool.split((30, 10), 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_split_copies_so_that_parts_share_no_memory():
    pool = numbered(4)
    part, _ = pool.split((2, 2))
    part.images.fill_(-1)
    assert (pool.images >= 0).all()


@pytest.mark.parametrize(
    ("sizes", "finding"),
    [((3, 2), "ask for 5 classes, but the pool has 4"), ((0, 2), "positive"), ((), "positive")],
)
def test_split_refuses_sizes_that_do_not_fit(sizes, finding):
    with pytest.raises(ValueError, match=finding):
        numbered(4).split(sizes)


@pytest.mark.parametrize(
    ("images", "names", "finding"),
    [
        (torch.zeros(2, 3, 4, 4), ("a", "b"), "`images` has shape"),
        (torch.zeros(2, 0, 1, 4, 4), ("a", "b"), "no empty dimension"),
        (torch.zeros(2, 3, 1, 4, 4, dtype=torch.int64), ("a", "b"), "dtype torch.int64"),
        (torch.zeros(2, 3, 1, 4, 4), ("a",), "1 entries for 2 classes"),
        (torch.zeros(2, 3, 1, 4, 4), ("a", "a"), "'a' more than once"),
    ],
)
def test_bad_pools_are_refused(images, names, finding):
    with pytest.raises(ValueError, match=finding):
        ImageClasses(images, names)


def test_to_keeps_the_names():
    pool = numbered(3).to("cpu")
    assert pool.names == ("c0", "c1", "c2")
    assert repr(pool) == "ImageClasses(3×2×1×2×2, torch.float32, cpu)"
    assert pool.examples == 2
