"""What a fresh reader found when hypergradients were made cheaper; each was wrong once."""

import pytest
import torch
from torch import nn

from bilevel import (
    BilevelProblem,
    InPlaceError,
    Proximal,
    Status,
    Task,
    hypergradient,
    stateless,
)
from bilevel.solvers import GradientDescent, ImplicitCG, TorchOptimizer

SETTINGS = {"inner_solver": GradientDescent(0.1, 50), "method": ImplicitCG()}


class Least(BilevelProblem):
    """Least squares near the outer variable; writes to its data once told to."""

    regularizer = Proximal(0.5)
    writes = False

    def inner_objective(self, inner, outer, batch):
        features, targets = batch
        if self.writes:
            targets.add_(0.5)
        return ((features @ inner - targets) ** 2).mean()

    def outer_objective(self, inner, outer, batch):
        return ((batch[0] @ inner - batch[1]) ** 2).mean()

    def metrics(self, inner, outer, batch):
        return {"first": outer[0]}


def task(value, sparse=False):
    features = torch.eye(3) + torch.diag(torch.ones(2), 1)
    data = features.to_sparse_coo() if sparse else features
    return Task((data, torch.full((3,), value)), (data, torch.ones(3)))


@pytest.mark.parametrize("count", [1, 2])
def test_metrics_share_no_memory_with_the_outer_variable(count):
    x = torch.zeros(3)
    tasks = task(1.0) if count == 1 else [task(1.0), task(2.0)]
    result = hypergradient(Least(), x, tasks, **SETTINGS)
    x += 5.0
    assert result.metrics["first"].tolist() == [0.0] * count


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_of_single_tasks_can_be_written_to(count):
    class Summed(BilevelProblem):
        regularizer = Proximal(1.0, center=lambda outer: outer["c"])

        def inner_objective(self, inner, outer, batch):
            return 0.5 * ((inner - batch) ** 2).sum()

        def outer_objective(self, inner, outer, batch):
            return inner.sum() + outer["d"].sum()

    x = {"c": torch.zeros(3), "d": torch.zeros(4)}
    tasks = [Task(torch.ones(3), torch.ones(3))] * count
    result = hypergradient(Summed(), x, tasks, reduction="none", **SETTINGS)
    assert result.gradient["d"].mul_(2.0).tolist() == [[2.0] * 4] * count


@pytest.mark.filterwarnings("ignore:`.*` cannot be stacked by torch.vmap")
@pytest.mark.parametrize(
    "how",
    [
        {"engine": "loop"},
        {"engine": "auto"},
        {"task_chunk": 1},
        {"inner_solver": TorchOptimizer(torch.optim.SGD, 50, lr=0.1)},
    ],
    ids=str,
)
def test_sparse_tasks_run_in_every_way(how):
    x = torch.ones(3)
    settings = {**SETTINGS, **how}
    sparse, dense = (
        hypergradient(Least(), x, [task(v, sparse=flag) for v in (1.0, 2.0)], **settings).gradient
        for flag in (True, False)
    )
    torch.testing.assert_close(sparse, dense)


@pytest.mark.filterwarnings("ignore:`.*` cannot be stacked by torch.vmap")
def test_a_sparse_task_that_fails_takes_no_other_with_it():
    tasks = [task(1.0, sparse=True), task(float("nan"), sparse=True)]
    result = hypergradient(Least(), torch.ones(3), tasks, **SETTINGS)
    assert result.status[1] is Status.NON_FINITE
    alone = hypergradient(Least(), torch.ones(3), task(1.0), **SETTINGS)
    torch.testing.assert_close(result.gradient, alone.gradient)


def test_a_parameter_tied_to_a_buffer_is_not_taken_for_two():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))
            self.register_buffer("same", self.w)

        def forward(self, x):
            return (x * self.w).sum() + (x * self.same).sum()

    params, net = stateless(Tied())
    with pytest.raises(ValueError, match="tied"):
        net(params, torch.arange(3.0))


def test_data_that_are_written_to_after_the_first_look_are_noticed():
    problem, one = Least(), task(1.0)
    hypergradient(problem, torch.ones(3), one, **SETTINGS)
    problem.writes = True
    with pytest.raises(InPlaceError, match="did not do when it was first looked at"):
        hypergradient(problem, torch.ones(3), one, **SETTINGS)
