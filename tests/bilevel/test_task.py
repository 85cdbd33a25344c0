import pickle

import pytest
import torch

from bilevel import Stream, Task, TaskBatch
from bilevel.task import group_by_shape


def make(i, n=2, **kwargs):
    return Task({"x": torch.full((n,), float(i)), "kind": "a"}, (torch.tensor(i),), **kwargs)


def test_stacking_and_unstacking_is_the_identity():
    tasks = [make(i, key=f"k{i}", weight=1.0 + i) for i in range(3)]
    batch = Task.stack(tasks)
    assert len(batch) == batch.count == 3
    assert batch.inner_batch["x"].shape == (3, 2)
    assert batch.inner_batch["kind"] == "a"
    assert batch.outer_batch[0].tolist() == [0, 1, 2]
    assert batch.keys == ("k0", "k1", "k2")
    assert batch.weights.tolist() == [1.0, 2.0, 3.0]
    for one, task in zip(batch.unstack(), tasks, strict=True):
        assert torch.equal(one.inner_batch["x"], task.inner_batch["x"])
        assert (one.key, one.weight, one.inner_batch["kind"]) == (task.key, task.weight, "a")


def test_selecting_keeps_the_order_asked_for():
    batch = Task.stack([make(i, key=i, weight=1.0 + i) for i in range(4)])
    picked = batch.select(torch.tensor([3, 1]))
    assert picked.keys == (3, 1)
    assert picked.weights.tolist() == [4.0, 2.0]
    assert picked.inner_batch["x"][:, 0].tolist() == [3.0, 1.0]


def test_selecting_from_tasks_without_data_keeps_their_number():
    assert TaskBatch(count=5).select(torch.tensor([4, 0])).count == 2


def test_conversion_leaves_integers_alone():
    moved = Task.stack([make(0), make(1)]).to(torch.float64)
    assert moved.inner_batch["x"].dtype == torch.float64
    assert moved.outer_batch[0].dtype == torch.int64
    moved = Task.stack([make(0), make(1)]).to("meta")
    assert moved.outer_batch[0].device.type == "meta"


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_is_finite_and_not_negative(weight):
    with pytest.raises(ValueError, match="`weight` is"):
        Task(weight=weight)
    with pytest.raises(ValueError, match="`weights`"):
        TaskBatch(weights=torch.tensor([1.0, weight]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "number of tasks is unknown"),
        ({"inner_batch": torch.ones(3), "outer_batch": torch.ones(2)}, "number of tasks differs"),
        ({"inner_batch": torch.ones(3), "keys": (1, 2)}, "number of tasks differs"),
        ({"inner_batch": torch.ones(3), "count": 2}, "number of tasks differs"),
        ({"inner_batch": {"a": torch.tensor(1.0)}}, r"`inner_batch\['a'\]` has no dimension"),
        ({"inner_batch": torch.ones(0, 3)}, "holds no task"),
    ],
    ids=["nothing", "data", "keys", "count", "0-d", "empty"],
)
def test_a_batch_that_does_not_hold_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TaskBatch(**arguments)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Task({"x": torch.ones(3), "kind": "a"}, (torch.tensor(1),)), r"\['x'\]` has shape"),
        (
            Task({"x": torch.ones(2).double(), "kind": "a"}, (torch.tensor(1),)),
            r"\['x'\]` has dtype",
        ),
        (
            Task({"x": torch.ones(2, device="meta"), "kind": "a"}, (torch.tensor(1),)),
            r"\['x'\]` has device",
        ),
        (Task({"x": torch.ones(2), "kind": "b"}, (torch.tensor(1),)), r"\['kind'\]` differs"),
        (Task({"x": torch.ones(2)}, (torch.tensor(1),)), "another structure"),
        (Task(Stream(lambda step: None), (torch.tensor(1),)), "is a Stream in some"),
    ],
    ids=["shape", "dtype", "device", "value", "structure", "stream"],
)
def test_tasks_that_do_not_stack_are_refused_by_leaf(other, message):
    with pytest.raises(ValueError, match=message):
        Task.stack([make(0), other])


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Task.stack([])
    with pytest.raises(ValueError, match="empty"):
        group_by_shape([])


def test_grouping_puts_equal_shapes_together_and_remembers_positions():
    tasks = [make(0, 2), make(1, 3), make(2, 2), make(3, 3), make(4, 5)]
    groups = group_by_shape(tasks)
    assert [where for _, where in groups] == [[0, 2], [1, 3], [4]]
    assert [batch.count for batch, _ in groups] == [2, 2, 1]


def test_grouping_tells_dtypes_structures_and_values_apart():
    base = torch.ones(2)
    tasks = [Task(base), Task(base.double()), Task([base]), Task({"a": base}), Task((base, 1))]
    tasks += [Task((base, 2)), Task(base, base), Task(base)]
    assert [where for _, where in group_by_shape(tasks)] == [[0, 7], [1], [2], [3], [4], [5], [6]]


def test_grouping_refuses_what_is_no_task_by_position():
    with pytest.raises(ValueError, match=r"`task\[1\]` is a Tensor"):
        group_by_shape([make(0), torch.ones(2)])


def test_a_task_used_again_is_not_stacked_again_unless_its_data_are_others():
    data = {"x": torch.ones(3), "name": "a"}
    task = Task(data, data)
    first = task.alone
    assert task.alone is first
    assert first.only(first.inner_batch)["x"].data_ptr() == data["x"].data_ptr()
    data["x"] = torch.zeros(2)
    assert task.alone.only(task.alone.inner_batch)["x"].shape == (2,)
    data["name"] = "b"
    assert task.alone.inner_batch["name"] == "b"
    batch = TaskBatch({"x": torch.ones(1, 3)})
    assert batch.only(batch.inner_batch)["x"].shape == (3,)
    batch.inner_batch["x"] = torch.ones(1, 4)
    assert batch.only(batch.inner_batch)["x"].shape == (4,)


def test_what_is_kept_of_a_task_is_not_pickled():
    task = Task((torch.ones(3),))
    size = len(pickle.dumps(task))
    task.alone.only(task.alone.inner_batch)
    assert len(pickle.dumps(task)) == size
    assert pickle.loads(pickle.dumps(task)).alone.count == 1
