import pytest
import torch
from torch.nn import functional as F

from bilevel import BilevelProblem, Proximal, StructureError, Task, hypergradient, problem_from
from bilevel.flat import FlatProblem, Outer
from bilevel.gauss_newton import gauss_newton
from bilevel.linearised import linearise
from bilevel.problems import Logistic
from bilevel.solvers import GradientDescent, ImplicitCG
from tests.helpers import randn

F64 = torch.float64


class Network(BilevelProblem):
    """A tanh network on vectors, stated by its prediction and its loss."""

    def __init__(self, loss="mse", strength=0.1):
        self.kind = loss
        self.regularizer = Proximal(strength)

    def predict(self, inner, outer, batch):
        hidden = torch.tanh(batch[0] @ inner["a"])
        return {"mean": hidden @ inner["b"], "log": hidden @ inner["c"]}

    def loss(self, prediction, outer, batch):
        if self.kind == "mse":
            return F.mse_loss(prediction["mean"], batch[1])
        # The likelihood of a Gaussian with learned variance: the loss couples both outputs.
        gap = (prediction["mean"] - batch[1]) ** 2
        return (0.5 * gap * (-prediction["log"]).exp() + 0.5 * prediction["log"]).mean()

    def outer_objective(self, inner, outer, batch):
        return self.loss(self.predict(inner, outer, batch), outer, batch)


def point(tasks=3, loss="mse"):
    shapes = {"a": (2, 4), "b": (4,), "c": (4,)}
    outer = {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    data = Task.stack(
        [Task(*((randn(7, 2, seed=i), randn(7, seed=i + 9)),) * 2) for i in range(tasks)]
    )
    flat = FlatProblem.of(Network(loss), Outer.of(outer), data)
    return flat, flat.start + 0.1 * randn(*flat.start.shape, seed=5)


def dense(product, z):
    eye = torch.eye(z.shape[1], dtype=F64)
    return torch.stack([product(e.expand_as(z)) for e in eye], -1)


@pytest.mark.parametrize("loss", ["mse", "likelihood"])
def test_products_match_the_textbook_matrix(loss):
    flat, z = point(loss=loss)
    found = dense(gauss_newton(flat, z), z)
    for i, task in enumerate(flat.tasks.unstack()):
        problem = Network(loss)

        def predict(vector, task=task, problem=problem):
            tree = flat.vector.unflatten(vector)
            out = problem.predict(tree, None, task.inner_batch)
            return torch.cat([out["mean"], out["log"]])

        def of(prediction, task=task, problem=problem):
            half = len(prediction) // 2
            tree = {"mean": prediction[:half], "log": prediction[half:]}
            return problem.loss(tree, None, task.inner_batch)

        J = torch.autograd.functional.jacobian(predict, z[i])
        S = torch.autograd.functional.hessian(of, predict(z[i]))
        want = J.mT @ S @ J + 0.1 * torch.eye(len(z[i]), dtype=F64)
        torch.testing.assert_close(found[i], want, rtol=1e-10, atol=1e-12)


def test_a_linear_model_has_its_hessian():
    example = Logistic.example(tasks=2)
    flat = FlatProblem.of(example.problem, Outer.of(example.outer), example.task)
    z = randn(*flat.start.shape)
    system = linearise(flat, z)
    v = randn(*z.shape, seed=1)
    torch.testing.assert_close(gauss_newton(flat, z)(v), system.pull(v), rtol=1e-11, atol=1e-13)


def test_it_is_positive_where_the_hessian_is_not():
    flat, z = point()
    system = linearise(flat, z)
    hessian = torch.linalg.eigvalsh(dense(system.pull, z))
    positive = torch.linalg.eigvalsh(dense(system.operator.gauss_newton, z))
    assert (hessian[:, 0] < 0).any()
    assert (positive[:, 0] >= 0.1 - 1e-10).all()


@pytest.mark.parametrize("policy", ["ggn", "damp", "minres", "truncate"])
def test_a_policy_through_negative_curvature_is_reported(policy):
    flat, _ = point()
    outer = flat.outer.tree
    result = hypergradient(
        Network(),
        outer,
        flat.tasks,
        inner_solver=GradientDescent(0.05, 3),
        method=ImplicitCG(max_steps=100, indefinite=policy),
    )
    flagged = [s.name == "INDEFINITE" for s in result.status]
    assert any(flagged)
    assert not result.ok
    ritz = result.diagnostics.linear.ritz
    assert (ritz[torch.tensor(flagged), 0] <= 0).all()
    if policy == "damp":
        damping = result.diagnostics.linear.damping
        assert ((damping > 0) == torch.tensor(flagged)).all()


def test_a_problem_without_prediction_says_so():
    problem = problem_from(
        lambda z, x, b: -(z**2).sum(), lambda z, x, b: ((z - 1) ** 2).sum(), Proximal(1.0)
    )
    assert (
        linearise(
            FlatProblem.of(problem, Outer.of(randn(2)), Task.stack([Task()])), randn(1, 2)
        ).operator.gauss_newton
        is None
    )
    with pytest.raises(StructureError, match="predict"):
        hypergradient(
            problem,
            randn(2),
            inner_solver=GradientDescent(0.1, 1),
            method=ImplicitCG(indefinite="ggn"),
        )
