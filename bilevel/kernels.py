"""How the gradients of the inner objective and the products with its Hessian are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

__all__ = ["Kernels", "check_kernels"]

Precision: TypeAlias = Literal["full", "tf32", "bf16"]
Products: TypeAlias = Literal["kept", "recomputed"]


@dataclass(frozen=True)
class Kernels:
    """Trades of time, memory and digits; the hypergradient's formula stays as it is.

    Args:
        compile: Compile the gradient of the inner objective with `torch.compile`, once for each
            problem and shape, which takes seconds to minutes. It pays where operations are small
            and steps many. The objective must be free of graph breaks. True: by PyTorch's default
            backend; or the name of another one, such as ``"cudagraphs"``, which only captures
            kernels, or ``"aot_eager"``, which needs no compiler. Steps that are unrolled are not
            compiled.
        precision: Of the inner solver's steps, for float32 problems: ``"full"``, ``"tf32"`` (on
            CUDA) or ``"bf16"`` (by autocast, which chooses the operations). Residuals, curvature
            products and the adjoint solve keep the precision they have without it, so that statuses
            and error estimates see what rounding did, and ``correct=True`` of an implicit method
            undoes most of it. Solvers that compare values of the objective refuse it, as does
            `Unrolled`. Costs two more gradients for each solve, of which one is rounded.
        products: ``"kept"``: the graph of the gradient is kept, and each product is one pull
            through it. ``"recomputed"``: each product makes the graph again and frees it, so that
            nothing is held between products, and a product is about half as dear again. Reverse
            mode in both: over forward mode, which would need less, PyTorch's second derivatives of
            some norms and matrix functions are wrong.

    Raises:
        ValueError: A setting is unknown; it is named.
    """

    compile: bool | str = False
    precision: Precision = "full"
    products: Products = "kept"

    def __post_init__(self) -> None:
        for name, known in (("precision", Precision), ("products", Products)):
            value = getattr(self, name)
            if value not in get_args(known):
                choices = ", ".join(repr(one) for one in get_args(known))
                raise ValueError(f"`{name}` is {value!r}; pass one of {choices}")
        if not isinstance(self.compile, bool | str) or self.compile == "":
            raise ValueError(f"`compile` is {self.compile!r}; pass True, False or a backend's name")


def check_kernels(kernels: object) -> None:
    """Refuse what is neither `Kernels` nor None.

    Raises:
        ValueError: It is not.
    """
    if not (kernels is None or isinstance(kernels, Kernels)):
        raise ValueError(f"`kernels` is {kernels!r}; pass Kernels(...), or None")
