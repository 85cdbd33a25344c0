"""The contract: every registered method on every registered problem, by three routes.

A new problem is tested by being registered; a new method by being registered and given the settings
with which it is exact (or its own formula, if it is biased by design). A method whose linear solver
needs more structure than a problem promises says so.
"""

from __future__ import annotations

import math

import pytest
import torch

import bilevel.problems
import bilevel.solvers
from bilevel import (
    ImplicitMethod,
    Proximal,
    StructureError,
    check_hypergradient,
    hypergradient,
)
from bilevel.problems import Quadratic
from bilevel.pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from bilevel.registry import METHODS, PROBLEMS
from bilevel.solvers import (
    CG,
    GMRES,
    DenseExact,
    FirstOrder,
    GradientDescent,
    Implicit,
    ImplicitCG,
    NeumannSeries,
    Unrolled,
)

ERROR = {torch.float64: 1e-8, torch.float32: 1e-4}
RTOL = {torch.float64: 1e-12, torch.float32: 1e-7}


def contraction_steps(example, accuracy):
    """Steps of gradient descent at 2 / (L + μ) to reduce an error to ``accuracy``."""
    rate = (example.condition - 1) / (example.condition + 1)
    return math.ceil(math.log(accuracy) / math.log(max(rate, 1e-3))) + 20


def exact_settings(name, example, dtype):
    """The method with settings under which it is exact, and an inner solver to go with it."""
    rtol = RTOL[dtype]
    steps = contraction_steps(example, 1e-3 * ERROR[dtype])
    descent = GradientDescent(lr=2 / (example.lipschitz + example.mu), max_steps=steps)
    general = not example.problem.structure.satisfies(CG.needs)
    krylov = (GMRES if general else CG)(max_steps=2000, rtol=rtol)
    table = {
        "cg": lambda: (ImplicitCG(max_steps=2000, rtol=rtol), example.inner_solver),
        "implicit": lambda: (Implicit(krylov), example.inner_solver),
        "dense": lambda: (DenseExact(), example.inner_solver),
        "neumann": lambda: (
            NeumannSeries(terms=2 * steps, scale=1 / example.lipschitz),
            example.inner_solver,
        ),
        "unrolled": lambda: (Unrolled(), descent),
    }
    return table[name]()


BIASED = {"first-order"}


def fits(method, problem):
    """The problem promises all the structure that the method's linear solver needs."""
    return not isinstance(method, ImplicitMethod) or problem.structure.satisfies(
        method._linear_solver().needs
    )


def test_every_method_is_under_the_contract():
    example = Quadratic.example()
    for name in METHODS:
        if name not in BIASED:
            method, _ = exact_settings(name, example, torch.float64)
            assert METHODS.name_of(type(method)) == name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("tasks", [None, 3], ids=["single", "batch"])
@pytest.mark.parametrize("method_name", [name for name in METHODS if name not in BIASED])
@pytest.mark.parametrize("problem_name", list(PROBLEMS))
def test_exact_methods_match_dense_algebra_and_finite_differences(
    problem_name, method_name, tasks, dtype
):
    example = PROBLEMS[problem_name].example(tasks=tasks, dtype=dtype)
    method, inner_solver = exact_settings(method_name, example, dtype)

    def check():
        return check_hypergradient(
            example.problem,
            example.outer,
            example.task,
            inner_solver=inner_solver,
            method=method,
            rtol=ERROR[dtype],
        )

    if not fits(method, example.problem):
        with pytest.raises(
            StructureError, match=r"use Implicit\(GMRES\(\)\), DenseExact\(\), or NeumannSeries"
        ):
            check()
        return
    report = check()
    assert report.ok, f"\n{report}"
    if dtype == torch.float64:
        assert report.result.ok, report.result.summary()
    assert all(leaf.dtype == dtype for leaf in tree_leaves(report.result.gradient))
    if example.gradient is not None:
        exact = [leaf.double() for leaf in tree_leaves(example.gradient)]
        found = [leaf.double() for leaf in tree_leaves(report.result.gradient)]
        gap = math.sqrt(sum((a - b).square().sum() for a, b in zip(exact, found, strict=True)))
        size = math.sqrt(sum(a.square().sum() for a in exact))
        assert gap <= ERROR[dtype] * size


@pytest.mark.filterwarnings("ignore:FirstOrder finds no dependence")
@pytest.mark.parametrize("tasks", [None, 3], ids=["single", "batch"])
@pytest.mark.parametrize("problem_name", list(PROBLEMS))
def test_first_order_meets_its_own_formula(problem_name, tasks):
    """∂ₓf + (∂ initial_inner/∂x)ᵀ ∂_z f, by hand and task by task."""
    example = PROBLEMS[problem_name].example(tasks=tasks)
    result = (
        hypergradient(
            example.problem,
            example.outer,
            example.task,
            inner_solver=example.inner_solver,
            method=FirstOrder(),
            reduction="none",
        )
        if _first_order_depends(example)
        else None
    )
    if result is None:
        with pytest.raises(bilevel.DependenceError):
            hypergradient(
                example.problem,
                example.outer,
                example.task,
                inner_solver=example.inner_solver,
                method=FirstOrder(),
            )
        return
    one_by_one = [example.task] if tasks is None else example.task.unstack()
    for i, task in enumerate(one_by_one):
        inner = result.inner if tasks is None else tree_map(lambda x, i=i: x[i], result.inner)
        leaves, spec = tree_flatten(example.outer)
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        outer = tree_unflatten(leaves, spec)
        z = tree_map(lambda x: x.clone().requires_grad_(), inner)
        value = example.problem.outer_objective(z, outer, task.outer_batch)
        slopes = torch.autograd.grad(value, tree_leaves(z), retain_graph=True)
        start = tree_leaves(example.problem.initial_inner(outer, task.inner_batch))
        surrogate = value * 1.0 + sum(
            (a * b.detach()).sum() for a, b in zip(start, slopes, strict=True)
        )
        expected = torch.autograd.grad(surrogate, leaves, allow_unused=True)
        for got, want in zip(tree_leaves(result.gradient), expected, strict=True):
            want = torch.zeros_like(got[i]) if want is None else want
            torch.testing.assert_close(got[i], want, rtol=1e-10, atol=1e-12)


def _first_order_depends(example):
    leaves, spec = tree_flatten(example.outer)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    outer = tree_unflatten(leaves, spec)
    task = example.task if not hasattr(example.task, "unstack") else example.task.unstack()[0]
    start = example.problem.initial_inner(outer, task.inner_batch)
    value = example.problem.outer_objective(start, outer, task.outer_batch)
    return (
        any(g is not None for g in torch.autograd.grad(value, leaves, allow_unused=True))
        if value.requires_grad
        else False
    )


# Conditioning, as far as each method promises


@pytest.mark.parametrize("tasks", [None, 3], ids=["single", "batch"])
@pytest.mark.parametrize(
    ("method_name", "condition", "dtype"),
    [
        ("cg", 1e4, torch.float64),
        ("implicit", 1e4, torch.float64),
        ("dense", 1e4, torch.float64),
        ("neumann", 100.0, torch.float64),
        ("unrolled", 100.0, torch.float64),
        ("cg", 1e3, torch.float32),
        ("implicit", 1e3, torch.float32),
        ("dense", 1e3, torch.float32),
        ("neumann", 100.0, torch.float32),
        ("unrolled", 100.0, torch.float32),
    ],
)
def test_ill_conditioned_quadratics(method_name, condition, dtype, tasks):
    example = Quadratic.generated(30, 5, condition, tasks, seed=1, dtype=dtype)
    method, inner_solver = exact_settings(method_name, example, dtype)
    result = hypergradient(
        example.problem, example.outer, example.task, inner_solver=inner_solver, method=method
    )
    error = (result.gradient - example.gradient).double().norm() / example.gradient.double().norm()
    assert error <= ERROR[dtype]


@pytest.mark.parametrize("method_name", [name for name in METHODS if name not in BIASED])
def test_learned_strength_and_center(method_name):
    """A scalar λ and a center that are both outer variables."""
    problem = Quadratic(
        Proximal(lambda outer: outer["log_strength"].exp(), lambda outer: outer["center"])
    )
    base = Quadratic.generated(6, 6, 10.0, tasks=2)
    objectives = bilevel.problem_from(
        lambda z, x, batch: problem.inner_objective(z, x["center"], batch),
        lambda z, x, batch: problem.outer_objective(z, x["center"], batch),
        problem.regularizer,
    )
    outer = {"center": base.outer, "log_strength": torch.tensor(0.4, dtype=torch.float64)}
    shift = math.exp(0.4)
    example = type(base)(
        objectives,
        outer,
        base.task,
        GradientDescent(lr=2 / (base.lipschitz + base.mu + 2 * shift), max_steps=400),
        lipschitz=base.lipschitz + shift,
        mu=base.mu + shift,
    )
    method, inner_solver = exact_settings(method_name, example, torch.float64)
    report = check_hypergradient(
        objectives, outer, base.task, inner_solver=inner_solver, method=method, rtol=1e-8
    )
    assert report.ok, f"\n{report}"
