from dataclasses import replace

import pytest
import torch

from bilevel import hypergradient
from bilevel.experiments.few_shot.job import make_job
from bilevel.experiments.few_shot.strength import balancing_strength
from bilevel.pytree import tree_leaves
from bilevel.status import Status


@pytest.fixture
def learned(settings):
    """A job whose λ is learned, and its first hypergradient."""
    job = make_job(settings(learn_strength="scalar"))
    result = hypergradient(
        job.problem, job.outer, job.training(0), inner_solver=job.inner_solver, method=job.method
    )
    return job, result


def distances(job, result):
    """How far each task moved away from θ, leaf by leaf."""
    gaps = [result.inner[name] - job.outer["theta"][name] for name in result.inner]
    return torch.cat([gap.flatten(1) for gap in gaps], 1).norm(dim=1)


def test_at_the_balance_the_pull_is_as_large_as_the_gradient_left(learned):
    job, result = learned
    left = result.diagnostics.inner.residual.float()
    pull = balancing_strength(result).float() * distances(job, result)
    # The median: at least half of the tasks on either side.
    assert 2 * (pull >= left * (1 - 1e-4)).sum() >= len(left)
    assert 2 * (pull <= left * (1 + 1e-4)).sum() >= len(left)


def test_tasks_that_failed_or_did_not_move_do_not_count(learned):
    job, result = learned
    others = [Status.NON_FINITE] * (len(result.status) - 1)
    alone = replace(result, status=(Status.BUDGET, *others))
    expected = result.diagnostics.inner.residual[0].item() / distances(job, result)[0].item()
    assert balancing_strength(alone).item() == pytest.approx(expected, rel=1e-4)

    nowhere = torch.zeros(len(result.status))
    still = replace(result, diagnostics=replace(result.diagnostics, center_distance=nowhere))
    assert balancing_strength(still) == 0.0


@pytest.mark.parametrize("kind", ["scalar", "layer", "parameter"])
def test_a_learned_strength_stays_where_it_is_felt(kind, settings):
    job = make_job(settings(learn_strength=kind, strength=1e-6, strength_lr=0.01))
    training = job.trainer().begin(job.outer)
    for step in range(2):
        _, result = training.advance(job.training(step))
        least = balancing_strength(result)
        assert least > 1e-3  # far above the start
        for leaf in tree_leaves(job.outer["log_strength"]):
            assert (leaf.exp() >= 0.999 * least).all()
