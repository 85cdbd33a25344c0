"""What solvers learn of the Hessian reaches the linear solve, within a call and across steps."""

import pytest
import torch

from bilevel import StructureError, Task, Trainer, hypergradient
from bilevel.solvers import (
    LBFGS,
    GradientDescent,
    ImplicitCG,
    RecyclingPreconditioner,
    SecantPreconditioner,
)
from tests.helpers import quadratic, quadratic_answer, quadratic_task, randn

TASK = quadratic_task(40, 3, condition=1e3, seed=1, largest=10.0)


def steps_of(method, task=TASK, outer_steps=4, **settings):
    """CG steps of each outer step, and where ``outer`` ended."""
    steps, outer = [], randn(3)
    trainer = Trainer(
        quadratic(),
        inner_solver=settings.pop("inner_solver", LBFGS(max_steps=3000, tol=1e-10)),
        method=method,
        optimizer=lambda params: torch.optim.SGD(params, lr=1e-7),
        **settings,
    )
    trainer.fit(
        outer,
        task,
        outer_steps,
        callback=lambda record, result: steps.append(int(result.diagnostics.linear.steps.sum())),
    )
    return steps, outer


def test_recycled_pairs_save_steps_from_the_second_outer_step_on():
    plain, x = steps_of(ImplicitCG(1000, 1e-8))
    method = ImplicitCG(1000, 1e-8, RecyclingPreconditioner(40))
    recycled, y = steps_of(method, warm_start="adjoint")
    warm, _ = steps_of(ImplicitCG(1000, 1e-8), warm_start="adjoint")
    assert recycled[0] == plain[0]
    assert max(recycled[1:]) <= 0.6 * min(plain[1:])
    assert sum(recycled[1:]) <= 0.8 * sum(warm[1:])
    torch.testing.assert_close(x, y, rtol=1e-9, atol=0)


def test_recycled_pairs_follow_their_task():
    tasks = [quadratic_task(40, 3, condition=1e3, seed=i, largest=10.0, key=i) for i in range(3)]

    def draw(step):
        return [tasks[step % 3], tasks[(step + 1) % 3]]

    plain, x = steps_of(ImplicitCG(1000, 1e-8), draw, outer_steps=6)
    method = ImplicitCG(1000, 1e-8, RecyclingPreconditioner(40))
    recycled, y = steps_of(method, draw, outer_steps=6, warm_start="adjoint")
    assert sum(recycled[3:]) <= 0.7 * sum(plain[3:])
    torch.testing.assert_close(x, y, rtol=1e-9, atol=0)


def test_pairs_of_the_inner_solver_save_steps():
    """SHINE: the inner L-BFGS has met the curvature that the adjoint needs."""
    outer = randn(3)
    settings = {"inner_solver": LBFGS(max_steps=3000, tol=1e-10, memory=40)}
    plain, secant = (
        hypergradient(quadratic(), outer, TASK, method=ImplicitCG(1000, 1e-6, p), **settings)
        for p in (None, SecantPreconditioner())
    )
    assert secant.diagnostics.linear.steps.item() <= 0.85 * plain.diagnostics.linear.steps.item()
    want = quadratic_answer(TASK, outer)
    assert (secant.gradient - want).norm() <= 1e-3 * want.norm()


def test_a_solver_without_pairs_is_refused():
    with pytest.raises(StructureError, match="LBFGS"):
        hypergradient(
            quadratic(),
            randn(3),
            TASK,
            inner_solver=GradientDescent(0.1, 5),
            method=ImplicitCG(preconditioner=SecantPreconditioner()),
        )


def test_a_state_without_pairs_begins_anew():
    method = ImplicitCG(1000, 1e-8, RecyclingPreconditioner(10))
    first = hypergradient(
        quadratic(), randn(3), TASK, inner_solver=LBFGS(2000), method=ImplicitCG()
    )
    again = hypergradient(
        quadratic(), randn(3), TASK, inner_solver=LBFGS(2000), method=method, state=first.state
    )
    assert first.state.pairs == (None,)
    assert again.state.pairs[0].s.shape[1:] == (1, 40)
    batch = Task.stack([TASK, TASK])
    assert batch.count == 2
