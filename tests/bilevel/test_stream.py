import torch

from bilevel import Proximal, Stream, Task, hypergradient, problem_from, solve_inner
from bilevel.solvers import GradientDescent, ImplicitCG, Unrolled
from tests.helpers import randn

F64 = torch.float64
DATA = randn(12, seed=3)


def stream(seed=0):
    data = DATA + seed
    return Stream(lambda step: data if step < 0 else data[step % 3 :: 3])


def problem():
    """g = ½ mean (z − d)² x²: a minibatch step pulls z to the mean of that minibatch."""
    return problem_from(
        lambda z, x, d: 0.5 * ((z - d) ** 2).mean() * x**2,
        lambda z, x, d: z**2,
        initial_inner=lambda x, d: torch.zeros((), dtype=F64),
    )


def by_hand(x, data, steps, lr):
    z = torch.zeros((), dtype=F64)
    for t in range(steps):
        z = z - lr * x**2 * (z - data[t % 3 :: 3].mean())
    return z


def test_each_inner_step_sees_its_own_batch():
    x = torch.tensor(1.3, dtype=F64)
    found = solve_inner(
        problem(), x, Task(stream()), inner_solver=GradientDescent(0.3, max_steps=5)
    )
    torch.testing.assert_close(found.inner, by_hand(x, DATA, 5, 0.3), rtol=1e-13, atol=0)


def test_unrolling_differentiates_through_the_batches_that_were_drawn():
    x = torch.tensor(1.3, dtype=F64, requires_grad=True)
    (want,) = torch.autograd.grad(by_hand(x, DATA, 5, 0.3) ** 2, x)
    for method in (Unrolled(), Unrolled(checkpoint=2)):
        result = hypergradient(
            problem(), x, Task(stream()), inner_solver=GradientDescent(0.3, 5), method=method
        )
        torch.testing.assert_close(result.gradient, want, rtol=1e-12, atol=0)


def test_the_inner_problem_is_linearised_and_judged_on_the_batch_of_step_minus_one():
    seen = []

    def draw(step):
        seen.append(step)
        return DATA if step < 0 else DATA[:2]

    x = torch.tensor(1.0, dtype=F64)
    result = hypergradient(
        problem(),
        x,
        Task(Stream(draw)),
        inner_solver=GradientDescent(0.5, max_steps=4),
        method=ImplicitCG(),
    )
    assert set(seen) == {-1, 0, 1, 2, 3}
    z = result.inner
    torch.testing.assert_close(
        result.diagnostics.inner.residual[0], (z - DATA.mean()).abs(), rtol=1e-12, atol=0
    )
    # The cross-derivative is taken there too: dF/dx = −2z · 2(z − mean)/x.
    torch.testing.assert_close(result.gradient, -2 * z * 2 * (z - DATA.mean()), rtol=1e-10, atol=0)


def test_streams_of_several_tasks_are_stacked():
    x = torch.tensor(1.3, dtype=F64)
    tasks = [Task(stream(seed)) for seed in range(3)]
    settings = {"inner_solver": GradientDescent(0.3, 5), "method": ImplicitCG()}
    result = hypergradient(problem(), x, tasks, reduction="none", **settings)
    for i, task in enumerate(tasks):
        alone = hypergradient(problem(), x, task, **settings)
        torch.testing.assert_close(result.gradient[i], alone.gradient, rtol=1e-12, atol=0)


def test_stacked_streams_come_apart_and_move():
    batch = Task.stack([Task(stream(seed)) for seed in range(3)])
    assert batch.inner_batch.draw(-1).shape == (3, 12)
    assert batch.inner_batch.draw(1).shape == (3, 4)
    picked = batch.select(torch.tensor([2, 0]))
    assert torch.equal(picked.inner_batch.draw(-1), torch.stack([DATA + 2, DATA]))
    assert torch.equal(batch.unstack()[1].inner_batch.draw(0), (DATA + 1)[::3])
    assert batch.to(torch.float32).inner_batch.draw(0).dtype == torch.float32


def test_streams_of_different_shapes_are_grouped_apart():
    x = torch.tensor(1.3, dtype=F64)
    tasks = [Task(stream()), Task(Stream(lambda step: DATA[:6])), Task(stream(1))]
    settings = {"inner_solver": GradientDescent(0.3, 5), "method": ImplicitCG()}
    result = hypergradient(problem(), x, tasks, reduction="none", **settings)
    assert len(result.state.inner) == 2
    alone = hypergradient(problem(), x, tasks[1], **settings)
    torch.testing.assert_close(result.gradient[1], alone.gradient, rtol=1e-12, atol=0)


def test_a_regularizer_is_not_drawn():
    regular = problem_from(
        lambda z, x, d: 0.5 * ((z - d) ** 2).mean(), lambda z, x, d: z.sum(), Proximal(1.0)
    )
    found = solve_inner(
        regular,
        torch.zeros((), dtype=F64),
        Task(Stream(lambda step: DATA)),
        inner_solver=GradientDescent(0.5, 3),
    )
    torch.testing.assert_close(found.inner, DATA.mean() / 2, rtol=1e-12, atol=0)
