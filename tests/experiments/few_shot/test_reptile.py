"""Reptile's direction is θ − φ, the mean over tasks."""

import pytest
import torch

from bilevel import hypergradient, solve_inner
from bilevel.experiments.few_shot.reptile import Reptile
from bilevel.problems import FewShot
from bilevel.solvers import GradientDescent


def test_the_direction_is_the_mean_way_back():
    example = FewShot.example(tasks=3)
    problem = FewShot(example.problem.net, strength=0.0)
    solver = GradientDescent(0.1, 5)
    found = hypergradient(
        problem, example.outer, example.task, inner_solver=solver, method=Reptile()
    )
    adapted = solve_inner(problem, example.outer, example.task, inner_solver=solver).inner
    for name, theta in example.outer.items():
        torch.testing.assert_close(found.gradient[name], (theta - adapted[name]).mean(0))


def test_what_is_not_adapted_does_not_move():
    example = FewShot.example(tasks=2)
    head = [name for name in example.outer if name.startswith("7.")]
    problem = FewShot(example.problem.net, strength=0.0, adapted=head)
    with pytest.warns(match=r"finds no dependence on `outer\['0.weight'\]`"):
        found = hypergradient(
            problem,
            example.outer,
            example.task,
            inner_solver=GradientDescent(0.1, 5),
            method=Reptile(),
        )
    assert found.gradient["0.weight"].eq(0).all()
    assert found.gradient["7.weight"].norm() > 0


def test_the_outer_objective_is_only_reported():
    example = FewShot.example(tasks=2)
    problem = FewShot(example.problem.net, strength=0.0)
    settings = {"inner_solver": GradientDescent(0.1, 5), "method": Reptile()}
    found = hypergradient(problem, example.outer, example.task, **settings)
    moved = type(example.task)(
        example.task.inner_batch, (example.task.outer_batch[0].flip(1), example.task.outer_batch[1])
    )
    other = hypergradient(problem, example.outer, moved, **settings)
    assert not torch.equal(found.outer_value, other.outer_value)
    for name in example.outer:
        assert found.gradient[name].equal(other.gradient[name])
