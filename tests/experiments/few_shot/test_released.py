"""What the released code computes, by its own formulas."""

import pytest
import torch

from bilevel import Proximal, StructureError, Task, hypergradient, problem_from, solve_inner
from bilevel.experiments.few_shot.released import PullBack, ReleasedCG
from tests.helpers import randn, spd

F64 = torch.float64
A, c = spd(5, condition=20.0, largest=2.0), randn(5, seed=1)


def loss(z, x, batch):
    return 0.5 * (z - c) @ A @ (z - c)


def problem(strength=2.0):
    return problem_from(loss, lambda z, x, batch: (batch * z).sum(), Proximal(strength))


def test_the_inner_loop_is_plain_descent_and_one_pull_back():
    x, lr, strength = randn(5, seed=2), 0.1, 2.0
    phi = x.clone()
    for _ in range(4):
        phi = phi - lr * A @ (phi - c)
    phi = phi - lr * strength * (phi - x)
    found = solve_inner(problem(strength), x, Task(None, x), inner_solver=PullBack(lr, 4))
    torch.testing.assert_close(found.inner, phi)


@pytest.mark.parametrize("damping", [0.0, 1.0])
@pytest.mark.parametrize("extra", [0.0, 10.0])
def test_the_operator_is_the_released_one(damping, extra):
    """A v = (1 + c) v + H v / (λ + extra), solved to the end."""
    x, v, strength = randn(5, seed=2), randn(5, seed=3), 2.0
    matrix = (1 + damping) * torch.eye(5, dtype=F64) + A / (strength + extra)
    method = ReleasedCG(max_steps=20, cg_damping=damping, strength_damping=extra)
    found = hypergradient(
        problem(strength), x, Task(None, v), inner_solver=PullBack(0.1, 4), method=method
    )
    torch.testing.assert_close(found.gradient, torch.linalg.solve(matrix, v))


def test_its_steps_are_those_of_cg_on_the_released_operator():
    """Scaling a system changes no CG iterate: five steps here are five steps there."""
    x, b, strength = randn(5, seed=2), randn(5, seed=3), 2.0
    matrix = 2 * torch.eye(5, dtype=F64) + A / 12
    g, r = torch.zeros_like(b), b.clone()
    p = r.clone()
    for _ in range(2):
        ap = matrix @ p
        alpha = (r @ r) / (p @ ap)
        g, new = g + alpha * p, r - alpha * ap
        p, r = new + (new @ new) / (r @ r) * p, new
    method = ReleasedCG(max_steps=2)
    found = hypergradient(
        problem(strength), x, Task(None, b), inner_solver=PullBack(0.1, 4), method=method
    )
    torch.testing.assert_close(found.gradient, g)


def test_without_damping_it_is_the_paper_s():
    from bilevel.solvers import ImplicitCG

    x, v = randn(5, seed=2), randn(5, seed=3)
    settings = {"inner_solver": PullBack(0.1, 4)}
    plain = ReleasedCG(max_steps=20, cg_damping=0.0, strength_damping=0.0)
    ours = hypergradient(problem(), x, Task(None, v), method=plain, **settings)
    paper = hypergradient(problem(), x, Task(None, v), method=ImplicitCG(rtol=1e-12), **settings)
    torch.testing.assert_close(ours.gradient, paper.gradient)


def test_both_need_a_fixed_proximal_regularizer():
    bare = problem_from(loss, loss, initial_inner=lambda x, batch: x)
    with pytest.raises(StructureError, match="PullBack needs a proximal regularizer"):
        solve_inner(bare, randn(5), Task(), inner_solver=PullBack(0.1, 2))
    learned = problem_from(
        lambda z, x, batch: loss(z, x["theta"], batch),
        lambda z, x, batch: z.sum(),
        Proximal(lambda x: x["log"].exp(), lambda x: x["theta"]),
    )
    outer = {"theta": randn(5), "log": torch.zeros((), dtype=F64)}
    with pytest.raises(StructureError, match="one fixed strength"):
        hypergradient(learned, outer, Task(), inner_solver=PullBack(0.1, 2), method=ReleasedCG())
