r"""Backtracking until Armijo's condition holds, with one step length for each task.

$$G(z + t d) \le G(z) + 10^{-4}\, t\, \partial_z G^\top d,
  \qquad t = 1, \tfrac12, \tfrac14, \ldots$$

Near the solution the decrease drowns in rounding: there the slope decides (the approximate Wolfe
condition of Hager and Zhang, 2005).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.flat import FlatProblem
from bilevel.rows import Choice, all_finite, column, dot

__all__ = ["backtrack"]

_ARMIJO = 1e-4
_HALVINGS = 25


def backtrack(
    flat: FlatProblem,
    z: Tensor,
    start_value: Tensor,
    start_gradient: Tensor,
    direction: Tensor,
    slope: Tensor,
    rest: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Halve each task's step until it is accepted; a task without one stays.

    Args:
        flat: The problem on stacked tasks.
        z: Where they stand, ``[tasks, n]``.
        start_value: G there, float64 ``[tasks]``.
        start_gradient: Its gradient there, ``[tasks, n]``.
        direction: A direction of descent, ``[tasks, n]``.
        slope: ⟨gradient, direction⟩, ``[tasks]``.
        rest: Tasks that are done, or have nowhere to go: they must not keep the others searching.

    Returns:
        The point, its value and gradient, and whether the task rests or found a step length.
    """
    noise = torch.finfo(z.dtype).eps ** (2 / 3) * (start_value.abs() + 1.0)
    length = torch.ones_like(slope)
    done = rest
    best_z, best_value, best_gradient = z, start_value, start_gradient
    for _ in range(_HALVINGS):
        trial = z + column(length, z) * direction
        value, gradient = flat.value_and_gradient(trial)
        value = value.double()
        armijo = value <= start_value + _ARMIJO * length * slope
        flatter = dot(gradient, direction).abs() <= 0.9 * slope.abs()
        accept = (
            ~done & (armijo | (flatter & (value <= start_value + noise))) & all_finite(gradient)
        )
        choose = Choice(accept)
        best_z = choose(trial, best_z)
        best_gradient = choose(gradient, best_gradient)
        best_value = choose(value, best_value)
        done = done | accept
        if bool(done.all()):
            break
        length = torch.where(done, length, 0.5 * length)
    return best_z, best_value, best_gradient, done
