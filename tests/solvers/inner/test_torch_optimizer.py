import pytest
import torch

from bilevel import Status, Task, problem_from, solve_inner
from bilevel.solvers import TorchOptimizer
from tests.helpers import quadratic, quadratic_task, randn

F64 = torch.float64


def smooth():
    return problem_from(
        lambda z, x, d: (
            torch.log1p(((d @ z["w"]) ** 2).sum())
            + ((z["w"] - x) ** 2).sum()
            + (z["b"] * z["w"].sum() - 1) ** 2
        ),
        lambda z, x, d: z["w"].sum(),
        initial_inner=lambda x, d: {"b": torch.ones((), dtype=F64), "w": torch.ones_like(x)},
    )


def by_hand(cls, x, d, steps, **options):
    w = torch.ones_like(x).requires_grad_()
    b = torch.ones((), dtype=F64, requires_grad=True)
    torch.set_default_dtype(F64)
    try:
        optimizer = cls([b, w], **options)

        def closure():
            optimizer.zero_grad()
            value = smooth().inner_objective({"b": b, "w": w}, x, d)
            value.backward()
            return value

        for _ in range(steps):
            optimizer.step(closure)
    finally:
        torch.set_default_dtype(torch.float32)
    return {"b": b.detach(), "w": w.detach()}


CASES = {
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "Adam": {"lr": 0.1, "betas": (0.5, 0.9)},
    "AdamW": {"lr": 0.1, "weight_decay": 0.0},
    "Adamax": {"lr": 0.1},
    "NAdam": {"lr": 0.1},
    "RAdam": {"lr": 0.1},
    "RMSprop": {"lr": 0.05, "centered": True},
    "Rprop": {"lr": 0.05},
    "Adagrad": {"lr": 0.1},
    "Adadelta": {"lr": 1.0},
    "ASGD": {"lr": 0.05},
    "LBFGS": {"lr": 0.5, "max_iter": 3},
    "Adafactor": {"lr": 0.05},
}


@pytest.mark.parametrize("kind", CASES)
def test_every_optimizer_takes_its_own_steps_on_every_task(kind):
    cls, x = getattr(torch.optim, kind), randn(3, seed=5)
    tasks = [Task(randn(4, 3, seed=i)) for i in range(2)]
    solver = TorchOptimizer(cls, max_steps=6, **CASES[kind])
    found = solve_inner(smooth(), x, tasks, inner_solver=solver)
    for z, task in zip(found.inner, tasks, strict=True):
        want = by_hand(cls, x, task.inner_batch, 6, **CASES[kind])
        torch.testing.assert_close(z["w"], want["w"], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(z["b"], want["b"], rtol=1e-9, atol=1e-12)


def test_an_optimizer_is_named_by_class_or_string():
    assert TorchOptimizer("Adam", lr=0.1) == TorchOptimizer(torch.optim.Adam, lr=0.1)
    assert repr(TorchOptimizer("Adam", max_steps=3)) == (
        "TorchOptimizer(cls=Adam, max_steps=3, tol=None)"
    )


def test_an_optimizer_of_ones_own_is_run_task_by_task():
    class Halving(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.sub_(0.5 * p.grad)

    tasks = [quadratic_task(3, condition=2.0, seed=i) for i in range(2)]
    found = solve_inner(
        quadratic(), randn(3), tasks, inner_solver=TorchOptimizer(Halving, max_steps=80, tol=1e-8)
    )
    assert found.status == (Status.CONVERGED,) * 2


@pytest.mark.parametrize("kind", ["Adam", "LBFGS"])
def test_tasks_that_converged_stay_where_they_are(kind):
    tasks = [quadratic_task(3, condition=c, seed=i) for i, c in enumerate([1.5, 1e5])]
    options = {"lr": 0.3} if kind == "Adam" else {"max_iter": 1, "lr": 0.3}
    solver = TorchOptimizer(kind, max_steps=200, tol=1e-2, **options)
    both = solve_inner(quadratic(), randn(3), tasks, inner_solver=solver)
    alone = solve_inner(quadratic(), randn(3), tasks[0], inner_solver=solver)
    assert both.steps[0] == alone.steps[0] < both.steps[1]
    torch.testing.assert_close(both.inner[0], alone.inner, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cls": "Adam", "learning_rate": 0.1}, "Adam does not take these options"),
        ({"cls": "NoSuch"}, "`cls` is 'NoSuch'"),
        ({"cls": int}, "`cls` is"),
        ({"cls": "AdamW"}, "weight_decay.*Proximal"),
        ({"cls": "SGD", "lr": 0.1, "weight_decay": 0.1}, "weight_decay.*Proximal"),
        ({"cls": "SGD", "lr": 0.1, "maximize": True}, "`maximize`"),
        ({"cls": "SGD", "lr": 0.1, "max_steps": -1}, "`max_steps`"),
        ({"cls": "SGD", "lr": 0.1, "tol": -1.0}, "`tol`"),
        ({"cls": "Adam", "lr": -1.0}, "learning rate"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"(?i){message}"):
        TorchOptimizer(**arguments)
