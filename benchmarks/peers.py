"""Other libraries at the same work, where they are installed; each is checked before it is timed.

A peer is written the way its own documentation does it, one task after the other: none stacks
tasks. Install what is to be compared, such as ``pip install torchopt higher jaxopt``.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["installed", "jaxopt_implicit", "torchopt_implicit"]

Leaves = tuple[Tensor, ...]
Objective = Callable[..., Tensor]


def installed(name: str) -> bool:
    """Whether a package can be imported here."""
    return importlib.util.find_spec(name) is not None


def torchopt_implicit(
    objective: Objective,
    outer_objective: Objective,
    solve: Callable[..., Leaves],
    products: int,
) -> Callable[[Sequence[Tensor], Sequence[tuple[Any, Any]]], list[Tensor]]:
    """The mean implicit gradient over tasks by `torchopt.diff.implicit.custom_root`.

    Args:
        objective: ``(z, x, *data) -> scalar``, the regularizer included; z and x are tuples.
        outer_objective: ``(z, x, *data) -> scalar``.
        solve: ``(x, *data) -> z``, without gradient.
        products: Steps of conjugate gradients.
    """
    import torchopt

    def optimality(z: Leaves, x: Leaves, *data: Tensor) -> Leaves:
        slopes: Leaves = torch.func.grad(objective)(z, x, *data)
        return slopes

    @torchopt.diff.implicit.custom_root(
        optimality,
        argnums=1,
        solve=torchopt.linear_solve.solve_cg(maxiter=products, rtol=0.0, atol=0.0),
    )
    def solved(z: Leaves, x: Leaves, *data: Tensor) -> Leaves:
        return solve(x, *data)

    def run(x: Sequence[Tensor], tasks: Sequence[tuple[Any, Any]]) -> list[Tensor]:
        leaves = tuple(leaf.detach().requires_grad_() for leaf in x)
        total = [torch.zeros_like(leaf) for leaf in leaves]
        with warnings.catch_warnings():
            # It calls PyTorch by names that are deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            for inner, outer in tasks:
                z = solved(leaves, leaves, *inner)
                slopes = torch.autograd.grad(outer_objective(z, leaves, *outer), leaves)
                total = [a + b for a, b in zip(total, slopes, strict=True)]
        return [one / len(tasks) for one in total]

    return run


def jaxopt_implicit(
    loss: Callable[[Any, Any, Any], Any],
    inner: Tensor,
    outer: Tensor,
    training: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    products: int,
) -> Callable[[], Tensor]:
    """The gradient of a linear model by `jaxopt.implicit_diff.root_vjp`, compiled, in float64.

    Args:
        loss: ``(numpy, predictions, targets) -> scalar``, given the ``numpy`` of JAX.
        inner: The weights w at the solution.
        outer: x, of the decay ``½ Σ exp(x) w²``.
        training: A and y.
        validation: A and y.
        products: Steps of conjugate gradients.
    """
    import jax

    with warnings.catch_warnings():
        # It says at once that nobody looks after it.
        warnings.simplefilter("ignore", DeprecationWarning)
        import jaxopt

    jax.config.update("jax_enable_x64", True)
    np = jax.numpy

    def objective(w: Any, x: Any, a: Any, y: Any) -> Any:
        return loss(np, a @ w, y) + 0.5 * (np.exp(x) * w**2).sum()

    def run(w: Any, x: Any, a: Any, y: Any, av: Any, yv: Any) -> Any:
        b = jax.grad(lambda w: loss(np, av @ w, yv))(w)

        def solve(matvec: Any, rhs: Any) -> Any:
            return jaxopt.linear_solve.solve_cg(matvec, rhs, maxiter=products, tol=0.0)

        optimality = jax.grad(objective)
        return jaxopt.implicit_diff.root_vjp(optimality, w, (x, a, y), b, solve=solve)[0]

    compiled = jax.jit(run)
    given = [np.asarray(t.numpy()) for t in (inner, outer, *training, *validation)]
    return lambda: torch.from_numpy(compiled(*given).__array__().copy())
