"""Made-up handwriting: the same bits each time, and hard enough to need learning."""

import pytest
import torch

from bilevel.problems.data import EpisodeSampler, glyphs, pixel_nearest_neighbour


@pytest.fixture(scope="module")
def pool():
    return glyphs()


def test_shape_and_names(pool):
    assert pool.images.shape == (400, 20, 1, 28, 28)
    assert pool.images.dtype == torch.uint8
    assert pool.names[:2] == ("alphabet01/character01", "alphabet01/character02")
    assert pool.names[-1] == "alphabet20/character20"


def test_ink_is_black_on_white_paper_and_inside(pool):
    assert pool.images.amax((2, 3, 4)).eq(255).all()
    assert pool.images.amin((2, 3, 4)).lt(96).all()
    ink = 1 - pool.images.float().div(255).mean((2, 3, 4))
    assert ink.min() > 0.01
    assert ink.max() < 0.4
    edge = pool.images[..., [0, -1], :].ne(255).any(-1).any(-1).float().mean()
    assert edge < 0.1


def test_the_same_arguments_give_the_same_bits():
    first = glyphs(classes=9, examples=4, alphabets=2, seed=3)
    state = torch.get_rng_state()
    torch.manual_seed(8)
    again = glyphs(classes=9, examples=4, alphabets=2, seed=3)
    torch.set_rng_state(state)
    assert torch.equal(first.images, again.images)
    assert first.names == again.names
    assert len(first.names) == 9
    other = glyphs(classes=9, examples=4, alphabets=2, seed=4)
    assert not torch.equal(first.images, other.images)


def test_no_two_drawings_are_the_same(pool):
    flat = pool.images.flatten(2).flatten(0, 1)
    assert len(flat.unique(dim=0)) == len(flat)


def test_size(pool):
    small = glyphs(classes=2, examples=3, alphabets=1, size=16)
    assert small.images.shape == (2, 3, 1, 16, 16)
    assert small.images.amin((2, 3, 4)).lt(128).all()


def test_pixels_alone_do_not_solve_the_tasks(pool):
    """Chance is 0.2; a trained learner is above 0.9, and must be 20 points better than pixels."""
    _, test = pool.split((300, 100))
    accuracy = pixel_nearest_neighbour(EpisodeSampler(test, 5, 1, 15, 300)(0)).mean()
    assert 0.42 < accuracy < 0.70


def test_classes_differ_and_examples_agree(pool):
    """Drawings of a class are nearer to its mean drawing than to that of nearly any other."""
    images = pool.images.float().flatten(2)
    distance = torch.cdist(images[:, :10].flatten(0, 1), images[:, 10:].mean(1))
    own = torch.arange(400).repeat_interleave(10)
    rank = (distance < distance.gather(1, own[:, None])).sum(1).float()
    assert rank.median() < 20


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        ({"classes": 0}, "`classes` is 0"),
        ({"examples": 0}, "`examples` is 0"),
        ({"alphabets": 0}, "`alphabets` is 0"),
        ({"classes": 3, "alphabets": 4}, "`alphabets` is 4, but there are 3 classes"),
        ({"size": 7}, "`size` is 7"),
    ],
)
def test_bad_arguments(options, finding):
    with pytest.raises(ValueError, match=finding):
        glyphs(**options)
