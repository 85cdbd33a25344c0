"""Objective and metrics of one prediction, unless a subclass has its own."""

import pytest
import torch

from bilevel import hypergradient
from bilevel.problems import FewShot, Sinusoid
from bilevel.solvers import FirstOrder, GradientDescent, ImplicitCG, Unrolled


def counted(cls):
    """The class, counting how often the outer batch is predicted."""

    class Counted(cls):
        def predict(self, inner, outer, batch):
            self.sizes.append(len(batch[1]))
            return super().predict(inner, outer, batch)

    return Counted


def run(problem, example, method):
    return hypergradient(
        problem,
        example.outer,
        example.task,
        inner_solver=GradientDescent(0.01, 2),
        method=method,
    )


@pytest.mark.parametrize(
    "method", [ImplicitCG(), FirstOrder(), Unrolled()], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("tasks", [None, 2])
def test_a_query_batch_is_predicted_once(method, tasks):
    example = FewShot.example(tasks=tasks)
    problem = counted(FewShot)(example.problem.net, strength=3.0)
    problem.sizes = []
    run(problem, example, method)  # the first call looks the problem over
    problem.sizes.clear()
    found = run(problem, example, method)
    support, query = (len(b[1].flatten()) // (tasks or 1) for b in batches(example))
    assert support != query
    assert problem.sizes.count(query) == 1
    plain = run(example.problem, example, method)
    assert torch.equal(found.metrics["accuracy"], plain.metrics["accuracy"])
    assert not found.metrics["accuracy"].requires_grad


def batches(example):
    return example.task.inner_batch, example.task.outer_batch


def test_the_metrics_are_those_of_the_prediction():
    for cls, name in ((FewShot, "accuracy"), (Sinusoid, "mse")):
        example = cls.example()
        value, metrics = example.problem.evaluate(
            example.outer, example.outer, example.task.outer_batch
        )
        alone = example.problem.metrics(example.outer, example.outer, example.task.outer_batch)
        torch.testing.assert_close(metrics[name], alone[name])
        expected = example.problem.outer_objective(
            example.outer, example.outer, example.task.outer_batch
        )
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("how", ["subclass", "instance"])
def test_metrics_and_objectives_of_ones_own_are_heeded(how):
    def metrics(self, inner, outer, batch):
        return {"answer": torch.tensor(42.0)}

    def objective(self, inner, outer, batch):
        return 2.0 * FewShot.outer_objective(self, inner, outer, batch)

    example = FewShot.example()
    if how == "subclass":
        cls = type("Own", (FewShot,), {"metrics": metrics, "outer_objective": objective})
        problem = cls(example.problem.net, strength=3.0)
    else:
        problem = FewShot(example.problem.net, strength=3.0)
        problem.metrics = metrics.__get__(problem)
        problem.outer_objective = objective.__get__(problem)
    assert not problem.shares_evaluation
    found, plain = run(problem, example, ImplicitCG()), run(example.problem, example, ImplicitCG())
    assert found.metrics["answer"].item() == 42.0
    assert found.outer_value.item() == pytest.approx(2.0 * plain.outer_value.item())


def test_an_evaluation_of_ones_own_is_heeded_with_its_metrics():
    class Own(FewShot):
        def metrics(self, inner, outer, batch):
            return {"answer": torch.tensor(42.0)}

    class Both(Own):
        def evaluate(self, inner, outer, batch):
            return self.outer_objective(inner, outer, batch), {"answer": torch.tensor(43.0)}

    example = FewShot.example()
    net, point, batch = example.problem.net, example.outer, example.task.outer_batch
    # Asked directly, too: not the scores of the class above.
    assert Own(net, strength=3.0).evaluate(point, point, batch)[1]["answer"] == 42.0
    assert run(Own(net, strength=3.0), example, ImplicitCG()).metrics["answer"].item() == 42.0
    assert run(Both(net, strength=3.0), example, ImplicitCG()).metrics["answer"].item() == 43.0
