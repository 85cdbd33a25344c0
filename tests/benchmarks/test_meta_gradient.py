"""The benchmark of the hypergradient, at a size that takes a second."""

import pytest
import torch


@pytest.fixture
def benchmark(script, monkeypatch):
    module = script("meta_gradient")
    # A network so small is bent more: at the λ of the benchmark CG would stop early.
    for name, small in {"CHANNELS": 4, "STEPS": 2, "STRENGTH": 100.0, "RATE": 1e-3}.items():
        monkeypatch.setattr(module, name, small)
    return module


def test_variants_that_agree_are_timed_side_by_side(benchmark):
    times = benchmark.measure("strided", 2, 2, torch.device("cpu"))
    assert set(times) - {"torchopt"} == {
        "hand",
        "bilevel-batched",
        "bilevel-loop",
        "bilevel-auto",
        "kernels-loop",
        "kernels-batched",
    }
    assert all(len(one.seconds) == 2 and min(one.seconds) > 0 for one in times.values())


def test_a_variant_that_computes_something_else_is_not_timed(benchmark, monkeypatch):
    wrong = benchmark.Setting.by_hand
    monkeypatch.setattr(
        benchmark.Setting,
        "by_hand",
        lambda self: {name: 1.001 * one for name, one in wrong(self).items()},
    )
    with pytest.raises(SystemExit, match=r"bilevel-auto is 1\.0e-03 away from the loop by hand"):
        benchmark.measure("strided", 2, 2, torch.device("cpu"))


def test_the_sum_of_the_kernels_counts_each_as_often_as_it_is_needed(benchmark):
    times = {
        f"loop {name}": benchmark.Times((one,))
        for name, one in {"gradient": 1.0, "graph": 10.0, "product": 100.0, "outer": 1e3}.items()
    }
    assert benchmark.bare_seconds(times, "loop", 2) == [2 * (16 * 1 + 10 + 5 * 100 + 1000)]
