"""Episodes: what a step decides, what tasks hold, and that nothing leaks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel.problems.data import EpisodeSampler, ImageClasses


def marked(classes, examples, dtype=torch.float32):
    """Each image tells its class, its example and how it is turned.

    The corners are 1, 2, 3, 4 in reading order; the middle holds class and example.
    """
    images = torch.zeros(classes, examples, 1, 4, 4)
    images[..., 0, 0], images[..., 0, 3] = 1, 2
    images[..., 3, 0], images[..., 3, 3] = 3, 4
    images[..., 1:3, 1:3] = (
        torch.arange(classes)[:, None, None, None, None] * 100
        + torch.arange(examples)[None, :, None, None, None]
    ).float()
    return ImageClasses(images.to(dtype), tuple(f"c{i}" for i in range(classes)))


def turns(images):
    """Which corner holds 1, for each image."""
    corners = images[..., 0, [0, 0, 3, 3], [0, 3, 0, 3]]
    return corners.argmin(-1)


def read(batch):
    """Class, example, turn and label of all images, and whether each is a query."""
    (support, support_labels), (query, query_labels) = batch.inner_batch, batch.outer_batch
    images = torch.cat([support, query], 1)
    code = images[:, :, 0, 1, 1].round().long()
    labels = torch.cat([support_labels, query_labels], 1)
    return code // 100, code % 100, turns(images), labels


@settings(deadline=None)
@given(
    ways=st.integers(1, 5),
    shots=st.integers(1, 3),
    queries=st.integers(1, 4),
    tasks=st.integers(1, 6),
    seed=st.integers(-(2**70), 2**70),
    step=st.integers(0, 2**70),
)
def test_tasks_are_what_they_should_be(ways, shots, queries, tasks, seed, step):
    sampler = EpisodeSampler(marked(6, 7), ways, shots, queries, tasks, seed=seed, rotations=True)
    batch = sampler(step)
    images, labels = batch.inner_batch
    assert images.shape == (tasks, ways * shots, 1, 4, 4)
    assert images.dtype == torch.float32
    assert labels.shape == (tasks, ways * shots)
    assert labels.dtype == torch.int64
    assert batch.outer_batch[0].shape == (tasks, ways * queries, 1, 4, 4)
    assert batch.outer_batch[1].shape == (tasks, ways * queries)
    assert batch.keys == tuple((seed, step, i) for i in range(tasks))

    classes, examples, turn, labels = read(batch)
    for task in range(tasks):
        drawn = list(zip(classes[task].tolist(), examples[task].tolist(), strict=True))
        assert len(set(drawn)) == len(drawn), "support and query are disjoint"
        by_label = {}
        for label, name, angle in zip(
            labels[task].tolist(), classes[task].tolist(), turn[task].tolist(), strict=True
        ):
            by_label.setdefault(label, set()).add((name, angle))
        assert sorted(by_label) == list(range(ways))
        assert all(len(seen) == 1 for seen in by_label.values()), "one class and turn per label"
        assert len({name for seen in by_label.values() for name, _ in seen}) == ways


def test_all_four_turns_occur_and_are_rotations():
    batch = EpisodeSampler(marked(5, 4), 5, 1, 1, 40, rotations=True)(0)
    images = batch.inner_batch[0]
    assert turns(images).unique().tolist() == [0, 1, 2, 3]
    upright = marked(5, 4).images[0, 0, 0]
    corners = [0, 0, 3, 3], [0, 3, 0, 3]
    rotations = {tuple(upright.rot90(k)[corners].tolist()) for k in range(4)}
    seen = {tuple(image[0][corners].tolist()) for image in images.flatten(0, 1)}
    assert seen == rotations


def test_without_rotations_images_stay_upright():
    batch = EpisodeSampler(marked(5, 4), 5, 1, 1, 10)(0)
    assert (turns(batch.inner_batch[0]) == 0).all()


def test_a_step_depends_on_seed_and_step_alone():
    pool = marked(30, 6)
    sampler = EpisodeSampler(pool, 5, 1, 2, 3, seed=4, rotations=True)
    first = sampler(11)
    state = torch.get_rng_state()
    for step in range(5):
        sampler(step)
    again = EpisodeSampler(pool, 5, 1, 2, 3, seed=4, rotations=True)(11)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.inner_batch[0], again.inner_batch[0])
    assert torch.equal(first.outer_batch[0], again.outer_batch[0])
    others = [sampler(12), EpisodeSampler(pool, 5, 1, 2, 3, seed=5)(11)]
    # A seed and a step must not trade places.
    others.append(EpisodeSampler(pool, 5, 1, 2, 3, seed=11)(4))
    for other in others:
        assert not torch.equal(first.inner_batch[0], other.inner_batch[0])
        assert not set(first.keys) & set(other.keys)


def test_every_class_and_example_is_drawn():
    classes, examples, _, _ = read(EpisodeSampler(marked(9, 5), 3, 1, 2, 300)(0))
    assert classes.unique().tolist() == list(range(9))
    assert examples.unique().tolist() == list(range(5))
    assert classes.flatten().bincount().float().div(300 * 9 / 9).sub(1).abs().max() < 0.25


def test_bytes_become_floats_up_to_one():
    images = torch.full((3, 2, 1, 4, 4), 255, dtype=torch.uint8)
    batch = EpisodeSampler(ImageClasses(images, ("a", "b", "c")), 2, 1, 1, 1)(0)
    assert (batch.inner_batch[0] == 1.0).all()


def test_sampling_does_not_change_the_pool():
    pool = marked(5, 4)
    before = pool.images.clone()
    EpisodeSampler(pool, 5, 2, 2, 4)(0).inner_batch[0].zero_()
    assert torch.equal(pool.images, before)


def test_split_pools_share_no_class_in_their_tasks():
    train, test = marked(12, 4).split((8, 4), seed=1)
    seen = [
        read(EpisodeSampler(part, 4, 1, 2, 100)(0))[0].unique().tolist() for part in (train, test)
    ]
    assert len(seen[0]) == 8
    assert len(seen[1]) == 4
    assert not set(seen[0]) & set(seen[1])


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"ways": 6}, "`ways` is 6, but the pool has 5 classes"),
        ({"queries": 4}, r"1 \+ 4, but each class has 4 examples"),
        ({"shots": 0}, "`shots` is 0"),
        ({"tasks": 0}, "`tasks` is 0"),
    ],
)
def test_impossible_tasks_are_refused(changes, finding):
    with pytest.raises(ValueError, match=finding):
        EpisodeSampler(
            marked(5, 4), **({"ways": 5, "shots": 1, "queries": 1, "tasks": 1} | changes)
        )


def test_turning_needs_square_images():
    pool = ImageClasses(torch.zeros(2, 2, 1, 3, 4), ("a", "b"))
    with pytest.raises(ValueError, match="leave it False"):
        EpisodeSampler(pool, 2, 1, 1, 1, rotations=True)
    assert EpisodeSampler(pool, 2, 1, 1, 1)(0).inner_batch[0].shape[-1] == 4


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="`step` is -1"):
        EpisodeSampler(marked(2, 2), 2, 1, 1, 1)(-1)


def test_numbers_are_those_of_splitmix64():
    """Against the generator written in Python's own integers."""
    from bilevel.problems.data.episodes import _numbers

    def splitmix64(state):
        word = (1 << 64) - 1
        x = state & word
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        return x ^ (x >> 31)

    # The first outputs from the state 1234567, as published with the generator.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    step = 0x9E3779B97F4A7C15
    assert [splitmix64(1234567 + step * i) for i in (1, 2, 3)] == published
    for key in (1234567, 2**63 + 5, 2**64 - 1, 0):
        found = _numbers(key, 1000, torch.device("cpu"))
        expected = [splitmix64(key + step * i) for i in range(1, 1001)]
        assert [x % 2**64 for x in found.tolist()] == expected


def test_every_class_example_and_turn_is_as_likely():
    pool = marked(8, 5)
    sampler = EpisodeSampler(pool, 2, 1, 1, tasks=4000, seed=3, rotations=True)
    classes, examples, turned, _ = read(sampler(0))
    for values, kinds in ((classes, 8), (examples, 5), (turned, 4)):
        shares = torch.bincount(values.flatten(), minlength=kinds) / values.numel()
        # Sixteen thousand draws: five standard errors are at most 0.017.
        assert (shares - 1 / kinds).abs().max() < 0.018


def test_the_support_images_come_along_as_reference():
    sampler = EpisodeSampler(marked(6, 7), 3, 2, 1, tasks=2, reference=True)
    batch = sampler(0)
    assert batch.outer_batch[2].equal(batch.inner_batch[0])
    plain = EpisodeSampler(marked(6, 7), 3, 2, 1, tasks=2)(0)
    assert len(plain.outer_batch) == 2
    assert plain.outer_batch[0].equal(batch.outer_batch[0])
