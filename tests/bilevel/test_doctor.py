"""`doctor`: every illness is found and its cure named; what is healthy is left in peace."""

import functools
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from bilevel import (
    BilevelProblem,
    Diagnosis,
    Proximal,
    Stream,
    Structure,
    Task,
    doctor,
    hypergradient,
    problem_from,
    stateless,
)
from bilevel.cli.siblings import registries
from bilevel.registry import PROBLEMS
from bilevel.solvers import (
    CG,
    LBFGS,
    ClosedForm,
    DenseExact,
    FirstOrder,
    GradientDescent,
    Implicit,
    ImplicitCG,
    NeumannSeries,
    TorchOptimizer,
    Unrolled,
)
from tests.helpers import quadratic, quadratic_task, randn

registries()
SOLVED = LBFGS(max_steps=500, tol=1e-9)
X = randn(3, seed=1)


def diagnose(problem=None, outer=None, task=None, *, inner_solver=SOLVED, method=None, **kwargs):
    if problem is None:
        problem, task = quadratic(), task or quadratic_task(20, 3)
    outer = X if outer is None else outer
    method = method or ImplicitCG()
    return doctor(problem, outer, task, inner_solver=inner_solver, method=method, **kwargs)


def plain(inner, outer=None, regularizer=None, **kwargs):
    """A problem from an inner objective of z and x alone; f = ½ ‖z − 1‖²."""
    kwargs.setdefault("initial_inner", lambda x, batch: torch.zeros_like(x))
    return problem_from(
        lambda z, x, batch: inner(z, x),
        lambda z, x, batch: outer(z, x) if outer else 0.5 * ((z - 1) ** 2).sum(),
        regularizer,
        **kwargs,
    )


def follow(z, x):
    """½ ‖z − x‖², an inner objective without fault."""
    return 0.5 * ((z - x) ** 2).sum()


def single(tree):
    """Float32."""
    if isinstance(tree, Task):
        return Task(single(tree.inner_batch), single(tree.outer_batch))
    return {key: value.float() for key, value in tree.items()}


def only(diagnosis, kind, severity):
    """The one finding that is no information."""
    findings = [f for f in diagnosis.findings if f.severity != "info" or severity == "info"]
    assert [(f.kind, f.severity) for f in findings] == [(kind, severity)], str(diagnosis)
    assert diagnosis.ok == (severity == "info")
    assert findings[0].found
    assert findings[0].cure
    return findings[0]


def named(diagnosis, kind):
    """The finding of that kind."""
    found = [f for f in diagnosis.findings if f.kind == kind]
    assert len(found) == 1, str(diagnosis)
    return found[0]


# Healthy


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tasks", [None, 3])
@pytest.mark.parametrize("method", [ImplicitCG(), DenseExact()], ids=["cg", "dense"])
@pytest.mark.parametrize("name", PROBLEMS.names())
def test_registered_problems_are_healthy(name, method, tasks, dtype):
    example = PROBLEMS[name].example(tasks=tasks, dtype=dtype)
    general = example.problem.structure is Structure.GENERAL
    if general and isinstance(method, ImplicitCG):
        pytest.skip("CG is for symmetric problems")
    found = diagnose(
        example.problem,
        example.outer,
        example.task,
        inner_solver=example.inner_solver,
        method=method,
    )
    assert found.ok, str(found)
    assert str(found).startswith("healthy")
    assert found.error < 1e-3
    assert found.condition <= 1.01 * example.condition
    if not general:
        low, high = found.curvature
        assert 0.99 * example.mu <= low <= high <= 1.01 * example.lipschitz


@pytest.mark.parametrize(
    "method",
    [
        NeumannSeries(terms=300),
        NeumannSeries(terms=300, scale=1.0),
        Implicit(CG()),
        ImplicitCG(damping=1e-6),
        Unrolled(),
        Unrolled(truncate=200),
    ],
    ids=repr,
)
def test_methods_with_enough_steps_are_healthy(method):
    found = diagnose(inner_solver=GradientDescent(1.0, max_steps=300), method=method)
    assert found.ok, str(found)


def test_tasks_of_every_kind():
    tasks = [quadratic_task(20, 3, seed=i) for i in range(3)]
    one = diagnose(task=tasks[0])
    stacked = diagnose(task=Task.stack(tasks))
    listed = diagnose(task=[*tasks, quadratic_task(11, 3)])
    for found, count in ((one, "1 task,"), (stacked, "3 tasks"), (listed, "4 tasks")):
        assert found.ok, str(found)
        assert count in str(found)


def test_tasks_in_a_list_are_named_by_their_position():
    sick = {"largest": 30.0}
    tasks = [quadratic_task(n, 3, **(sick if n == 7 else {})) for n in (5, 7, 5, 7)]
    found = diagnose(task=tasks, inner_solver=GradientDescent(1.0, max_steps=30))
    assert "tasks 1, 3 (of 4)" in named(found, "divergence").found


def test_a_stream_is_fine():
    data = randn(12, 3)
    problem = problem_from(
        lambda z, x, batch: ((batch - z) ** 2).mean(), lambda z, x, b: (z**2).sum(), Proximal(1.0)
    )
    stream = Stream(lambda step: data)
    found = diagnose(problem, task=Task(stream), inner_solver=GradientDescent(0.5, 200))
    assert found.ok, str(found)


# 1 Dependence


def test_nothing_depends_on_outer():
    finding = only(diagnose(plain(lambda z, x: (z**2).sum())), "dependence", "error")
    assert finding.argument == "outer"
    assert "Proximal(strength), whose center is `outer`" in finding.cure


def test_inner_solution_is_constant_in_outer():
    problem = plain(lambda z, x: ((z - 2) ** 2).sum(), lambda z, x: ((z - x) ** 2).sum())
    finding = only(diagnose(problem), "dependence", "warning")
    assert "its solution is constant" in finding.found


def test_single_leaves_without_dependence_and_with_zero_gradient_are_named():
    problem = plain(
        lambda z, x: follow(z, x["used"]),
        lambda z, x: ((z - 1) ** 2).sum() + 0 * x["times zero"].sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x["used"]),
    )
    found = diagnose(problem, {"used": X, "forgotten": X, "times zero": X})
    assert named(found, "dependence").argument == "outer['forgotten']"
    assert "`outer['times zero']`" in named(found, "zero gradient").found
    assert not found.ok


def test_a_hidden_tensor_that_requires_grad():
    hidden = torch.ones(3, dtype=torch.float64, requires_grad=True)
    finding = only(diagnose(plain(lambda z, x: follow(z, x * hidden))), "dependence", "error")
    assert "`.detach()`" in finding.cure


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("where", ["inner_objective", "outer_objective"])
def test_a_derivative_that_is_lost_on_the_way(where, dtype):
    inner = where == "inner_objective"

    def lossy(x):
        return 0.5 * x + 0.5 * x.detach()

    problem = plain(
        lambda z, x: follow(z, lossy(x["a"]) if inner else x["a"]) + follow(z, x["b"]),
        lambda z, x: (z * (x["a"] if inner else lossy(x["a"]))).sum() + z.exp().sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x["a"]),
    )
    outer = {"a": X.to(dtype), "b": X.to(dtype) + 1}
    found = diagnose(problem, outer, inner_solver=LBFGS(100, tol=1e-5))
    finding = only(found, "lost derivative", "warning")
    assert finding.argument == "outer['a']"
    assert f"`{where}` changes with" in finding.found
    assert "`.detach()`" in finding.cure


def test_a_leaf_of_which_only_the_value_is_used():
    problem = plain(
        lambda z, x: follow(z, x["a"] * x["b"].detach()),
        initial_inner=lambda x, batch: torch.zeros_like(x["a"]),
    )
    found = diagnose(problem, {"a": X, "b": X + 3})
    assert named(found, "lost derivative").argument == "outer['b']"
    assert named(found, "dependence").argument == "outer['b']"


# 2 The inner solve


def test_too_few_steps_and_how_many_would_do():
    found = diagnose(inner_solver=GradientDescent(1.0, max_steps=10))
    finding = only(found, "inner problem not solved", "warning")
    assert finding.argument == "inner_solver"
    steps = int(finding.cure.split("max_steps = ")[1].split()[0])
    task, method = quadratic_task(20, 3), ImplicitCG(rtol=1e-9)

    def gradient(count):
        solver = GradientDescent(1.0, max_steps=count)
        problem = quadratic()
        return hypergradient(problem, X, task, inner_solver=solver, method=method).gradient

    exact, short, enough = gradient(2000), gradient(10), gradient(steps)
    assert (enough - exact).norm() < 0.01 * exact.norm()
    # The estimate is right about how wrong it is.
    assert found.error == pytest.approx(((short - exact).norm() / short.norm()).item(), rel=0.01)
    assert diagnose(inner_solver=GradientDescent(1.0, max_steps=steps)).ok


def test_a_tolerance_that_is_missed_by_far_says_how_many_steps_at_least():
    task = quadratic_task(20, 3, condition=1e4)
    found = diagnose(task=task, inner_solver=GradientDescent(1.0, max_steps=50, tol=1e-8))
    finding = named(found, "inner problem not solved")
    assert "above tol = 1e-08" in finding.found
    assert "LBFGS" in finding.cure
    assert float(finding.cure.split("least ")[1].split()[0]) > 1e5
    assert "conditioning" in {f.kind for f in found.findings}


def test_a_learning_rate_far_below_its_limit():
    finding = only(
        diagnose(inner_solver=GradientDescent(0.01, max_steps=100)),
        "inner problem not solved",
        "warning",
    )
    assert "Raise lr to 1," in finding.cure


def test_unrolled_steps_need_not_be_a_solution():
    found = diagnose(inner_solver=GradientDescent(1.0, max_steps=10), method=Unrolled())
    assert "Unrolled is exact" in only(found, "inner steps", "info").found


def test_a_wrong_formula():
    solver = ClosedForm(lambda x, b: 1.1 * torch.linalg.solve(b["A"], b["B"] @ x))
    finding = only(diagnose(inner_solver=solver), "inner problem not solved", "warning")
    assert "Correct the formula" in finding.cure


# 3 Curvature


def test_negative_curvature_names_tasks_and_strength():
    problem = problem_from(
        lambda z, x, batch: batch * z.cos().sum(),
        lambda z, x, batch: ((z - 1) ** 2).sum(),
        Proximal(0.5),
    )
    tasks = [Task(torch.tensor(c).double()) for c in (1.0, 0.1, 1.2)]
    found = diagnose(problem, 0 * X, tasks, inner_solver=GradientDescent(0.5, 50))
    finding = only(found, "negative curvature", "error")
    assert "eigenvalue -0.7 in tasks 0, 2 (of 3)" in finding.found
    assert "proximal strength to 1.9" in finding.cure
    assert "damping = 1.4" in finding.cure
    # Taken, the cure works.
    problem.regularizer = Proximal(1.9)
    assert diagnose(problem, 0 * X + 0.1, tasks).ok


def test_negative_curvature_against_a_promise():
    problem = plain(lambda z, x: follow(z, x) - (z**2).sum(), structure=Structure.POSITIVE_DEFINITE)
    finding = named(diagnose(problem, inner_solver=GradientDescent(0.1, 2)), "negative curvature")
    assert "promises a positive definite" in finding.found
    assert "Proximal(2)" in finding.cure


def test_a_singular_hessian():
    problem = plain(lambda z, x: (z.sum() - x.sum()) ** 2)
    finding = only(
        diagnose(problem, inner_solver=GradientDescent(0.1, 100)), "singular Hessian", "error"
    )
    assert "not isolated" in finding.found
    assert "Proximal(0.006)" in finding.cure


# 4 Conditioning


def test_condition_is_measured():
    found = diagnose(task=quadratic_task(30, 3, condition=123.0))
    assert found.condition == pytest.approx(123.0, rel=1e-6)
    assert found.curvature == pytest.approx((1 / 123, 1.0), rel=1e-6)


def test_high_condition_is_information():
    task = quadratic_task(30, 3, condition=1e5)
    exact = ClosedForm(lambda x, b: torch.linalg.solve(b["A"], b["B"] @ x))
    found = diagnose(task=task, inner_solver=exact, method=DenseExact())
    finding = only(found, "conditioning", "info")
    assert "condition 1e+05" in finding.found
    assert "CG may need" in finding.found


# 5 Rates


@pytest.mark.parametrize(
    ("solver", "limit"),
    [
        (GradientDescent(2.1, 20), "2/L = 2"),
        (GradientDescent(3.1, 20, momentum=0.5), "3/L = 3"),
        (GradientDescent(1.6, 20, momentum=0.5, nesterov=True), "1.5/L = 1.5"),
        (TorchOptimizer("SGD", max_steps=20, lr=2.1), "2/L = 2"),
    ],
    ids=repr,
)
def test_a_learning_rate_beyond_its_limit(solver, limit):
    finding = named(diagnose(inner_solver=solver), "learning rate")
    assert finding.severity == "error"
    assert limit in finding.found


@pytest.mark.parametrize(
    "solver",
    [
        GradientDescent(1.99, 2000),
        GradientDescent(2.9, 2000, momentum=0.5),
        GradientDescent(1.49, 2000, momentum=0.5, nesterov=True),
        TorchOptimizer("Adam", max_steps=2000, lr=0.5),
    ],
    ids=repr,
)
def test_a_learning_rate_below_its_limit(solver):
    assert diagnose(inner_solver=solver).ok


def test_divergence_is_told_with_the_rate_that_causes_it():
    found = diagnose(inner_solver=GradientDescent(5.0, 100))
    assert {f.kind for f in found.findings} == {"divergence", "learning rate"}
    assert "lr = 1 is safe" in named(found, "learning rate").cure


def test_a_neumann_scale_beyond_its_limit():
    found = diagnose(method=NeumannSeries(terms=50, scale=2.5))
    finding = only(found, "Neumann scale", "error")
    assert "2/L = 2" in finding.found
    assert "scale = 1," in finding.cure


# 6 What changes between evaluations


def test_dropout():
    drop = nn.Dropout(0.5)
    finding = only(diagnose(plain(lambda z, x: follow(drop(z), x))), "randomness", "error")
    assert "`eval()`" in finding.cure


@pytest.mark.parametrize("draw", [np.random.rand, random.random], ids=["numpy", "python"])
def test_random_numbers_from_elsewhere(draw):
    problem = plain(lambda z, x: follow(z, x) * (1 + draw()))
    state = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    finding = only(diagnose(problem), "randomness", "error")
    assert "for the same arguments" in finding.found
    assert random.getstate() == state[0]
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002


def test_a_counter():
    calls = []

    def objective(z, x):
        calls.append(None)
        return follow(z, x) * len(calls)

    assert "batch" in only(diagnose(plain(objective)), "randomness", "error").cure


def test_batch_norm_that_updates_its_statistics():
    norm = nn.BatchNorm1d(1, affine=False).double()
    norm(randn(4, 1))
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    problem = plain(lambda z, x: follow(z, x) + norm(z.unsqueeze(-1)).pow(4).sum())
    found = diagnose(problem)
    finding = named(found, "changing state")
    assert finding.argument == "norm.running_mean"
    assert "stateless" in finding.cure
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


class Held(BilevelProblem):
    """A problem that holds its module, and a list with another, as attributes."""

    regularizer = Proximal(1.0)

    def __init__(self):
        self.net = nn.BatchNorm1d(1, affine=False).double()
        self.more = [functools.partial(nn.BatchNorm1d(1, affine=False).double())]

    def inner_objective(self, inner, outer, batch):
        return self.more[0](self.net(inner.unsqueeze(-1))).pow(4).sum() + follow(inner, outer)

    def outer_objective(self, inner, outer, batch):
        return (inner**2).sum()


def test_state_in_attributes_lists_and_partials():
    problem = Held()
    found = diagnose(problem, X)
    assert "`net.running_mean`" in named(found, "changing state").found
    assert "`more[0].running_mean`" in named(found, "changing state").found
    assert problem.net.num_batches_tracked == problem.more[0].func.num_batches_tracked == 0


def test_a_problem_that_holds_float32_data_is_examined_in_float32():
    data = randn(6, 3, dtype=torch.float32)
    problem = plain(
        lambda z, x: follow(z, x) + (data @ z).square().sum(), regularizer=Proximal(1.0)
    )
    assert diagnose(problem, X.float(), inner_solver=LBFGS(100, tol=1e-4)).ok


def test_an_argument_changed_in_place():
    problem = plain(lambda z, x: follow(z, x.mul_(1.0)))
    finding = only(diagnose(problem), "in-place change", "error")
    assert "`.clone()`" in finding.cure


# 7 Kinks


def test_a_piecewise_linear_objective():
    problem = plain(lambda z, x: (z - 1).abs().sum(), regularizer=Proximal(0.5))
    found = diagnose(problem, inner_solver=GradientDescent(0.1, 100))
    finding = named(found, "piecewise linear")
    assert finding.severity == "warning"
    assert "Huber" in finding.cure
    assert "smooth" in named(found, "inner problem not solved").cure


def test_a_linear_objective_is_not_piecewise_linear():
    assert diagnose(plain(lambda z, x: (z * x).sum(), regularizer=Proximal(0.5))).ok


@pytest.mark.parametrize("smooth", [False, True])
def test_kinks_close_to_the_solution(smooth):
    bend = nn.functional.softplus if smooth else torch.relu
    data, labels = randn(300, 5, seed=2), randn(300, seed=3)

    def inner(z, x):
        return ((bend(data @ z.reshape(5, 8)).sum(-1) - labels) ** 2).mean()

    problem = plain(inner, regularizer=Proximal(2.0))
    found = diagnose(problem, 0.3 * randn(40, seed=4), inner_solver=GradientDescent(0.02, 1000))
    assert ("nonsmooth" in {f.kind for f in found.findings}) is not smooth
    if not smooth:
        assert "softplus" in named(found, "nonsmooth").cure


@pytest.mark.parametrize("power", [2, 3, 4])
def test_smooth_functions_have_no_kinks(power):
    problem = plain(lambda z, x: follow(z, x) + 3 * z.abs().pow(power + 1).sum() + z.exp().sum())
    assert diagnose(problem).ok


# 8 Precision


def test_a_condition_that_float32_cannot_bear():
    task = single(quadratic_task(20, 3, condition=1e5))
    solver = ClosedForm(lambda x, b: torch.linalg.solve(b["A"], b["B"] @ x), tol=1.0)
    found = diagnose(
        outer=X.float(), task=task, inner_solver=solver, method=DenseExact(), rtol=1e-3
    )
    kinds = {f.kind for f in found.findings}
    assert "precision" in kinds, str(found)
    assert "float64" in named(found, "precision").cure


def test_a_tolerance_below_what_float32_resolves():
    solver = GradientDescent(1.0, 300, tol=1e-12)
    found = diagnose(outer=X.float(), task=single(quadratic_task(20, 3)), inner_solver=solver)
    finding = only(found, "inner problem not solved", "warning")
    assert "Use float64, or loosen tol to" in finding.cure


def test_cancellation():
    problem = plain(
        lambda z, x: follow(z, x) + 0.5 * ((z + 1e4) ** 2 - 1e8 - 2e4 * z).sum() + (z**4).sum()
    )
    solver = LBFGS(100, tol=1e-4)
    found = diagnose(problem, X.float(), inner_solver=solver)
    assert "Use float64" in only(found, "inner problem not solved", "warning").cure
    assert diagnose(problem, X, inner_solver=solver).ok


# 9 The adjoint system


def test_cg_with_too_few_steps_and_how_many_would_do():
    finding = only(diagnose(method=ImplicitCG(max_steps=2)), "adjoint system not solved", "warning")
    assert "condition 10" in finding.found
    steps = int(finding.cure.split("max_steps = ")[1].split(",")[0])
    assert diagnose(method=ImplicitCG(max_steps=steps)).ok


def test_a_series_with_too_few_terms_and_how_many_would_do():
    finding = only(diagnose(method=NeumannSeries(terms=3)), "adjoint system not solved", "warning")
    terms = int(finding.cure.split("terms = ")[1].split(",")[0])
    assert diagnose(method=NeumannSeries(terms=terms)).error < 0.02


def test_damping_that_biases():
    finding = only(diagnose(method=ImplicitCG(damping=0.1)), "damping", "warning")
    assert "smallest curvature of 0.1" in finding.found
    below = float(finding.cure.split("below ")[1])
    assert diagnose(method=ImplicitCG(damping=below)).ok


@pytest.mark.parametrize("method", [FirstOrder(), Unrolled(truncate=3)], ids=repr)
def test_methods_that_are_biased_by_design(method):
    found = diagnose(inner_solver=GradientDescent(1.0, 300), method=method)
    assert "biased by design" in only(found, "biased method", "warning").found


# 10 Native norms


def test_native_norms_are_information():
    params, net = stateless(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).double())
    data = randn(6, 3)
    problem = problem_from(
        lambda z, x, batch: net(z, data).square().mean(),
        lambda z, x, batch: (net(z, data) - 1).square().mean(),
        Proximal(1.0),
    )
    found = diagnose(problem, params, inner_solver=LBFGS(500, tol=1e-5))
    finding = named(found, "native norms")
    assert finding.severity == "info"
    assert all(one.severity != "error" for one in found.findings)
    assert "exact_norms" in finding.cure


# Errors and side effects


def test_a_method_that_the_structure_forbids():
    example = PROBLEMS["cournot"].example()
    found = diagnose(
        example.problem, example.outer, example.task, inner_solver=example.inner_solver
    )
    finding = only(found, "structure", "error")
    assert finding.argument == "method"
    assert "ImplicitCG() needs" in finding.found


def test_a_solver_that_cannot_be_unrolled():
    assert (
        "cannot be differentiated"
        in only(diagnose(method=Unrolled()), "not differentiable", "error").found
    )


def test_a_value_that_is_not_finite():
    problem = plain(lambda z, x: follow(z, x) + (z.sqrt() - 1).square().sum())
    found = diagnose(problem, inner_solver=GradientDescent(0.1, 10))
    assert "log(0)" in named(found, "not finite").cure


def test_overflow_by_divergence_is_blamed_on_the_rate():
    found = diagnose(inner_solver=GradientDescent(50.0, 500))
    assert "Lower the learning rate" in named(found, "not finite").cure
    assert "learning rate" in {f.kind for f in found.findings}


@pytest.mark.parametrize("bad", ["vector", "number"])
def test_an_objective_of_the_wrong_kind(bad):
    result = (lambda z, x: z * x) if bad == "vector" else (lambda z, x: 1.0)
    only(diagnose(plain(result)), "objective", "error")


def test_stacking_in_a_loop_is_information():
    problem = problem_from(
        lambda z, x, batch: follow(z, x) * float(batch), lambda z, x, b: (z**2).sum(), Proximal(1.0)
    )
    tasks = [Task(torch.tensor(c).double()) for c in (1.0, 2.0)]
    assert "run in a loop" in only(diagnose(problem, task=tasks), "stacking", "info").cure


def test_errors_of_the_users_own_code_pass():
    def broken(z, x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        diagnose(plain(broken))


def test_warnings_of_the_users_own_code_pass():
    def noisy(z, x):
        warnings.warn("mine", UserWarning, stacklevel=1)
        return follow(z, x)

    with pytest.warns(UserWarning, match="mine"):
        assert diagnose(plain(noisy)).ok


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": ImplicitCG}, "`method` is a ImplicitCG"),
        ({"inner_solver": None}, "`inner_solver` is None"),
        ({"rtol": 0.0}, "`rtol` is 0.0"),
        ({"outer": [1.0]}, "is a float"),
    ],
)
def test_arguments_of_the_wrong_kind_raise(change, message):
    with pytest.raises(ValueError, match=message):
        diagnose(**change)


def test_nothing_of_the_users_is_changed():
    problem, task = quadratic(), quadratic_task(20, 3)
    outer = X.clone().requires_grad_()
    outer.grad = torch.ones_like(outer)
    data = {key: value.clone() for key, value in task.inner_batch.items()}
    attributes = dict(vars(problem))
    state = torch.get_rng_state()
    diagnose(problem, outer, task, inner_solver=GradientDescent(1.0, 5))
    assert torch.equal(outer, X)
    assert outer._version == 0
    assert torch.equal(outer.grad, torch.ones(3).double())
    assert all(torch.equal(task.inner_batch[key], value) for key, value in data.items())
    assert vars(problem) == attributes
    assert torch.equal(state, torch.get_rng_state())


def test_a_hypergradient_afterwards_is_the_same():
    problem, task, method = quadratic(), quadratic_task(20, 3), ImplicitCG()
    before = hypergradient(problem, X, task, inner_solver=SOLVED, method=method)
    known = problem.__dict__["_stacking"]
    diagnose(problem, X, task)
    assert problem.__dict__["_stacking"] is known
    after = hypergradient(problem, X, task, inner_solver=SOLVED, method=method)
    assert torch.equal(before.gradient, after.gradient)


# The report


def test_the_report():
    found = diagnose(inner_solver=GradientDescent(2.1, 10), method=ImplicitCG(max_steps=2))
    assert isinstance(found, Diagnosis)
    lines = str(found).splitlines()
    assert lines[0].startswith(
        f"{len(found.findings)} findings: ImplicitCG(max_steps=2) with GradientDescent(lr=2.1"
    )
    assert max(map(len, lines[1:])) <= 96
    severities = [f.severity for f in found.findings]
    assert severities == sorted(severities, key=["error", "warning", "info"].index)
    for name in ("inner solve", "inner error", "adjoint solve", "gradient error", "curvature"):
        assert name in str(found)
    assert repr(found)


def test_a_large_inner_variable_is_measured_by_few_steps():
    scales = torch.logspace(0, 3, 1000, dtype=torch.float64)
    problem = plain(
        lambda z, x: 0.5 * (scales * (z - x.sum()) ** 2).sum(),
        regularizer=None,
        initial_inner=lambda x, batch: x.new_zeros(1000),
    )
    found = diagnose(problem, method=ImplicitCG(max_steps=1000))
    assert found.ok, str(found)
    assert "at least, by Lanczos" in str(found)
    assert found.curvature[1] == pytest.approx(1000.0, rel=1e-3)
