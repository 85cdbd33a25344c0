"""The proximal regularizer, ½ Σ strength · (inner − center)²."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ObjectiveError
from .pytree import PyTree, VectorSpec, broadcast_prefix, leaf_names, tree_flatten, tree_leaves

__all__ = ["Proximal"]


@dataclass(frozen=True)
class Proximal:
    r"""The proximal regularizer $r(x, z) = \tfrac12 \sum_i s_i (z_i - c_i(x))^2$.

    With ``center(outer) = outer`` this is the regularizer of iMAML (Rajeswaran et al., 2019,
    eq. 3), where the strength is called λ.

    Args:
        strength: The $s_i \ge 0$. A number; a pytree prefix of the inner variable (one number or
            tensor for each of its branches, 0-d or of the leaf's shape); or a function of ``outer``
            that returns either, which makes the strength learned.
        center: Function of ``outer`` that returns a pytree like the inner variable. Default: the
            identity, for which ``outer`` must have the structure and shapes of the inner variable.

    Raises:
        ValueError: A fixed strength is negative or not finite.

    Example:
        >>> Proximal(2.0)
        Proximal(strength=2.0, center=None)
        >>> learned = Proximal(lambda outer: outer["log"].exp(), lambda outer: outer["theta"])
    """

    strength: PyTree | Callable[[PyTree], PyTree] = 1.0
    center: Callable[[PyTree], PyTree] | None = None

    def __post_init__(self) -> None:
        if callable(self.strength):
            return
        for name, leaf in zip(
            leaf_names(self.strength, "strength"), tree_leaves(self.strength), strict=True
        ):
            check_strength(leaf, name)

    def center_tree(self, outer: PyTree) -> PyTree:
        """The center, a pytree like the inner variable."""
        return outer if self.center is None else self.center(outer)

    def value(self, inner: PyTree, outer: PyTree) -> Tensor:
        """r(x, z), a 0-d tensor.

        Raises:
            ObjectiveError: The center or the strength does not fit the inner variable.
        """
        vector = VectorSpec.of(inner, "inner")
        offset = vector.flatten(inner) - self.center_vector(outer, vector)
        return 0.5 * (self.strength_vector(outer, vector) * offset**2).sum()

    def center_vector(self, outer: PyTree, vector: VectorSpec) -> Tensor:
        """The center as ``[n]``.

        Raises:
            ObjectiveError: The center has another structure, shape, dtype or device than the
                inner variable.
        """
        tree = self.center_tree(outer)
        leaves, spec = tree_flatten(tree)
        if spec == vector.spec and vector.fits(leaves):
            return vector.joined(leaves)
        tree = vector.matched(tree)
        try:
            other = VectorSpec.of(tree, "center")
        except ValueError as error:
            raise ObjectiveError(f"Proximal's center: {error}") from error
        for attribute in ("spec", "shapes", "dtype", "device"):
            mine, theirs = getattr(vector, attribute), getattr(other, attribute)
            if mine != theirs:
                identity = (
                    "; `center` is None, so `outer` itself is the center: pass "
                    "Proximal(strength, center=lambda outer: ...)"
                    if self.center is None
                    else ""
                )
                raise ObjectiveError(
                    f"Proximal's center has {_WORDS[attribute]} {_show(theirs)} but the inner "
                    f"variable has {_show(mine)}{identity}"
                )
        return vector.flatten(tree)

    def strength_vector(self, outer: PyTree, vector: VectorSpec) -> Tensor:
        """The strength as a 0-d tensor, or as ``[n]`` where it varies.

        Raises:
            ObjectiveError: The strength is no prefix of the inner variable or does not broadcast.
        """
        strength = self.strength(outer) if callable(self.strength) else self.strength
        if isinstance(strength, Tensor | int | float) and not _spreads(strength):
            return _tensor(strength, vector).reshape(())
        if isinstance(strength, Tensor) and vector.shapes == (strength.shape,):
            return _tensor(strength, vector).reshape(-1)
        example = vector.unflatten(torch.empty(vector.n, device="meta"))
        try:
            values = broadcast_prefix(strength, example, "Proximal's strength")
        except ValueError as error:
            raise ObjectiveError(str(error)) from error
        parts = []
        for value, shape, name in zip(values, vector.shapes, vector.names, strict=True):
            tensor = _tensor(value, vector)
            try:
                parts.append(tensor.expand(shape).reshape(-1))
            except RuntimeError as error:
                raise ObjectiveError(
                    f"Proximal's strength for `{name}` has shape {tuple(tensor.shape)}, which does "
                    f"not broadcast to {tuple(shape)}"
                ) from error
        return torch.cat(parts)


_WORDS = {"spec": "structure", "shapes": "shapes", "dtype": "dtype", "device": "device"}


def check_strength(value: object, name: str) -> None:
    """Raise unless every entry of ``value`` is finite and ≥ 0.

    Raises:
        ValueError: It is not.
    """
    if isinstance(value, Tensor):
        lowest: object = None
        bad = False
        if value.numel():
            low, high = (end.item() for end in value.detach().aminmax())  # of a NaN, NaN
            bad, lowest = not (low >= 0 and math.isfinite(high)), low
    elif isinstance(value, int | float):
        bad, lowest = not (value >= 0 and math.isfinite(value)), value
    else:
        raise ValueError(f"`{name}` is a {type(value).__name__}; a strength is a number or tensor")
    if bad:
        raise ValueError(
            f"`{name}` has the entry {lowest}; a proximal strength is finite and ≥ 0: to learn it, "
            "use Proximal(lambda outer: outer['log_strength'].exp(), ...)"
        )


def _spreads(strength: Tensor | float) -> bool:
    return isinstance(strength, Tensor) and strength.numel() != 1


def _tensor(value: Tensor | float, vector: VectorSpec) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(dtype=vector.dtype, device=vector.device)
    return torch.full((), float(value), dtype=vector.dtype, device=vector.device)


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return str([tuple(shape) for shape in value])
    return str(value)
