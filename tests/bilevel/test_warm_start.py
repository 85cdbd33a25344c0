import pytest
import torch

from bilevel import Task, Trainer
from bilevel.solvers import GradientDescent, ImplicitCG, Unrolled
from tests.helpers import quadratic, quadratic_task, randn

KEYED = [quadratic_task(40, 3, condition=20.0, seed=i, key=f"task {i}") for i in range(6)]


def trainer(**kwargs):
    settings = {
        "inner_solver": GradientDescent(1.0, 5000, tol=1e-6),
        "method": ImplicitCG(rtol=1e-7),
        "optimizer": lambda params: torch.optim.SGD(params, lr=1e-6),
    }
    return Trainer(quadratic(), **{**settings, **kwargs})


def steps_of(trained, tasks, steps=6):
    """Inner and linear steps after the first outer step, and where ``outer`` ended."""
    inner, linear = [], []
    outer = randn(3)

    def note(record, result):
        inner.append(int(result.diagnostics.inner.steps.sum()))
        linear.append(int(result.diagnostics.linear.steps.sum()))

    trained.fit(outer, tasks, steps, callback=note)
    return sum(inner[1:]), sum(linear[1:]), outer


@pytest.mark.parametrize(
    "tasks",
    [KEYED[0], Task.stack(KEYED), KEYED, [*KEYED[:3], quadratic_task(30, 3, condition=10.0)]],
    ids=["task", "stack", "list", "two shapes"],
)
def test_warm_starts_save_steps_and_change_nothing_else(tasks):
    cold = steps_of(trainer(), tasks)
    inner = steps_of(trainer(warm_start="inner"), tasks)
    adjoint = steps_of(trainer(warm_start="adjoint"), tasks)
    both = steps_of(trainer(warm_start="both"), tasks)
    assert inner[0] < 0.8 * cold[0]
    assert adjoint[0] == cold[0]
    assert adjoint[1] < 0.8 * cold[1]
    assert both[0] < 0.8 * cold[0]
    assert both[1] < 0.8 * cold[1]
    for other in (inner, adjoint, both):
        torch.testing.assert_close(other[2], cold[2], rtol=1e-6, atol=1e-9)


def test_tasks_are_told_apart_by_key():
    """Tasks come in another order and another company at every step."""

    def draw(step):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(step))[:4]
        return [KEYED[i] for i in order.tolist()]

    cold = steps_of(trainer(), draw, steps=8)
    warm = steps_of(trainer(warm_start="both"), draw, steps=8)
    assert warm[0] < 0.9 * cold[0]
    assert warm[1] < 0.9 * cold[1]
    torch.testing.assert_close(warm[2], cold[2], rtol=1e-6, atol=1e-9)


def test_stacked_tasks_are_told_apart_by_key():
    batches = [Task.stack(KEYED[:3]), Task.stack(KEYED[3:]), Task.stack(KEYED[2:5])]
    cold = steps_of(trainer(), lambda step: batches[step % 3], steps=9)
    warm = steps_of(trainer(warm_start="both"), lambda step: batches[step % 3], steps=9)
    assert warm[0] < 0.9 * cold[0]
    torch.testing.assert_close(warm[2], cold[2], rtol=1e-6, atol=1e-9)


def test_changing_tasks_need_keys():
    nameless = quadratic_task(4, 3)
    with pytest.raises(ValueError, match=r"no `key`.*warm_start='none'"):
        trainer(warm_start="inner").fit(randn(3), lambda step: nameless, 1)
    trainer().fit(randn(3), lambda step: nameless, 1)


def test_two_tasks_of_one_key_are_refused():
    with pytest.raises(ValueError, match="the same `key`"):
        trainer(warm_start="inner").fit(randn(3), lambda step: [KEYED[0], KEYED[0]], 1)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="`warm_start` is 'all'"):
        trainer(warm_start="all")


def test_a_method_without_adjoint_takes_a_warm_inner_start_or_none():
    tasks = KEYED[0]
    descent = GradientDescent(1.0, 50)
    cold, warm = randn(3), randn(3)
    trainer(method=Unrolled(), inner_solver=descent).fit(cold, tasks, 3)
    trainer(method=Unrolled(), inner_solver=descent, warm_start="both").fit(warm, tasks, 3)
    assert cold.equal(warm)
