r"""The Nyström approximation of a positive semidefinite matrix from its products with few probes.

$$\hat A = (A\Omega)\,(\Omega^\top A \Omega)^{+}\,(A\Omega)^\top = U \Lambda U^\top$$

With columns of the identity for probes $\Omega$ it is the classical column method (Williams and
Seeger, 2001), with Gaussian ones the randomised one (Gittens and Mahoney, 2016). The small shift
that makes it stable is that of Frangella, Tropp and Udell (2023, Algorithm 2.1). They factorise by
Cholesky; the eigendecomposition here also takes a matrix that is not positive semidefinite, and
leaves its negative part out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.operator import Operator
from bilevel.rows import norm

__all__ = ["LowRank", "nystrom"]


@dataclass(frozen=True)
class LowRank:
    """A = U Λ Uᵀ approximately, in float64.

    Attributes:
        basis: U, ``[tasks, n, rank]``, orthonormal columns.
        values: Λ, ``[tasks, rank]``, descending, ≥ 0.
        core: Eigenvalues of Ωᵀ A Ω, ``[tasks, rank]``, ascending: Rayleigh quotients of A.
        finite: Tasks whose products were finite, ``[tasks]``; the others hold zeros.
    """

    basis: Tensor
    values: Tensor
    core: Tensor
    finite: Tensor


def nystrom(operator: Operator, probes: Tensor, like: Tensor) -> LowRank:
    """Approximate each task's matrix.

    Args:
        operator: A.
        probes: Ω with orthonormal columns, ``[n, rank]``, float64; the same for every task.
        like: A tensor ``[tasks, n]`` of the dtype and device of the products.
    """
    vectors = probes.T.to(like.dtype).unsqueeze(1)
    sketch = operator.block(vectors.expand(-1, *like.shape)).double().permute(1, 2, 0)
    finite = sketch.isfinite().all(-1).all(-1)
    sketch = torch.where(finite[:, None, None], sketch, 0.0)
    # Relative to each task's own size, out of reach of overflow.
    size = norm(sketch.flatten(1))
    size = torch.where(size > 0, size, 1.0)[:, None, None]
    core = probes.T @ (sketch / size)
    quotients = torch.linalg.eigvalsh((core + core.mT) / 2)
    shift = torch.finfo(like.dtype).eps
    shifted = sketch / size + shift * probes
    core = probes.T @ shifted
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    kept = values > torch.finfo(torch.float64).eps * values.abs().amax(-1, keepdim=True)
    root = torch.where(kept, values.abs().rsqrt(), 0.0)
    basis, singular, _ = torch.linalg.svd(
        shifted @ (vectors * root.unsqueeze(-2)), full_matrices=False
    )
    size = size.squeeze(-1)
    return LowRank(basis, (singular**2 - shift).clamp_min(0.0) * size, quotients * size, finite)
