"""A probe tells curvature and exactness, against dense algebra where that is possible."""

import math
from dataclasses import replace

import pytest
import torch

from bilevel import Task, hypergradient
from bilevel.experiments.few_shot import make_job
from bilevel.experiments.few_shot.probe import probe
from bilevel.pytree import tree_leaves
from bilevel.reference import dense_hypergradient, to_float64
from bilevel.solvers import FirstOrder, GradientDescent


@pytest.fixture
def smooth(settings):
    """A small network that is smooth, with a λ at which its inner problems are convex."""
    return make_job(settings("imaml-no-norm", channels=2, ways=2, strength=2.0, inner_lr=0.05))


def test_a_smooth_network_is_solved_and_meets_finite_differences(smooth):
    for found in probe(smooth, smooth.outer):
        assert found["solved_residual"] <= 1e-6
        assert found["exact_status"] in ("CONVERGED", "BUDGET")
        assert found["difference_error"] <= 1e-4
        assert found["curvature"] > 0
        # Two inner steps are not enough, and the estimate says by how much.
        assert found["error_estimate"] == pytest.approx(found["error"], rel=0.3)


def test_the_error_is_that_of_dense_algebra(smooth):
    found = probe(smooth, smooth.outer)[0]
    task = replace(smooth.training, tasks=2, seed=10**6)(0).unstack()[0]
    given = hypergradient(
        smooth.problem,
        smooth.outer,
        task,
        inner_solver=smooth.inner_solver,
        method=smooth.method,
    )
    exact = dense_hypergradient(
        smooth.problem,
        to_float64(smooth.outer),
        Task(to_float64(task.inner_batch), to_float64(task.outer_batch)),
        to_float64(given.inner),
    )
    pairs = list(zip(tree_leaves(given.gradient), exact.gradient, strict=True))
    gap = math.sqrt(sum((a.double() - b).square().sum() for a, b in pairs))
    size = math.sqrt(sum(b.square().sum() for _, b in pairs))
    assert found["error"] == pytest.approx(gap / size, rel=1e-3)
    assert found["curvature"] == pytest.approx(exact.eigenvalues[0], rel=0.2)


def test_the_cosine_is_that_of_the_two_gradients(smooth):
    found = probe(smooth, smooth.outer)[0]
    task = replace(smooth.training, tasks=2, seed=10**6)(0).unstack()[0]
    settings = {"inner_solver": smooth.inner_solver}
    one, first = (
        torch.cat(
            [
                leaf.flatten().double()
                for leaf in tree_leaves(
                    hypergradient(
                        smooth.problem, smooth.outer, task, method=method, **settings
                    ).gradient
                )
            ]
        )
        for method in (smooth.method, FirstOrder())
    )
    expected = torch.nn.functional.cosine_similarity(one, first, dim=0).item()
    assert found["cosine_with_first_order"] == pytest.approx(expected, rel=1e-4)
    assert expected < 0.9999


def test_a_look_that_fails_is_noted(smooth):
    wild = replace(smooth, inner_solver=GradientDescent(1e20, 5))
    assert ["NON_FINITE" in found["note"] for found in probe(wild, wild.outer)] == [True, True]


def test_a_probe_repeats_and_leaves_nothing_behind(smooth):
    before = [leaf.clone() for leaf in tree_leaves(smooth.outer)]
    assert probe(smooth, smooth.outer) == probe(smooth, smooth.outer)
    assert all(a.equal(b) for a, b in zip(before, tree_leaves(smooth.outer), strict=True))


@pytest.mark.parametrize("learner", ["fomaml-regularized", "imaml-released", "imaml-learned"])
def test_every_method_can_be_looked_at(learner, settings):
    job = make_job(settings(learner))
    for found in probe(job, job.outer):
        assert -1 <= found["cosine_with_first_order"] <= 1 + 1e-6
        assert found["inner_residual"] > 0
    if learner == "fomaml-regularized":
        assert found["cosine_with_first_order"] == pytest.approx(1.0, abs=1e-6)
        assert found["error_estimate"] is None


def test_the_pull_is_that_of_the_regularizer(settings):
    from bilevel.experiments.few_shot.probe import _pull

    job = make_job(settings("imaml-layers", strength=3.0))
    inner = {name: value + 0.5 for name, value in job.outer["theta"].items()}
    count = sum(value.numel() for value in inner.values())
    assert _pull(job, job.outer, inner) == pytest.approx(3.0 * 0.5 * math.sqrt(count), rel=1e-5)
    assert torch.is_tensor(inner["0.weight"])
