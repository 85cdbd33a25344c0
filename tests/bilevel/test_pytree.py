import pytest
import torch

from bilevel.pytree import (
    VectorSpec,
    broadcast_prefix,
    leaf_names,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

TREE = {
    "scalar": torch.tensor(1.0),
    "list": [torch.arange(2.0), (torch.ones(2, 3),)],
    "empty": torch.zeros(0),
}


def test_flattening_and_unflattening_is_the_identity():
    leaves, spec = tree_flatten(TREE)
    again = tree_unflatten(leaves, spec)
    assert again.keys() == TREE.keys()
    assert isinstance(again["list"][1], tuple)
    assert all(a is b for a, b in zip(tree_leaves(again), leaves, strict=True))


def test_leaves_are_named_as_a_user_would_reach_them():
    names = leaf_names(TREE, "outer")
    assert set(names) == {
        "outer['scalar']",
        "outer['list'][0]",
        "outer['list'][1][0]",
        "outer['empty']",
    }
    for name, leaf in zip(names, tree_leaves(TREE), strict=True):
        assert eval(name, {"outer": TREE}) is leaf


def test_a_bare_tensor_is_named_by_its_root():
    assert leaf_names(torch.ones(2), "inner") == ["inner"]


def test_tree_map_takes_several_trees():
    total = tree_map(lambda a, b: a + b, TREE, TREE)
    assert torch.equal(total["list"][1][0], torch.full((2, 3), 2.0))


def test_tree_map_refuses_trees_that_differ():
    with pytest.raises(ValueError, match="4 leaves against 1"):
        tree_map(lambda a, b: a, TREE, torch.ones(1))


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)], ids=str)
def test_a_vector_is_cut_back_into_its_tree(lead):
    vector = VectorSpec.of(TREE)
    assert vector.n == 9
    batched = tree_map(lambda x: x.expand((*lead, *x.shape)).clone(), TREE)
    flat = vector.flatten(batched, batch_dims=len(lead))
    assert flat.shape == (*lead, 9)
    again = vector.unflatten(flat)
    for a, b in zip(tree_leaves(again), tree_leaves(batched), strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)


@pytest.mark.parametrize("lead", [(), (4,)], ids=str)
def test_a_single_zero_dimensional_leaf_is_a_vector_of_one(lead):
    vector = VectorSpec.of(torch.tensor(2.0))
    assert vector.n == 1
    flat = torch.arange(4.0)[:4].reshape(4, 1) if lead else torch.tensor([2.0])
    assert vector.unflatten(flat).shape == lead
    assert torch.equal(vector.flatten(vector.unflatten(flat), batch_dims=len(lead)), flat)


def test_a_vector_spec_keeps_dtype_and_device():
    vector = VectorSpec.of([torch.ones(1, dtype=torch.float16, device="meta")])
    assert vector.dtype == torch.float16
    assert vector.device == torch.device("meta")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "`inner` holds no tensor"),
        ({"a": 1.0}, r"`inner\['a'\]` is a float; .*torch.tensor\(1.0\)"),
        ({"a": "text"}, r"`inner\['a'\]` is a str"),
        ({"a": torch.tensor(1)}, r"`inner\['a'\]` is torch.int64"),
        ({"a": torch.tensor(1j)}, r"`inner\['a'\]` is torch.complex64"),
        (
            {"a": torch.ones(1), "b": torch.ones(1).double()},
            r"`inner\['b'\]` has dtype torch.float64 but `inner\['a'\]` has torch.float32",
        ),
        (
            {"a": torch.ones(1), "b": torch.ones(1, device="meta")},
            r"`inner\['b'\]` has device meta",
        ),
    ],
    ids=["empty", "float", "text", "integer", "complex", "dtype", "device"],
)
def test_what_is_no_vector_is_refused_by_name(tree, message):
    with pytest.raises(ValueError, match=message):
        VectorSpec.of(tree)


def test_a_prefix_stands_for_whole_branches():
    tree = {"a": [1, 2], "b": (3, {"c": 4})}
    assert broadcast_prefix(7, tree, "it") == [7, 7, 7, 7]
    assert broadcast_prefix({"a": 1, "b": 2}, tree, "it") == [1, 1, 2, 2]
    assert broadcast_prefix({"b": (5, 6), "a": [8, 9]}, tree, "it") == [8, 9, 5, 6]


def test_a_prefix_keeps_the_order_of_the_leaves():
    # Dictionaries are flattened in their own order, whatever that of the prefix.
    tree = {"b": 1, "a": 2}
    named = dict(
        zip(leaf_names(tree, ""), broadcast_prefix({"a": "A", "b": "B"}, tree, "it"), strict=True)
    )
    assert named == {"['b']": "B", "['a']": "A"}


@pytest.mark.parametrize(
    "prefix", [{"a": 1}, {"a": 1, "b": 1, "c": 1}, [1, 2], {"a": [1], "b": 1}], ids=str
)
def test_what_is_no_prefix_is_refused(prefix):
    with pytest.raises(ValueError, match="strength is no prefix of the inner variable"):
        broadcast_prefix(prefix, {"a": [1, 2], "b": 3}, "strength")
