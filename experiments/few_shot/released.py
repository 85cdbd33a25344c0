r"""What the code released with iMAML computes, which is not what the paper states.

The inner loop takes plain gradient steps on the support loss $\hat L$, without the regularizer, and
then one step on the regularizer alone, the pull-back:

$$\phi \leftarrow \phi - \eta \nabla \hat L(\phi) \;\;(T \text{ times}), \qquad
  \phi \leftarrow \phi - \eta \lambda (\phi - \theta).$$

The operator is damped twice, by $c = 1$ on the identity and by 10 on λ:

$$g = A^{-1} \nabla L(\phi), \qquad A v = (1 + c)\, v + \frac{1}{\lambda + 10} H v,$$

where the paper has $A v = v + H v / \lambda$. Multiplied by $\lambda + 10$ this is
$(H + \lambda I + d I)\, v' = \nabla L$ with damping $d = (1 + c)(\lambda + 10) - \lambda$ and
$g = (\lambda + 10)\, v'$.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.errors import StructureError
from bilevel.flat import FlatProblem
from bilevel.inner_solver import InnerSolver
from bilevel.method import Estimate, HypergradientMethod, Start
from bilevel.pytree import PyTree
from bilevel.solvers import ImplicitCG

__all__ = ["PullBack", "ReleasedCG"]


@dataclass(frozen=True)
class PullBack(InnerSolver):
    """Gradient steps on the inner objective without its regularizer, then one on that alone.

    Args:
        lr: Learning rate η of both.
        max_steps: Gradient steps; the pull-back comes after them.
    """

    lr: float
    max_steps: int = 16
    tol: None = None

    def _init(self, flat: FlatProblem, z: Tensor) -> PyTree:
        if flat.strength is None:
            raise StructureError("PullBack needs a proximal regularizer; set one on the problem")
        # A counter: 0-d, so that nothing is differentiated through it.
        return (torch.zeros((), dtype=torch.int64),)

    def _step(self, flat: FlatProblem, z: Tensor, state: PyTree) -> tuple[Tensor, PyTree]:
        strength, center = flat.strength, flat.center
        assert strength is not None
        new = z - self.lr * (flat.gradient(z) - strength * (z - center))
        count = state[0] + 1
        if int(count) == self.max_steps:
            new = new - self.lr * strength * (new - center)
        return new, (count,)


@dataclass(frozen=True)
class ReleasedCG(HypergradientMethod):
    """The released operator, solved by conjugate gradients from zero.

    The status and the residual are those of the paper's system, which this does not solve.

    Args:
        max_steps: CG steps.
        cg_damping: c.
        strength_damping: What is added to λ inside the operator.
    """

    max_steps: int = 5
    cg_damping: float = 1.0
    strength_damping: float = 10.0

    def _compute(
        self, flat: FlatProblem, inner_solver: InnerSolver | None, weights: Tensor, start: Start
    ) -> Estimate:
        regularizer = flat.problem.regularizer
        if regularizer is None or not isinstance(regularizer.strength, int | float):
            raise StructureError("ReleasedCG needs a proximal regularizer with one fixed strength")
        strength = float(regularizer.strength)
        if strength == 0.0:
            raise StructureError("ReleasedCG divides by λ, which is 0; set a strength > 0")
        shifted = strength + self.strength_damping
        damping = (1.0 + self.cg_damping) * shifted - strength
        method = ImplicitCG(max_steps=self.max_steps, rtol=0.0, damping=damping)
        estimate = method(flat, inner_solver, weights, start)
        # The mixed derivative is −λ I, so that the method returns λ v'.
        scale = shifted / strength
        gradient = tuple(None if g is None else scale * g for g in estimate.gradient)
        return replace(estimate, gradient=gradient)
