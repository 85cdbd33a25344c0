"""Memory: flat in inner steps for implicit methods, linear for unrolling, √T with checkpoints."""

from __future__ import annotations

import torch

from bilevel import hypergradient, stateless
from bilevel.memory import held_bytes, peak_bytes
from bilevel.problems import FewShot, conv_strided
from bilevel.solvers import FirstOrder, GradientDescent, ImplicitCG, NeumannSeries, Unrolled
from bilevel.task import TaskBatch


def test_peak_counts_live_bytes():
    def build_and_release():
        for _ in range(5):
            torch.ones(1000)
        return torch.ones(500)

    assert peak_bytes(build_and_release) == 4000


def test_held_counts_what_the_result_keeps_alive():
    assert held_bytes(lambda: torch.ones(1000) + torch.ones(1000)) == 4000
    assert held_bytes(lambda: float(torch.ones(1000).sum())) == 0
    x = torch.ones(1000, requires_grad=True)
    # The graph of a sine keeps its argument, which was there before; of two, the first value, too.
    assert held_bytes(lambda: x.sin()) == 4000
    assert held_bytes(lambda: x.sin().sin()) == 8000


def peaks(method, steps):
    params, net = stateless(conv_strided(3, channels=2, size=14, seed=0))
    problem = FewShot(net, strength=20.0)
    images = torch.rand(2, 6, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(3).repeat(2).expand(2, 6)
    tasks = TaskBatch((images, labels), (images, labels))
    found = []
    for count in steps:
        solver = GradientDescent(lr=0.01, max_steps=count)

        def run(solver=solver):
            hypergradient(
                problem,
                problem.initial_outer(params),
                tasks,
                inner_solver=solver,
                method=method,
            )

        run()
        found.append(peak_bytes(run))
    return found


def test_implicit_methods_are_flat_in_inner_steps():
    for method in (ImplicitCG(max_steps=3, rtol=0.0), NeumannSeries(terms=3), FirstOrder()):
        one, hundred = peaks(method, [1, 100])
        assert hundred <= 1.02 * one, method


def test_unrolled_is_linear_and_checkpointed_grows_with_the_root():
    few, many = peaks(Unrolled(), [16, 64])
    assert 3.5 < many / few < 4.1
    root_few, root_many = peaks(Unrolled(checkpoint=True), [16, 64])
    # 2 √T segments and steps: four times the steps, twice the memory.
    assert 1.4 < root_many / root_few < 2.3
    assert root_many < 0.35 * many


def test_truncated_unrolling_is_flat():
    one, hundred = peaks(Unrolled(truncate=5), [5, 100])
    assert hundred <= 1.02 * one
