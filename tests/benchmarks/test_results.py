"""The committed results say what the issue and the docs say of them."""

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def value(name, metric, **setting):
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    found = [
        row["value"]
        for row in rows
        if row["metric"] == metric and all(row["setting"].get(k) == v for k, v in setting.items())
    ]
    assert len(found) == 1, (name, metric, setting, found)
    return found[0]


@pytest.mark.parametrize("problem", ["ijcnn1", "quadratic"])
def test_adaptive_accuracy_reaches_the_best_of_the_grid_at_no_more_products(problem):
    mine, best = (
        {
            metric: value("adaptive", metric, problem=problem, run=run)
            for metric in ("hessian_products", "final_outer_value")
        }
        for run in ("default", "best-of-grid")
    )
    gap = mine["final_outer_value"] - best["final_outer_value"]
    assert gap <= 1e-8 * abs(best["final_outer_value"])
    assert mine["hessian_products"] <= best["hessian_products"]


def test_the_estimate_is_within_its_factors():
    assert value("error-estimate", "problems", family="all") >= 2000
    assert value("error-estimate", "within_1.5", family="all") >= 0.95
    assert value("error-estimate", "within_3", family="all") >= 0.99
    for family in ("logistic", "softmax", "network"):
        found = value("error-estimate", "median_exponent", family=family, hypergradient="corrected")
        assert found >= 1.8


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_result_says_where_it_comes_from(path):
    result = json.loads(path.read_text())
    for key in ("name", "command", "commit", "date", "machine", "device", "seeds"):
        assert result[key] or key == "seeds"
    assert "dirty" not in result["commit"]
    assert result["rows"]
