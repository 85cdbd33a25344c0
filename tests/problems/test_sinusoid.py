import math

import pytest
import torch
from torch import nn

from bilevel import hypergradient
from bilevel.problems import Sinusoid, SinusoidSampler
from bilevel.solvers import GradientDescent, ImplicitCG


def test_points_lie_on_one_wave_per_task():
    batch = SinusoidSampler(shots=10, queries=10, tasks=50, dtype=torch.float64)(3)
    (u, y), (v, t) = batch.inner_batch, batch.outer_batch
    points, values = torch.cat([u, v], 1), torch.cat([y, t], 1)
    # a sin(u − b) is linear in (sin u, cos u): fit, and read amplitude and phase off.
    basis = torch.cat([points.sin(), points.cos()], -1)
    fit = torch.linalg.lstsq(basis, values).solution
    torch.testing.assert_close(basis @ fit, values)
    amplitude = fit.squeeze(-1).norm(dim=-1)
    phase = torch.atan2(-fit[:, 1, 0], fit[:, 0, 0])
    assert ((amplitude >= 0.1) & (amplitude <= 5.0)).all()
    assert amplitude.max() - amplitude.min() > 3.0
    assert ((phase >= 0.0) & (phase <= math.pi)).all()
    assert phase.max() - phase.min() > 2.0
    assert points.abs().max() <= 5.0


def test_step_and_seed_decide():
    sampler = SinusoidSampler(tasks=4, seed=1)
    state = torch.get_rng_state()
    third = sampler(3)
    assert torch.equal(torch.get_rng_state(), state)
    sampler(0)
    again, next_one, other = sampler(3), sampler(4), SinusoidSampler(tasks=4, seed=2)(3)
    assert torch.equal(third.inner_batch[1], again.inner_batch[1])
    assert third.keys == again.keys == tuple((1, 3, i) for i in range(4))
    assert not torch.equal(third.inner_batch[1], next_one.inner_batch[1])
    assert not torch.equal(third.inner_batch[1], other.inner_batch[1])


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_published_network_adapts(activation):
    params, net = Sinusoid.network(activation=activation)
    assert sum(p.numel() for p in params.values()) == 1_761
    problem, batch = Sinusoid(net), SinusoidSampler(tasks=4)(0)
    found = hypergradient(
        problem,
        params,
        batch,
        inner_solver=GradientDescent(lr=0.02, max_steps=50),
        method=ImplicitCG(max_steps=10, rtol=0.0),
    )
    before = torch.stack(
        [problem.inner_objective(params, params, task.inner_batch) for task in batch.unstack()]
    )
    assert (found.inner_value < before).all()
    assert found.metrics["mse"].shape == (4,)
    assert torch.equal(found.metrics["mse"], found.outer_value)
    assert found.gradient.keys() == params.keys()


def test_learned_strength(relative_error, dense_hypergradient):
    example = Sinusoid.example()
    problem = Sinusoid(example.problem.net, strength=15.0, learn_strength="scalar")
    outer = problem.initial_outer(example.outer)
    found = hypergradient(
        problem,
        outer,
        example.task,
        inner_solver=example.inner_solver,
        method=ImplicitCG(max_steps=300, rtol=1e-12),
    )
    reference = dense_hypergradient(problem, outer, example.task, found.inner)
    assert relative_error(found.gradient, reference) <= 1e-8


def test_settings_are_checked():
    with pytest.raises(ValueError, match="shots"):
        SinusoidSampler(shots=0)
    with pytest.raises(ValueError, match="step"):
        SinusoidSampler()(-1)
