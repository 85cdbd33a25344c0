"""What every registered problem's example keeps; a new problem is tested by being registered."""

import math

import pytest
import torch

import bilevel.problems  # noqa: F401
from bilevel import Structure, TaskBatch, hypergradient, solve_inner
from bilevel.pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from bilevel.registry import PROBLEMS
from bilevel.solvers import (
    CG,
    GMRES,
    DenseExact,
    GradientDescent,
    Implicit,
    NeumannSeries,
    Unrolled,
)

every_problem = pytest.mark.parametrize("name", PROBLEMS.names())
one_or_three = pytest.mark.parametrize("tasks", [None, 3], ids=["single", "stacked"])
EXACT = {torch.float64: 1e-8, torch.float32: 1e-4}


def data(example):
    leaves = tree_leaves([example.outer, example.task.inner_batch, example.task.outer_batch])
    return [leaf for leaf in leaves if leaf is not None]


def krylov(example, max_steps, rtol=1e-5):
    """Implicit differentiation by the Krylov method that the problem's structure permits."""
    solver = CG if example.problem.structure.satisfies(CG.needs) else GMRES
    return Implicit(solver(max_steps=max_steps, rtol=rtol))


def compute(example, method, inner_solver=None):
    return hypergradient(
        example.problem,
        example.outer,
        example.task,
        inner_solver=inner_solver or example.inner_solver,
        method=method,
    )


@pytest.mark.parametrize("dtype", EXACT)
@every_problem
@one_or_three
def test_solver_reaches_the_solution(name, tasks, dtype):
    example = PROBLEMS[name].example(tasks=tasks, dtype=dtype)
    found = solve_inner(
        example.problem, example.outer, example.task, inner_solver=example.inner_solver
    )
    assert found.ok
    assert found.residual.max() <= (1e-10 if dtype == torch.float64 else 1e-5)
    assert all(leaf.dtype == dtype for leaf in data(example) if leaf.is_floating_point())
    leaves = tree_leaves(found.inner)
    assert sum(leaf.numel() for leaf in leaves) / (tasks or 1) <= 200
    assert isinstance(example.task, TaskBatch) == (tasks is not None)
    assert example.note


@pytest.mark.parametrize("seed", [0, 1])
@every_problem
def test_curvature_is_within_its_bounds(name, seed, inner_hessian):
    example = PROBLEMS[name].example(tasks=2, seed=seed)
    found = solve_inner(
        example.problem, example.outer, example.task, inner_solver=example.inner_solver
    )
    leaves, spec = tree_flatten(found.inner)
    for i, task in enumerate(example.task.unstack()):
        inner = tree_unflatten([leaf[i] for leaf in leaves], spec)
        for point in (inner, example.problem.initial_inner(example.outer, task.inner_batch)):
            jacobian = inner_hessian(example.problem, example.outer, task, point)
            center = (example.lipschitz + example.mu) / 2
            offset = jacobian - center * torch.eye(len(jacobian), dtype=jacobian.dtype)
            radius = torch.linalg.matrix_norm(offset, 2).item()
            assert radius <= (example.lipschitz - example.mu) / 2 + 1e-9 * example.lipschitz
            asymmetry = (jacobian - jacobian.mT).norm() / jacobian.norm()
            if example.problem.structure is Structure.GENERAL:
                assert point is not inner or asymmetry > 0.01
            else:
                assert asymmetry < 1e-12
    assert example.mu > 0
    assert example.condition == example.lipschitz / example.mu <= 25


@every_problem
@one_or_three
def test_routes_agree(name, tasks, relative_error, dense_hypergradient):
    example = PROBLEMS[name].example(tasks=tasks)
    steps = math.ceil(26 * example.condition)
    descent = GradientDescent(lr=1 / example.lipschitz, max_steps=steps)
    found = compute(example, DenseExact())
    assert found.ok
    reference = dense_hypergradient(example.problem, example.outer, example.task, found.inner)
    if example.gradient is not None:
        assert relative_error(example.gradient, reference) <= 1e-9
    routes = {
        "dense": found,
        "krylov": compute(example, krylov(example, 300, 1e-12)),
        "neumann": compute(example, NeumannSeries(terms=steps, scale=1 / example.lipschitz)),
    }
    if tasks is None:
        routes["unrolled"] = compute(example, Unrolled(), descent)
    errors = {key: relative_error(r.gradient, reference) for key, r in routes.items()}
    assert max(errors.values()) <= EXACT[torch.float64], errors
    assert all(route.ok for route in routes.values())


@every_problem
def test_finite_differences_agree(name):
    example = PROBLEMS[name].example(tasks=2)
    found = compute(example, DenseExact())
    random = torch.Generator().manual_seed(1)
    direction = tree_map(
        lambda x: torch.randn(x.shape, generator=random, dtype=x.dtype), example.outer
    )

    def value(step):
        outer = tree_map(lambda x, d: x + step * d, example.outer, direction)
        inner = solve_inner(
            example.problem, outer, example.task, inner_solver=example.inner_solver
        ).inner
        leaves, spec = tree_flatten(inner)
        return sum(
            example.problem.outer_objective(
                tree_unflatten([leaf[i] for leaf in leaves], spec), outer, task.outer_batch
            )
            for i, task in enumerate(example.task.unstack())
        ).item() / len(example.task)

    h = 1e-4
    # Fourth-order central differences.
    slope = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
    pairs = zip(tree_leaves(found.gradient), tree_leaves(direction), strict=True)
    expected = sum((g * d).sum() for g, d in pairs).item()
    assert slope == pytest.approx(expected, rel=1e-6, abs=1e-9)


@every_problem
@one_or_three
def test_float32_is_close_to_float64(name, tasks, relative_error):
    double = compute(PROBLEMS[name].example(tasks=tasks), DenseExact())
    single = PROBLEMS[name].example(tasks=tasks, dtype=torch.float32)
    found = compute(single, krylov(single, 100))
    assert found.ok
    assert all(leaf.dtype == torch.float32 for leaf in tree_leaves(found.gradient))
    assert relative_error(found.gradient, double.gradient) <= EXACT[torch.float32]


@every_problem
def test_seed_decides(name):
    make = PROBLEMS[name].example
    state = torch.get_rng_state()
    first, again, other = make(tasks=2), make(tasks=2), make(tasks=2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(data(first), data(again), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(data(first), data(other), strict=True))
    floating = [leaf for leaf in data(first)[1:] if leaf.is_floating_point() and len(leaf) == 2]
    assert any(not torch.equal(leaf[0], leaf[1]) for leaf in floating)


@every_problem
def test_problem_is_printable_and_says_its_structure(name):
    problem = PROBLEMS[name].example().problem
    assert repr(problem).startswith(type(problem).__name__ + "(")
    structures = {
        "cournot": Structure.GENERAL,
        "equilibrium": Structure.GENERAL,
        "few-shot": Structure.SYMMETRIC,
        "network-design": Structure.SYMMETRIC,
        "path-equilibrium": Structure.SYMMETRIC,
        "road-tolls": Structure.SYMMETRIC,
        "sinusoid": Structure.SYMMETRIC,
    }
    assert problem.structure is structures.get(name, Structure.POSITIVE_DEFINITE)
    assert problem.is_equilibrium == (problem.structure is Structure.GENERAL)


@every_problem
def test_metrics_are_per_task(name):
    example = PROBLEMS[name].example(tasks=3)
    found = compute(example, krylov(example, 2))
    assert all(value.shape == (3,) for value in found.metrics.values())
