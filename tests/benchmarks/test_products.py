"""The benchmark of Hessian products, at a size that takes seconds."""

import pytest
import torch

# Forward mode compiles its formulas so.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

CPU = torch.device("cpu")


@pytest.fixture
def benchmark(script, monkeypatch):
    module = script("products")
    sizes = {"CHANNELS": 2, "QUERIES": 1, "ROWS": 30, "FEATURES": 10, "STEPS": (1e-3, 1e-5)}
    for name, small in sizes.items():
        monkeypatch.setattr(module, name, small)
    return module


@pytest.mark.parametrize(("name", "count"), [("strided-exact", 2), ("logistic", 1)])
def test_variants_that_agree_are_timed_side_by_side(benchmark, name, count):
    found = benchmark.measure(name, count, 2, CPU)
    assert set(found.times) == {"gradient", "graph", *benchmark.variants_of(count)}
    assert ("kept-one-by-one" in found.times) == (count > 1)
    assert all(len(one.seconds) == 2 and min(one.seconds) > 0 for one in found.times.values())


def test_a_variant_that_is_known_to_be_wrong_is_told_and_not_timed(benchmark):
    found = benchmark.measure("pool", 1, 2, CPU)
    right = found.errors["grad-of-jvp", "float64"] <= benchmark.SAME
    # A PyTorch that has mended its native norms is timed like any other.
    assert ("grad-of-jvp" in found.times) == right
    others = set(benchmark.variants_of(1)) - {"grad-of-jvp"}
    assert others < set(found.times)
    assert any("wrong here" in line for line in benchmark.table(found)) == (not right)


def test_any_other_variant_that_computes_something_else_stops_the_benchmark(benchmark, monkeypatch):
    right = benchmark.rebuilt
    monkeypatch.setitem(benchmark.VARIANTS, "rebuilt", lambda s: lambda v: 1.001 * right(s)(v))
    with pytest.raises(SystemExit, match=r"rebuilt is 1\.0e-03 away from the library's product"):
        benchmark.measure("strided", 2, 2, CPU)
    with pytest.raises(SystemExit, match=r"rebuilt is 1\.0e-03 away from the dense Hessian's"):
        benchmark.measure("logistic", 2, 2, CPU)


@pytest.mark.parametrize("name", ["strided", "pool"])
def test_the_product_that_others_are_compared_with_is_that_of_the_dense_hessian(benchmark, name):
    setting = benchmark.Setting(name, 1, CPU, torch.float64)

    def objective(z):
        return setting.total(setting.flat.vector.unflatten(z))

    # Not `torch.func.hessian`: it stacks the products, and is wrong for native norms.
    dense = torch.autograd.functional.hessian(objective, setting.z[0])
    wanted = dense @ setting.v[0] + benchmark.STRENGTH * setting.v[0]
    assert torch.allclose(benchmark.kept(setting)(setting.v)[0], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("central", "order"), [(True, 2), (False, 1)])
def test_the_error_of_a_difference_is_of_the_order_of_its_step(benchmark, central, order):
    setting = benchmark.Setting("logistic", 2, CPU, torch.float64)
    exact = benchmark.kept(setting)(setting.v)
    coarse, fine = (
        (benchmark.difference(setting, central=central, step=step)(setting.v) - exact).norm()
        for step in (1e-2, 1e-3)
    )
    assert torch.log10(coarse / fine) == pytest.approx(order, abs=0.05)


def test_both_precisions_see_the_same_numbers(benchmark):
    wide, narrow = (
        benchmark.Setting("logistic", 2, CPU, dtype) for dtype in (torch.float64, torch.float32)
    )
    assert wide.z.equal(narrow.z.double())
    assert wide.v.equal(narrow.v.double())
    for mine, other in zip(wide.flat.tasks.tensors, narrow.flat.tasks.tensors, strict=True):
        assert mine.equal(other.double())


def test_what_is_kept_is_held_and_all_stands_in_file_and_picture(benchmark, tmp_path):
    found = benchmark.measure("strided", 2, 2, CPU)
    assert found.held["rebuilt"] == found.held["jvp-of-grad"] == 0
    assert 0 < found.held["kept-by-hand"] <= found.held["kept"]
    # Nothing kept is all built anew.
    assert found.peak["kept-by-hand"] < found.peak["rebuilt"]
    rows = benchmark.rows_of("strided", 2, found)
    (unit,) = [
        row.value
        for row in rows
        if row.metric == "over_gradient" and row.setting["variant"] == "gradient"
    ]
    assert unit == 1.0
    told = {row.setting["variant"] for row in rows if row.metric == "best_error"}
    assert told == set(benchmark.DIFFERENCES)
    benchmark.draw({("strided", 2): found}, tmp_path / "products.png")
    assert (tmp_path / "products.png").stat().st_size > 10_000
