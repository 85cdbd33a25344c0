"""The benchmark of scaling, at a size that takes seconds."""

import pytest


def test_the_exponent_is_the_slope_of_the_logarithms(script):
    scaling = script("scaling")
    sizes = [1, 10, 100]
    assert scaling.exponent(sizes, [3 * size**0.5 for size in sizes]) == pytest.approx(0.5)
    assert scaling.exponent(sizes, [7 * size for size in sizes]) == pytest.approx(1.0)


def test_a_small_run_has_every_part(script, monkeypatch, tmp_path):
    scaling = script("scaling")
    whole = scaling.one_hypergradient

    def small(tasks, channels, task_chunk=None):
        return whole(tasks if task_chunk else min(tasks, 2), 1 + channels // 10, task_chunk)

    monkeypatch.setattr(scaling, "one_hypergradient", small)
    found = scaling.measure(False, 2)
    assert list(found["chunk"]) == [1, 2, 4, 8]
    assert found["chunk memory"][1] < found["chunk memory"][8]
    sizes, steps = zip(*found["condition"].items(), strict=True)
    assert scaling.exponent(sizes, steps) == pytest.approx(0.5, abs=0.1)
    shares = [row.value for row in scaling.rows_of(found) if row.metric == "memory_share"]
    assert shares[-1] == 1.0
    scaling.draw(found, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
