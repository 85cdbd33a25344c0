"""Pytrees: nested dicts, lists and tuples of tensors, seen as named leaves or as one flat vector.

The only module that touches PyTorch's own pytree functions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as _torch_pytree

__all__ = ["PyTree", "VectorSpec", "broadcast_prefix", "leaf_names", "tree_flatten", "tree_leaves"]
__all__ += ["tree_map", "tree_unflatten"]

PyTree: TypeAlias = Any
"""A tensor, or a dict, list or tuple of pytrees. Typed as ``Any``: its shape is the user's."""

TreeSpec: TypeAlias = Any

_LEAF: TreeSpec = _torch_pytree.tree_flatten(0)[1]


def tree_flatten(tree: PyTree) -> tuple[list[Any], TreeSpec]:
    """Return the leaves of ``tree`` in a fixed order, and its structure."""
    if isinstance(tree, Tensor):
        return [tree], _LEAF
    kind = type(tree)
    # Data and parameters are most often one level of tensors, whose structure is known beforehand.
    if kind is dict:
        if all(isinstance(leaf, Tensor) for leaf in tree.values()):
            return list(tree.values()), _one_level("dict", tuple(tree))
    elif kind in (tuple, list) and all(isinstance(leaf, Tensor) for leaf in tree):
        return list(tree), _one_level(kind.__name__, len(tree))
    return _torch_pytree.tree_flatten(tree)


def tree_unflatten(leaves: Sequence[Any], spec: TreeSpec) -> PyTree:
    """Rebuild the tree of structure ``spec`` from its leaves."""
    if spec is _LEAF:
        (leaf,) = leaves
        return leaf
    if spec.num_nodes == len(leaves) + 1:
        if spec.type is tuple:
            return tuple(leaves)
        if spec.type is list:
            return list(leaves)
        if spec.type is dict:
            return dict(zip(spec.context, leaves, strict=True))
    return _torch_pytree.tree_unflatten(list(leaves), spec)


@lru_cache(maxsize=256)
def _one_level(kind: str, places: Any) -> TreeSpec:
    """The structure of a dict with those keys, or of a list or tuple of that length."""
    makers: dict[str, Callable[[], PyTree]] = {
        "dict": lambda: dict.fromkeys(places, 0),
        "list": lambda: [0] * places,
        "tuple": lambda: (0,) * places,
    }
    return _torch_pytree.tree_flatten(makers[kind]())[1]


def tree_leaves(tree: PyTree) -> list[Any]:
    """Return the leaves of ``tree`` in a fixed order."""
    return tree_flatten(tree)[0]


def tree_map(function: Callable[..., Any], tree: PyTree, *others: PyTree) -> PyTree:
    """Apply ``function`` to the corresponding leaves of trees of one structure."""
    if not others:
        return _mapped(function, tree)
    leaves, spec = tree_flatten(tree)
    columns = [tree_leaves(matched(other, tree)) for other in others]
    for column in columns:
        if len(column) != len(leaves):
            raise ValueError(f"trees differ: {len(leaves)} leaves against {len(column)}")
    return tree_unflatten([function(*row) for row in zip(leaves, *columns, strict=True)], spec)


def _mapped(function: Callable[[Any], Any], tree: PyTree) -> PyTree:
    """`tree_map` of one tree, whose containers are most often plain, in a third of the time."""
    kind = type(tree)
    if kind is tuple or kind is list:
        return kind(_mapped(function, one) for one in tree)
    if kind is dict:
        return {key: _mapped(function, one) for key, one in tree.items()}
    if isinstance(tree, Tensor):
        return function(tree)
    leaves, spec = tree_flatten(tree)
    return tree_unflatten([function(leaf) for leaf in leaves], spec)


def leaf_names(tree: PyTree, root: str) -> list[str]:
    """Name every leaf the way a user would reach it, such as ``outer['weight'][0]``."""
    paths, _ = _torch_pytree.tree_flatten_with_path(tree)
    return [root + _torch_pytree.keystr(path) for path, _ in paths]


def broadcast_prefix(prefix: PyTree, tree: PyTree, what: str) -> list[Any]:
    """Return one value of ``prefix`` for each leaf of ``tree``.

    A leaf of ``prefix`` stands for the whole subtree of ``tree`` at its place.

    Raises:
        ValueError: ``prefix`` is no prefix of ``tree``.
    """
    if not isinstance(prefix, dict | list | tuple):
        return [prefix] * len(tree_leaves(tree))
    if isinstance(prefix, dict):
        matches = isinstance(tree, dict) and prefix.keys() == tree.keys()
    else:
        matches = isinstance(tree, list | tuple) and len(tree) == len(prefix)
    if not matches:
        raise ValueError(
            f"{what} is no prefix of the inner variable: {_describe(prefix)} against "
            f"{_describe(tree)}; pass one value, or the same keys as the inner variable"
        )
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    return [leaf for key in keys for leaf in broadcast_prefix(prefix[key], tree[key], what)]


@dataclass(frozen=True)
class VectorSpec:
    """How a pytree of floating tensors is laid out in one vector of length ``n``.

    ``keys`` are those of a dict of tensors, which parameters of a network are: it is rebuilt faster
    than a tree.
    """

    spec: TreeSpec
    shapes: tuple[torch.Size, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    root: str = "inner"
    keys: tuple[Any, ...] | None = None

    @classmethod
    def of(cls, tree: PyTree, root: str = "inner") -> VectorSpec:
        """Read the layout from a tree.

        Raises:
            ValueError: A leaf is no floating tensor, or leaves differ in dtype or device.
        """
        leaves, spec = tree_flatten(tree)
        if not leaves:
            raise ValueError(f"`{root}` holds no tensor; return at least one floating leaf")
        if all(isinstance(leaf, Tensor) and leaf.numel() == 0 for leaf in leaves):
            raise ValueError(f"`{root}` holds no number; return at least one non-empty leaf")
        check_floating(leaves, tree, root)
        for i, leaf in enumerate(leaves):
            for attribute in ("dtype", "device"):
                first, other = getattr(leaves[0], attribute), getattr(leaf, attribute)
                if first != other:
                    names = leaf_names(tree, root)
                    raise ValueError(
                        f"`{names[i]}` has {attribute} {other} but `{names[0]}` has {first}; "
                        f"the inner variable has one {attribute}: convert with `.to({first!r})`"
                    )
        return cls(
            spec,
            tuple(leaf.shape for leaf in leaves),
            tuple(leaf.numel() for leaf in leaves),
            leaves[0].dtype,
            leaves[0].device,
            root,
            tuple(tree) if _is_flat(tree) else None,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the leaves."""
        return tuple(leaf_names(tree_unflatten(range(len(self.sizes)), self.spec), self.root))

    @cached_property
    def n(self) -> int:
        """Length of the vector."""
        return sum(self.sizes)

    def matched(self, tree: PyTree) -> PyTree:
        """The tree with its dicts in the order of this layout."""
        return matched(tree, tree_unflatten(range(len(self.sizes)), self.spec))

    def fits(self, leaves: Sequence[Any]) -> bool:
        """Whether leaves, in this order, are laid out like this."""
        return all(
            isinstance(leaf, Tensor)
            and leaf.shape == shape
            and leaf.dtype == self.dtype
            and leaf.device == self.device
            for leaf, shape in zip(leaves, self.shapes, strict=True)
        )

    def flatten(self, tree: PyTree, batch_dims: int = 0) -> Tensor:
        """Concatenate the leaves of ``tree``, keeping ``batch_dims`` leading dimensions."""
        return self.joined(tree_leaves(self.matched(tree)), batch_dims)

    def joined(self, leaves: Sequence[Tensor], batch_dims: int = 0) -> Tensor:
        """Concatenate leaves that are in order."""
        parts = [leaf.reshape((*leaf.shape[:batch_dims], -1)) for leaf in leaves]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def parts(self, vector: Tensor) -> list[Tensor]:
        """Cut ``[..., n]`` into the tree's leaves, leading dimensions kept."""
        lead = vector.shape[:-1]
        if len(self.sizes) == 1:
            return [vector.reshape((*lead, *self.shapes[0]))]
        parts = vector.split(self.sizes, -1)
        shapes = [(*lead, *shape) for shape in self.shapes] if lead else self.shapes
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def views(self, vector: Tensor) -> list[Tensor]:
        """`parts` of a vector without a graph, in half the time."""
        if len(self.sizes) == 1:
            shape = self.shapes[0]
            plain = vector.shape == shape
            return [vector if plain else vector.reshape((*vector.shape[:-1], *shape))]
        vector = vector.contiguous()
        lead, strides = vector.shape[:-1], vector.stride()[:-1]
        first = vector.storage_offset()
        return [
            vector.as_strided((*lead, *shape), (*strides, *stride), first + offset)
            for shape, stride, offset in self._places
        ]

    @cached_property
    def _places(self) -> list[tuple[torch.Size, tuple[int, ...], int]]:
        """Shape, strides and offset of each leaf."""
        offsets = itertools.accumulate(self.sizes, initial=0)
        strides = (torch.empty(shape, device="meta").stride() for shape in self.shapes)
        return list(zip(self.shapes, strides, offsets, strict=False))

    def tree(self, leaves: Sequence[Tensor]) -> PyTree:
        """The tree with these leaves."""
        if self.keys is not None:
            return dict(zip(self.keys, leaves, strict=True))
        return tree_unflatten(leaves, self.spec)

    def unflatten(self, vector: Tensor) -> PyTree:
        """The tree whose leaves are `parts`."""
        return self.tree(self.parts(vector))


def check_floating(leaves: Sequence[Any], tree: PyTree, root: str) -> None:
    """Raise unless the leaves of a tree are real floating tensors.

    Raises:
        ValueError: One is not; the message names it.
    """
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            # Names cost more than all else here: they are made for the message only.
            _refuse_leaf(leaf, leaf_names(tree, root)[i])


def _refuse_leaf(leaf: Any, name: str) -> NoReturn:
    if not isinstance(leaf, Tensor):
        raise ValueError(
            f"`{name}` is a {type(leaf).__name__}; pass a floating tensor, "
            f"such as torch.tensor({leaf!r})"
            if isinstance(leaf, int | float)
            else f"`{name}` is a {type(leaf).__name__}; pass a floating tensor"
        )
    raise ValueError(
        f"`{name}` is {leaf.dtype}; only floating tensors have gradients: "
        f"pass it in the batch, or convert it with `.float()`"
    )


def _is_flat(tree: PyTree) -> bool:
    return type(tree) is dict and all(isinstance(leaf, Tensor) for leaf in tree.values())


def matched(tree: PyTree, template: PyTree) -> PyTree:
    """The tree with the keys of its dicts in the order of ``template``, where both have the same.

    Two dicts with the same keys are equal to their author; leaves are paired by position.
    """
    if isinstance(template, dict) and isinstance(tree, dict) and tree.keys() == template.keys():
        return {key: matched(tree[key], template[key]) for key in template}
    if type(tree) in (list, tuple) and type(tree) is type(template) and len(tree) == len(template):
        pairs = zip(tree, template, strict=True)
        return type(tree)(matched(one, other) for one, other in pairs)
    return tree


def _describe(tree: PyTree) -> str:
    if isinstance(tree, dict):
        return f"dict of {sorted(map(str, tree))}"
    if isinstance(tree, list | tuple):
        return f"{type(tree).__name__} of {len(tree)}"
    return type(tree).__name__
