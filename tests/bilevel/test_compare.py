import json
import math
import re
import warnings

import pytest
import torch

from bilevel import (
    DependenceError,
    HypergradientMethod,
    ObjectiveError,
    Proximal,
    Status,
    Task,
    compare,
    hypergradient,
    problem_from,
)
from bilevel.compare import default_methods
from bilevel.problems import Cournot, Equilibrium, Logistic, Poisson, Quadratic, Ridge
from bilevel.pytree import tree_leaves
from bilevel.registry import METHODS
from bilevel.solvers import (
    CG,
    LBFGS,
    DenseExact,
    FirstOrder,
    GradientDescent,
    Implicit,
    ImplicitCG,
    NeumannSeries,
    Unrolled,
)


def run(example, methods=None, steps=40, **settings):
    settings = {"repeats": 1, "memory": False, **settings}
    descent = GradientDescent(lr=2 / (example.lipschitz + example.mu), max_steps=steps)
    return compare(
        example.problem, example.outer, example.task, methods, inner_solver=descent, **settings
    )


def flat(tree):
    return torch.cat([leaf.double().flatten() for leaf in tree_leaves(tree)])


def by_name(comparison):
    return {one.name: one for one in comparison.results}


METHOD_LINE_UP = {
    "loose": ImplicitCG(rtol=0.5),
    "tight": ImplicitCG(rtol=1e-12, max_steps=500),
    "short": NeumannSeries(terms=3),
    "unrolled": Unrolled(),
}


@pytest.mark.parametrize("tasks", [None, 3])
@pytest.mark.parametrize("reference", ["dense", "estimate"])
@pytest.mark.parametrize("kind", [Quadratic, Ridge])
def test_errors_are_those_against_the_formula(kind, reference, tasks):
    example = kind.example(tasks=tasks)
    found = run(example, METHOD_LINE_UP, reference=reference, accuracy=1e-4)
    assert found.reference == reference
    assert found.reference_error <= 1e-6
    exact = flat(example.gradient)
    descent = GradientDescent(lr=2 / (example.lipschitz + example.mu), max_steps=40)
    for name, method in METHOD_LINE_UP.items():
        result = hypergradient(
            example.problem, example.outer, example.task, inner_solver=descent, method=method
        )
        gradient = flat(result.gradient)
        row = by_name(found)[name]
        error = ((gradient - exact).norm() / exact.norm()).item()
        assert row.error == pytest.approx(error, rel=1e-3, abs=1e-6)
        cosine = torch.nn.functional.cosine_similarity(gradient, exact, dim=0).item()
        assert row.cosine == pytest.approx(cosine, abs=1e-6)
        counts = result.diagnostics.counts
        assert row.counts["gradients"] == counts["gradients"]
        assert row.counts["products"] == counts.get("products", 0)
        assert row.cost == counts["gradients"] + counts.get("products", 0)
        assert row.status is Status.BUDGET or method is METHOD_LINE_UP["tight"]
        assert row.seconds > 0


def test_lists_of_tasks_of_different_shapes():
    first, second = Ridge.generated(6, 2, 20, 20), Ridge.generated(6, 2, 30, 20, seed=1)
    found = compare(
        first.problem,
        first.outer,
        [first.task, second.task],
        [ImplicitCG(rtol=1e-10)],
        inner_solver=first.inner_solver,
        repeats=1,
        memory=False,
    )
    exact = (
        first.problem.exact_hypergradient(first.outer, first.task)
        + first.problem.exact_hypergradient(first.outer, second.task)
    ) / 2
    assert found.tasks == 2
    assert found.recommendation.error <= 1e-8
    assert exact.isfinite().all()


def test_estimate_needs_no_tight_inner_solver():
    """No method has a converged inner solution, and the estimates are right all the same."""
    example = Poisson.example()
    rough = GradientDescent(lr=1 / example.lipschitz, max_steps=4)
    settings = {"inner_solver": rough, "repeats": 1, "memory": False}
    arguments = (example.problem, example.outer, example.task, METHOD_LINE_UP)
    estimated = compare(*arguments, **settings, reference="estimate")
    true = compare(*arguments, **settings, reference="dense")
    for name, row in by_name(true).items():
        assert row.error > 1e-2
        assert by_name(estimated)[name].error == pytest.approx(row.error, rel=1e-3)


# Recommendation


def test_recommendation_is_the_cheapest_that_is_accurate_enough():
    found = run(Quadratic.example(), METHOD_LINE_UP, steps=200, accuracy=1e-4)
    names = [one.name for one in found.results]
    assert [one.cost for one in found.results] == sorted(one.cost for one in found.results)
    assert found.ok
    assert found.recommendation.name == "tight"
    assert names.index("loose") < names.index("tight")
    assert "Use tight" in found.advice
    # The cheapest first, and each more accurate than the one before.
    assert found.front[0].name == names[0]
    errors = [one.error for one in found.front]
    assert errors == sorted(errors, reverse=True)


def test_budget_limits_the_recommendation():
    example = Quadratic.example()
    free = run(example, METHOD_LINE_UP, steps=200, accuracy=1e-4)
    limit = free.recommendation.cost - 1
    limited = run(example, METHOD_LINE_UP, steps=200, accuracy=1e-4, budget=limit)
    assert not limited.ok
    assert limited.recommendation.cost <= limit
    assert "No method has an error of at most 1e-04 within a cost of" in limited.advice
    assert "Beyond the limit, tight" in limited.advice
    nothing = run(example, METHOD_LINE_UP, budget=1)
    assert nothing.recommendation is None
    assert "No method is usable within a cost of 1" in nothing.advice
    hurried = run(example, METHOD_LINE_UP, max_seconds=1e-9)
    assert hurried.recommendation is None


@pytest.mark.parametrize(
    ("methods", "steps", "cure"),
    [
        ({"cg": ImplicitCG(rtol=1e-8)}, 10, "that of the inner solve .*correct=True"),
        ({"cg": ImplicitCG(rtol=0.3)}, 500, "that of the adjoint solve .*lower `rtol`"),
        ({"unrolled": Unrolled(truncate=2)}, 50, "more steps.*correct=True"),
    ],
)
def test_where_nothing_is_accurate_the_most_accurate_is_named_with_a_cure(methods, steps, cure):
    found = run(Logistic.generated(8, spread=4.0), methods, steps, accuracy=1e-9)
    assert not found.ok
    assert found.recommendation.name in methods
    assert f"The most accurate is {found.recommendation.name}" in found.advice
    assert re.search(cure, found.advice), found.advice


# Rows


def test_a_method_that_refuses_the_problem_is_a_row_that_says_so():
    found = run(
        Cournot.example(),
        {"cg": ImplicitCG(), "dense": DenseExact(), "lbfgs": (DenseExact(), LBFGS())},
    )
    rows = by_name(found)
    assert rows["cg"].status is None
    assert not rows["cg"].usable
    assert rows["cg"].note.startswith("StructureError: ")
    assert rows["lbfgs"].note.startswith("StructureError: LBFGS minimises")
    assert found.recommendation.name == "dense"
    text = str(found)
    assert "StructureError" in text
    assert "DenseExact(), or NeumannSeries" in " ".join(text.split())


@pytest.mark.parametrize("tasks", [None, 2])
def test_a_method_that_diverges_is_never_recommended(tasks):
    example = Quadratic.example(tasks=tasks)
    # Task 0 is better conditioned than task 1: it converges all the same.
    wild = GradientDescent(lr=0.3, max_steps=60)
    found = run(example, {"wild": (DenseExact(), wild), "calm": DenseExact()}, accuracy=10.0)
    row = by_name(found)["wild"]
    assert not row.usable
    if tasks is None:
        assert row.note.startswith("SolveError: ")
    else:
        assert row.status is Status.DIVERGED
    assert found.recommendation.name == "calm"
    if tasks is not None:
        alone = run(example, {"wild": (DenseExact(), wild)})
        assert alone.recommendation is None
        assert "DIVERGED: lower the learning rate" in alone.advice


def test_a_singular_inner_problem_gets_no_dense_reference():
    problem = problem_from(
        lambda z, x, batch: 0.5 * (z[0] - x.sum()) ** 2,
        lambda z, x, batch: z[0] ** 2,
        initial_inner=lambda x, batch: torch.zeros(2, dtype=x.dtype),
    )
    outer = torch.tensor([1.0, 2.0], dtype=torch.float64)
    descent = GradientDescent(lr=0.5, max_steps=60)
    found = compare(problem, outer, None, [ImplicitCG(rtol=1e-8)], inner_solver=descent, repeats=1)
    assert found.reference == "estimate"
    assert found.recommendation.error <= 1e-8


def test_where_every_method_fails_the_first_error_is_raised():
    with pytest.raises(DependenceError, match="hypergradient is zero"):
        run(Ridge.example(), {"first-order": FirstOrder()})


def test_warnings_are_notes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(Equilibrium.example(), {"first-order": FirstOrder()})
    row = found.results[0]
    assert row.usable
    assert "finds no dependence" in row.note
    assert "finds no dependence" in " ".join(str(found).split())


def test_pairs_bring_their_own_inner_solver():
    example = Ridge.example()
    found = run(
        example, [ImplicitCG(rtol=1e-12), (ImplicitCG(rtol=1e-12), example.inner_solver)], steps=5
    )
    plain, exact = sorted(found.results, key=lambda one: -one.error)
    assert plain.name == "ImplicitCG(rtol=1e-12)"
    assert exact.name.startswith("ImplicitCG(rtol=1e-12) on ClosedForm(")
    assert plain.error > 1e-3 > 1e-9 > exact.error


def test_unrolling_costs_a_product_for_each_step_differentiated():
    example = Ridge.example(tasks=2)
    methods = {"all": Unrolled(), "last": Unrolled(truncate=7), "stored": Unrolled(checkpoint=True)}
    rows = by_name(run(example, methods, steps=30))
    assert rows["all"].counts["products"] == 2 * 30
    assert rows["last"].counts["products"] == 2 * 7
    assert rows["stored"].counts["products"] == 2 * 30
    # It takes every step again.
    assert rows["stored"].counts["gradients"] > rows["all"].counts["gradients"] + 2 * 29


def test_memory_of_unrolling_grows_with_the_steps():
    example = Ridge.example()
    methods = {"unrolled": Unrolled(), "cg": ImplicitCG()}
    few, many = (by_name(run(example, methods, steps=s, memory=True)) for s in (20, 200))
    assert many["unrolled"].memory > 3 * few["unrolled"].memory
    assert many["cg"].memory < 2 * few["cg"].memory


# References


def test_large_problems_get_an_estimate():
    example = Ridge.example()
    found = run(example, [ImplicitCG()], max_n=5)
    assert found.reference == "estimate"
    with pytest.raises(ValueError, match="max_n"):
        run(example, [ImplicitCG()], max_n=5, reference="dense")


def test_a_problem_bound_to_float32_gets_an_estimate():
    held = torch.ones(3, 3)
    problem = problem_from(
        lambda z, x, batch: (held @ z - x).square().sum(),
        lambda z, x, batch: z.square().sum(),
        Proximal(1.0),
    )
    outer = torch.tensor([1.0, 2.0, 3.0])
    descent = GradientDescent(lr=0.05, max_steps=100)
    found = compare(problem, outer, None, [ImplicitCG()], inner_solver=descent, repeats=1)
    assert found.reference == "estimate"
    assert found.dtype == torch.float32
    assert found.recommendation.error <= 1e-3
    with pytest.raises(ObjectiveError, match="float64"):
        compare(problem, outer, None, [ImplicitCG()], inner_solver=descent, reference="dense")


def test_a_reference_that_may_be_off_is_told():
    example = Poisson.example(dtype=torch.float32)
    found = run(example, [Unrolled()], 200, accuracy=1e-6, reference="estimate")
    assert 1e-7 < found.reference_error < 1e-4
    assert "itself off by" in str(found)
    looser = run(example, [Unrolled()], 200, accuracy=1e-2, reference="estimate")
    assert looser.ok
    assert "off by" not in str(looser)


def test_estimates_need_no_implicit_method_in_the_line_up():
    found = run(Ridge.example(), [Unrolled()], steps=300, reference="estimate")
    assert found.reference == "estimate"
    assert found.results[0].error <= 1e-6


def test_without_any_reference_nothing_is_recommended(monkeypatch):
    monkeypatch.setattr(METHODS, "_classes", {})
    found = run(Ridge.example(), [Unrolled()], reference="estimate")
    assert found.reference == "none"
    assert found.recommendation is None
    assert found.results[0].error is None
    assert "No error is known" in found.advice
    assert "unknown" in str(found)
    with pytest.raises(ValueError, match="nothing to draw"):
        found.plot("nowhere.png")


# Defaults, settings, output


@pytest.mark.parametrize("example", [Logistic.example(), Cournot.example()], ids=["SPD", "GENERAL"])
def test_default_methods_fit_the_structure(example):
    methods = default_methods(example.problem)
    assert all(isinstance(method, HypergradientMethod) for method in methods.values())
    found = run(example, steps=100)
    assert {one.name for one in found.results} == set(methods)
    assert found.ok
    assert not any("StructureError" in one.note for one in found.results)


def test_default_methods_need_a_registry(monkeypatch):
    monkeypatch.setattr(METHODS, "_classes", {})
    with pytest.raises(ValueError, match=r"import bilevel\.solvers"):
        run(Ridge.example())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accuracy": 0.0}, "`accuracy` is 0.0"),
        ({"repeats": 0}, "`repeats` is 0"),
        ({"reference": "exact"}, "`reference` is 'exact'"),
        ({"methods": []}, "`methods` is empty"),
        ({"methods": [CG()]}, "`methods` holds CG"),
        ({"methods": [ImplicitCG(), ImplicitCG()]}, "twice"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        run(Ridge.example(), **{"methods": [ImplicitCG()], **settings})


def test_names_tell_settings_that_are_not_the_default():
    found = run(Ridge.example(), [Implicit(CG(rtol=1e-3)), DenseExact()])
    assert {one.name for one in found.results} == {
        "Implicit(linear_solver=CG(rtol=0.001))",
        "DenseExact()",
    }


def test_table_marks_and_aligns():
    found = run(Quadratic.example(), METHOD_LINE_UP, steps=200, accuracy=1e-4, memory=True)
    lines = str(found).splitlines()
    assert lines[0] == "Quadratic(regularizer=None): 1 task, n = 12, torch.float64"
    assert lines[1].startswith("errors are true, against dense float64 algebra")
    rows = lines[5:9]
    assert sum(line.startswith("→ tight") for line in rows) == 1
    assert sum(line.startswith("✓ unrolled") for line in rows) == 1
    ends = {
        line.index(str(one.cost)) + len(str(one.cost))
        for line, one in zip(rows, found.results, strict=True)
    }
    assert len(ends) == 1


def test_everything_goes_into_json():
    found = run(Cournot.example(), {"cg": ImplicitCG(), "dense": DenseExact()}, memory=True)
    read = json.loads(json.dumps(found.as_dict()))
    assert read["recommendation"] == "dense"
    assert read["ok"] is True
    dense, cg = read["results"]
    assert dense["cost"] == dense["counts"]["gradients"] + dense["counts"]["products"]
    assert dense["status"] == "BUDGET"
    assert dense["memory"] > 0
    assert cg["status"] is None


def test_picture_names_every_method_without_overlap(tmp_path):
    from matplotlib.text import Text

    from bilevel.pareto import draw

    found = run(Logistic.example(), steps=60, memory=True)
    figure = draw(found)
    known = {one.name for one in found.results if one.usable}
    assert len(figure.axes) == 2
    for axes in figure.axes:
        texts = [text for text in axes.texts if text.get_text() in known]
        assert {text.get_text() for text in texts} == known
        for text in texts:
            text.update_positions(figure.canvas.get_renderer())
        boxes = [Text.get_window_extent(text) for text in texts]
        frame = axes.get_window_extent()
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i])
            assert frame.x0 <= box.x0 < box.x1 <= frame.x1
    path = tmp_path / "methods.png"
    found.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    found.plot(tmp_path / "methods.svg")


def test_picture_without_memory_has_one_panel():
    from bilevel.pareto import draw

    assert len(draw(run(Ridge.example(), [DenseExact()])).axes) == 1


def test_zero_gradients_have_no_error():
    """The outer objective is stationary where the inner solution is."""
    problem = problem_from(
        lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        Proximal(1.0),
    )
    outer = torch.ones(3, dtype=torch.float64)
    descent = GradientDescent(lr=0.5, max_steps=100)
    found = compare(
        problem,
        outer,
        Task(outer.clone(), outer.clone()),
        [ImplicitCG()],
        inner_solver=descent,
        repeats=1,
    )
    assert found.results[0].error is not None
    assert math.isfinite(found.results[0].error)
