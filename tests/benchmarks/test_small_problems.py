"""The benchmark of small problems, at a size that takes a second."""

import pytest
import torch

from bilevel.problems import Logistic, Ridge


@pytest.fixture
def benchmark(script, monkeypatch):
    module = script("small_problems")
    # No C++ compiler is needed to trace.
    monkeypatch.setattr(module, "COMPILER", "aot_eager")
    return module


@pytest.mark.parametrize("density", [1.0, 0.2])
@pytest.mark.parametrize("problem", [Ridge, Logistic])
def test_variants_that_agree_are_timed_side_by_side(benchmark, problem, density):
    loss, jax_loss = {
        Ridge: (benchmark.half_mean_square, benchmark.jax_half_mean_square),
        Logistic: (benchmark.logistic, benchmark.jax_logistic),
    }[problem]
    setting = benchmark._setting(problem(), loss, jax_loss, 20, 6, 3, density)
    times = benchmark.measure(setting, 2)
    ours = {"bilevel"} if density < 1.0 else {"bilevel", "bilevel-compiled"}
    assert {"hand", *ours} <= set(times) <= {"hand", *ours, "torchopt", "jaxopt"}
    assert all(len(one.seconds) == 2 and min(one.seconds) > 0 for one in times.values())


def test_descent_from_zero_is_the_same_by_hand(benchmark):
    setting = benchmark._setting(Logistic(), benchmark.logistic, None, 20, 6, 3, descent=7)
    assert not torch.allclose(setting.solved(), setting.inner, rtol=1e-3)
    torch.testing.assert_close(setting.ours()(), setting.by_hand(), rtol=1e-10, atol=0)
    assert "bilevel-compiled" in setting.variants()


def test_a_variant_that_computes_something_else_is_not_timed(benchmark, monkeypatch):
    setting = benchmark._setting(Ridge(), benchmark.half_mean_square, None, 20, 6, 3)
    wrong = setting.by_hand()
    monkeypatch.setattr(benchmark.Setting, "by_hand", lambda self: 1.001 * wrong)
    with pytest.raises(SystemExit, match=r"bilevel is 1\.0e-03 away from the loop by hand"):
        benchmark.measure(setting, 2)


def test_all_start_at_the_exact_inner_solution(benchmark):
    setting = benchmark._setting(Ridge(), benchmark.half_mean_square, None, 20, 6, 3)
    features, targets = setting.training
    matrix = features.T @ features / 20 + torch.diag(setting.outer.exp())
    wanted = torch.linalg.solve(matrix, features.T @ targets / 20)
    assert torch.allclose(setting.inner, wanted, atol=1e-8)
