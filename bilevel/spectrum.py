r"""The ends of a spectrum from products alone, by Lanczos' method (Lanczos, 1950).

With full reorthogonalisation, in float64 whatever the dtype of the products: the Ritz values lie
inside the spectrum, and n steps find its ends to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operator import MatVec, Operator
from .result import ritz_values
from .rows import dot, norm

__all__ = ["extreme_eigenvalues", "extreme_singular_values"]

_MOST_NUMBERS = 10**8


def extreme_eigenvalues(operator: MatVec | Operator, like: Tensor, steps: int) -> Tensor:
    """Estimate the smallest and the largest eigenvalue of each task's symmetric matrix.

    Args:
        operator: Product of each task's matrix with its row.
        like: A tensor ``[tasks, n]`` of the dtype and device that the product takes.
        steps: Lanczos steps; min(n, steps) are taken, fewer where the basis would be too large.

    Returns:
        ``[tasks, 2]``, float64: inside the spectrum, and its ends once n steps are taken. NaN where
        a product is not finite.

    Example:
        >>> import torch
        >>> matrix = torch.diag(torch.tensor([1.0, 2.0, 5.0]))
        >>> extreme_eigenvalues(lambda v: v @ matrix, torch.zeros(1, 3), steps=3).round(decimals=4)
        tensor([[1., 5.]], dtype=torch.float64)
    """
    tasks, n = like.shape
    steps = max(1, min(n, steps, _MOST_NUMBERS // max(like.numel(), 1)))
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(tasks, n, generator=generator, dtype=torch.float64).to(like.device)
    q = q / norm(q).unsqueeze(-1)
    basis = q.new_zeros(tasks, steps, n)
    table = q.new_full((tasks, steps, 2), float("nan"))
    active = torch.ones(tasks, dtype=torch.bool, device=like.device)
    size = q.new_zeros(tasks)
    for k in range(steps):
        basis[:, k] = q
        product = operator(q.to(like.dtype)).double()
        diagonal = dot(q, product)
        size = torch.maximum(size, norm(product))
        rest = product
        for _ in range(2):  # twice is enough (Parlett)
            rest = rest - torch.einsum("tk,tkn->tn", torch.einsum("tkn,tn->tk", basis, rest), basis)
        length = norm(rest)
        row = torch.stack([diagonal, length], -1)
        table[:, k] = torch.where(active.unsqueeze(-1), row, float("nan"))
        # An invariant subspace: all eigenvalues that the first vector knows of are found.
        active = active & (length > n * torch.finfo(torch.float64).eps * size)
        if not bool(active.any()):
            break
        q = torch.where(active, 1.0 / length, 0.0).unsqueeze(-1) * rest
    return ritz_values(table).to(like.device)


def extreme_singular_values(operator: Operator, like: Tensor, steps: int) -> Tensor:
    """Estimate the smallest and the largest singular value of each task's matrix, ``[tasks, 2]``.

    From the eigenvalues of AᵀA: singular values below 1e-8 of the largest drown in rounding.
    """
    transposed = operator.T

    def product(v: Tensor) -> Tensor:
        return transposed(operator(v))

    return extreme_eigenvalues(product, like, steps).clamp_min(0.0).sqrt()
