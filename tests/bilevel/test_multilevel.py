"""Problems of three levels and more: known answers, every method at every level, clear refusals."""

import itertools

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import (
    BilevelWarning,
    DependenceError,
    Level,
    MultiLevelProblem,
    Proximal,
    SolveError,
    Stream,
    StructureError,
    Task,
    TaskBatch,
    hypergradient,
    problem_from,
)
from bilevel.solvers import (
    LBFGS,
    DenseExact,
    FirstOrder,
    GradientDescent,
    HessianFree,
    ImplicitCG,
    NeumannSeries,
    Unrolled,
)
from tests.helpers import randn

F64 = torch.float64
EXACT = {"solver": LBFGS(tol=1e-11), "method": ImplicitCG(rtol=1e-11)}
# What is solved inside is noise outside: the level in the middle asks for less.
MIDDLE = {"solver": LBFGS(tol=1e-9), "method": ImplicitCG(rtol=1e-10)}
WAYS = {
    "cg": EXACT,
    "dense": {"solver": HessianFree(tol=1e-11), "method": DenseExact()},
    "neumann": {
        "solver": LBFGS(tol=1e-11),
        "method": NeumannSeries(terms=300, scale=0.3),
    },
    "unrolled": {"solver": GradientDescent(lr=0.4, max_steps=45), "method": Unrolled()},
}
TARGET = torch.tensor([0.4, -0.3], dtype=F64)
X = torch.tensor([0.5, 1.1], dtype=F64)


def three(middle=MIDDLE, bottom=EXACT, **options):
    """w = z e^{-x} at the bottom, z = x / (1 + e^{-2x}) in the middle."""
    return MultiLevelProblem.of(
        [
            Level("x", lambda x, v, t: 0.5 * ((v["w"] - t) ** 2 + v["z"] ** 2).sum(), TARGET),
            Level(
                "z",
                lambda z, v, _: 0.5 * ((z - v["x"]) ** 2 + v["w"] ** 2).sum(),
                start=lambda v, _: torch.zeros_like(v["x"]),
                **middle,
            ),
            Level(
                "w",
                lambda w, v, _: (0.5 * v["x"].exp() * w**2 - v["z"] * w).sum(),
                start=lambda v, _: torch.zeros_like(v["z"]),
                **bottom,
            ),
        ],
        [("x", "z"), ("x", "w"), ("z", "w")],
        **options,
    )


def three_by_formula(x):
    z = x / (1 + (-2 * x).exp())
    return 0.5 * ((z * (-x).exp() - TARGET) ** 2 + z**2).sum()


def derivative(function, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


@pytest.mark.parametrize("bottom", WAYS)
@pytest.mark.parametrize("middle", WAYS)
def test_three_levels_have_the_derivative_of_the_formula_by_all_methods(middle, bottom):
    found = three(WAYS[middle], WAYS[bottom]).hypergradient(X)
    torch.testing.assert_close(found.value, three_by_formula(X), rtol=1e-8, atol=0)
    want = derivative(three_by_formula, X)
    torch.testing.assert_close(found.gradient, want, rtol=1e-6, atol=1e-8)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(-0.5, 1.5), min_size=2, max_size=2))
def test_the_derivative_holds_wherever_the_top_stands(values):
    x = torch.tensor(values, dtype=F64)
    found = three().hypergradient(x).gradient
    torch.testing.assert_close(found, derivative(three_by_formula, x), rtol=1e-6, atol=1e-8)


def test_two_levels_are_a_bilevel_problem():
    def inner(z, x):
        return (torch.cosh(z) + 0.5 * (z - x) ** 2).sum()

    problem = MultiLevelProblem.of(
        [
            Level("x", lambda x, v, _: (v["z"] ** 2).sum() + (x * v["z"]).sum()),
            Level("z", lambda z, v, _: inner(z, v["x"]), start=lambda v, _: 0 * v["x"], **EXACT),
        ],
        [("x", "z")],
    )
    plain = problem_from(
        lambda z, x, _: inner(z, x),
        lambda z, x, _: (z**2).sum() + (x * z).sum(),
        initial_inner=lambda x, _: 0 * x,
    )
    want = hypergradient(plain, X, inner_solver=EXACT["solver"], method=EXACT["method"])
    torch.testing.assert_close(problem.hypergradient(X).gradient, want.gradient, rtol=1e-9, atol=0)


def chain(depth):
    """Each level follows the one above it, and shies from what the one below makes of it."""

    def objective(above, below):
        def inner(z, v, _):
            pull = (torch.cosh(z - v[above])).sum()
            return pull if below is None else pull + 0.2 * (v[below] ** 2 * z.sigmoid()).sum()

        return inner

    names = [f"level{i}" for i in range(depth)]
    levels = [Level("level0", lambda x, v, _: (v["level1"] ** 3).sum() + (x**2).sum())]
    for i in range(1, depth):
        below = names[i + 1] if i + 1 < depth else None
        levels.append(
            Level(
                names[i],
                objective(names[i - 1], below),
                start=lambda v, _, above=names[i - 1]: 0 * v[above],
                solver=HessianFree(tol=1e-12 if below is None else 1e-10),
                method=ImplicitCG(rtol=1e-10),
            )
        )
    return MultiLevelProblem.of(levels, list(itertools.pairwise(names)))


def test_four_levels_agree_with_finite_differences():
    problem, x = chain(4), randn(2)
    found = problem.hypergradient(x).gradient
    step = 1e-4
    for i, e in enumerate(torch.eye(2, dtype=F64)):
        with torch.no_grad():
            ahead, behind = problem.value(x + step * e), problem.value(x - step * e)
        assert abs((ahead - behind) / (2 * step) - found[i]) <= 1e-6 * found.norm()
    assert set(problem.hypergradient(x).solutions) == {"level1", "level2", "level3"}


def test_the_value_stands_in_the_graph_and_can_be_differentiated_twice():
    problem, x = three(), X.clone().requires_grad_()
    (first,) = torch.autograd.grad(problem.value(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    y = X.clone().requires_grad_()
    (want,) = torch.autograd.grad(three_by_formula(y), y, create_graph=True)
    (want,) = torch.autograd.grad(want.sum(), y)
    torch.testing.assert_close(second, want, rtol=1e-5, atol=1e-7)


def test_a_value_alone_needs_no_graph():
    with torch.no_grad():
        value = three().value(X)
    assert not value.requires_grad
    torch.testing.assert_close(value, three_by_formula(X), rtol=1e-8, atol=0)


@pytest.mark.parametrize("warm", [True, False])
def test_a_backward_pass_solves_as_its_own_forward_pass_did(warm):
    # Few steps at one outer step, many at the other: the adjoint of z solves w again.
    bottom = {
        "schedule": lambda step: GradientDescent(lr=0.4, max_steps=2 + 60 * step),
        "method": Unrolled(),
    }

    def fresh():
        return three(MIDDLE, bottom, warm_start=warm)

    x = X.clone().requires_grad_()
    problem = fresh()
    first = problem.value(x, step=0)
    problem.value(x + 0.3, step=1)
    (late,) = torch.autograd.grad(first, x)
    (want,) = torch.autograd.grad(fresh().value(x, step=0), x)
    torch.testing.assert_close(late, want, rtol=1e-8, atol=0)


def test_a_warm_start_of_a_later_call_does_not_reach_an_earlier_backward_pass():
    def problem():
        return MultiLevelProblem.of(
            [
                Level("x", lambda x, v, _: v["z"] ** 2 + v["w"]),
                Level(
                    "z",
                    lambda z, v, _: 0.5 * (z - v["x"]) ** 2 + 0.1 * v["w"] * z,
                    start=lambda v, _: v["x"].detach().clone(),
                    **MIDDLE,
                ),
                # Two wells, of which the start decides.
                Level(
                    "w",
                    lambda w, v, _: (w**2 - 1) ** 2 - 0.1 * w * v["z"],
                    start=lambda v, _: v["z"].sign().detach(),
                    **EXACT,
                ),
            ],
            [("x", "z"), ("z", "w")],
        )

    one = problem()
    x = torch.tensor(0.8, dtype=F64, requires_grad=True)
    value = one.value(x)
    one.value(-x)
    torch.testing.assert_close(
        torch.autograd.grad(value, x)[0], problem().hypergradient(x).gradient, rtol=1e-7, atol=0
    )


def test_calls_of_other_shapes_do_not_meet():
    problem = three()
    problem.hypergradient(X)
    pair = X.repeat(2, 1)  # broadcast against the target
    found = problem.hypergradient(pair)
    torch.testing.assert_close(
        found.gradient, derivative(three_by_formula, pair), rtol=1e-6, atol=1e-8
    )


def test_a_failed_call_leaves_nothing_behind():
    problem = three()
    before = problem.hypergradient(X)
    with pytest.raises((SolveError, DependenceError)):
        problem.hypergradient(torch.full_like(X, float("nan")))
    torch.testing.assert_close(
        problem.hypergradient(X).gradient, before.gradient, rtol=1e-8, atol=0
    )


def test_no_grad_around_it_does_not_matter():
    with torch.no_grad():
        found = three().hypergradient(X)
    torch.testing.assert_close(
        found.gradient, derivative(three_by_formula, X), rtol=1e-6, atol=1e-8
    )


def test_transforms_need_no_plain_call_before():
    found = torch.func.grad(three().value)(X)
    torch.testing.assert_close(found, derivative(three_by_formula, X), rtol=1e-6, atol=1e-8)


def test_a_leaf_that_nothing_depends_on_is_told():
    problem = MultiLevelProblem.of(
        [
            Level("x", lambda x, v, _: v["z"] ** 2),
            Level(
                "z",
                lambda z, v, _: (z - v["x"]["a"]) ** 2,
                start=lambda v, _: 0 * v["x"]["a"],
                **EXACT,
            ),
        ],
        [("x", "z")],
    )
    one = torch.ones((), dtype=F64)
    with pytest.warns(BilevelWarning, match=r"nothing depends on `outer\['b'\]`"):
        found = problem.hypergradient({"a": one, "b": one})
    assert found.gradient["a"] == 2
    assert found.gradient["b"] == 0


def test_unrolled_steps_may_depend_on_what_is_above_through_their_start():
    problem = MultiLevelProblem.of(
        [
            Level("x", lambda x, v, _: (v["z"] ** 2).sum()),
            Level(
                "z",
                lambda z, v, _: 0.5 * ((z - 1.0) ** 2).sum(),
                start=lambda v, _: v["x"] * 1.0,
                solver=GradientDescent(lr=0.5, max_steps=2, tol=None),
                method=Unrolled(),
            ),
        ],
        [("x", "z")],
    )
    found = problem.hypergradient(X).gradient
    torch.testing.assert_close(found, 2 * 0.25 * (1 + 0.25 * (X - 1)))


def test_a_stream_is_the_data_of_a_level():
    def problem(batch):
        return MultiLevelProblem.of(
            [
                Level("x", lambda x, v, _: (v["z"] ** 2).sum()),
                Level(
                    "z",
                    lambda z, v, a: 0.5 * ((z - v["x"] - a) ** 2).sum(),
                    batch,
                    start=lambda v, _: 0 * v["x"],
                    solver=GradientDescent(lr=1.0, max_steps=3),
                    method=ImplicitCG(),
                ),
            ],
            [("x", "z")],
        )

    data = torch.ones(2, dtype=F64)
    found = problem(Stream(lambda step: data)).hypergradient(X).gradient
    torch.testing.assert_close(found, problem(data).hypergradient(X).gradient)


def test_an_optimizer_of_pytorch_finds_the_minimum():
    problem, x = three(), X.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([x], line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def closure():
        found = problem.hypergradient(x)
        found.set_grad(x)
        return found.value

    optimizer.step(closure)
    assert derivative(three_by_formula, x.detach()).norm() < 1e-5


def test_gradients_for_another_variable_are_refused():
    found = three().hypergradient(X)
    with pytest.raises(ValueError, match="`outer` differs in structure"):
        found.set_grad({"x": X})


# What a level may be


def test_a_regularizer_and_pytrees_at_every_level():
    problem = MultiLevelProblem.of(
        [
            Level("x", lambda x, v, _: (v["z"]["a"] ** 2).sum() + (v["z"]["b"] ** 2).sum()),
            Level(
                "z",
                lambda z, v, _: (z["a"] ** 2).sum() / 2 + (z["b"] - v["w"]).square().sum() / 2,
                regularizer=Proximal(1.0, center=lambda v: v["x"]),
                **EXACT,
            ),
            Level(
                "w",
                lambda w, v, _: 0.5 * (w - v["z"]["a"].sum()) ** 2,
                start=lambda v, _: 0 * v["z"]["a"].sum(),
                **EXACT,
            ),
        ],
        [("x", "z"), ("z", "w")],
    )
    x = {"a": randn(2), "b": randn(1, seed=1)}
    found = problem.hypergradient(x).gradient

    def by_formula(leaves):
        # Stationarity: a_i + (a_i − x_i) + (s − b) = 0 and (b − s) + (b − x_b) = 0, s = Σ a.
        one = torch.ones(2, 1, dtype=F64)
        upper = torch.cat([2 * torch.eye(2, dtype=F64) + one @ one.T, -one], 1)
        lower = torch.cat([-one.T, torch.full((1, 1), 2.0, dtype=F64)], 1)
        return torch.linalg.solve(torch.cat([upper, lower]), leaves).square().sum()

    want = derivative(by_formula, torch.cat([x["a"], x["b"]]))
    torch.testing.assert_close(torch.cat([found["a"], found["b"]]), want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("stacked", [True, False])
def test_a_level_of_many_tasks_is_seen_as_a_whole(stacked):
    data = randn(4, 2, seed=3)
    tasks = [Task(one) for one in data]
    problem = MultiLevelProblem.of(
        [
            Level("x", lambda x, v, _: v["mean"].square().sum() + 0.1 * x.square().sum()),
            Level(
                "mean",
                lambda z, v, _: (
                    sum(0.5 * (z - w).square().sum() for w in v["each"])
                    + 0.5 * (z - v["x"]).square().sum()
                ),
                start=lambda v, _: 0 * v["x"],
                **EXACT,
            ),
            Level(
                "each",
                lambda w, v, a: 0.5 * (w - a).square().sum() + 0.5 * (w - v["mean"]).square().sum(),
                batch=TaskBatch(data) if stacked else tasks,
                start=lambda v, _: 0 * v["mean"],
                **EXACT,
            ),
        ],
        [("x", "mean"), ("mean", "each")],
    )

    def by_formula(x):
        # w = (a + z)/2, so that z − w = (z − a)/2: z + Σ (z − a)/4 = x.
        z = (x + data.sum(0) / 4) / 2
        return z.square().sum() + 0.1 * x.square().sum()

    torch.testing.assert_close(
        problem.hypergradient(X).gradient, derivative(by_formula, X), rtol=1e-8, atol=0
    )


def siblings(shared):
    def inner(z, v, a):
        return (torch.cosh(z - a) + 0.5 * (z - v["x"]) ** 2).sum()

    def again(z, v, a):
        return inner(z, v, a)

    def start(v, a):
        return torch.zeros_like(v["x"])

    top = Level("x", lambda x, v, _: (v["left"] * v["right"]).sum() + x.square().sum())
    left = Level("left", inner, randn(2, seed=4), start, **EXACT)
    right = Level("right", inner if shared else again, randn(2, seed=5), start, **EXACT)
    return MultiLevelProblem.of([top, left, right], [("x", "left"), ("x", "right")])


def test_levels_of_one_generation_are_solved_together_and_to_the_same():
    together, apart = siblings(shared=True), siblings(shared=False)
    assert together.generations == [["x"], ["left", "right"]]
    one, two = together.hypergradient(X), apart.hypergradient(X)
    torch.testing.assert_close(one.gradient, two.gradient, rtol=1e-9, atol=0)
    for name in ("left", "right"):
        torch.testing.assert_close(one.solutions[name], two.solutions[name], rtol=1e-9, atol=0)
    # One call of the shared objective serves both tasks.
    assert "right" not in one.evaluations or "left" not in one.evaluations
    assert sum(one.evaluations.values()) < sum(two.evaluations.values())


def test_warm_starts_save_evaluations_and_change_no_answer():
    warm, cold = three(), three(warm_start=False)
    first = warm.hypergradient(X)
    torch.testing.assert_close(first.gradient, cold.hypergradient(X).gradient, rtol=1e-8, atol=0)
    again, cold_again = warm.hypergradient(X + 1e-3), cold.hypergradient(X + 1e-3)
    torch.testing.assert_close(again.gradient, cold_again.gradient, rtol=1e-8, atol=0)
    assert again.evaluations["w"] < cold_again.evaluations["w"]


def test_a_schedule_chooses_the_solver_of_each_outer_step():
    asked = []

    def schedule(step):
        asked.append(step)
        return LBFGS(tol=1e-4 if step == 0 else 1e-11)

    middle = {"schedule": schedule, "method": ImplicitCG(rtol=1e-11)}
    problem = three(middle)
    rough, fine = problem.hypergradient(X), problem.hypergradient(X, step=7)
    assert set(asked) == {0, 7}
    want = derivative(three_by_formula, X)
    assert (fine.gradient - want).norm() < 1e-8 < (rough.gradient - want).norm()


# Pictures


def test_it_is_shown_as_text_and_as_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    text = three(WAYS["cg"], WAYS["unrolled"]).draw(tmp_path / "levels.png")
    assert text.splitlines()[0].split() == [
        *("generation", "level", "given", "solved", "by", "differentiated", "by")
    ]
    assert "2           w      x, z   GradientDescent(lr=0.4, max_steps=45)" in text
    assert "x → z → w" in text
    assert "x → w" in text
    assert (tmp_path / "levels.png").stat().st_size > 5000
    assert repr(three()) == "MultiLevelProblem(x | z | w)"
    assert three().routes("w") == [["x", "z", "w"], ["x", "w"]]


# What is refused, and where


def level(name, *reads, **more):
    """A level that reads others."""
    below = (
        {"start": lambda v, _: torch.zeros((), dtype=F64), **EXACT} if more.get("solved") else {}
    )

    def objective(inner, v, _):
        return inner**2 + sum(v[one] * inner for one in reads)

    return Level(name, objective, **below)


def solved(name, *reads):
    return level(name, *reads, solved=True)


def test_a_cycle_is_named():
    with pytest.raises(StructureError, match="a → b → c → a"):
        MultiLevelProblem.of(
            [level("x"), solved("a"), solved("b"), solved("c")],
            [("x", "a"), ("a", "b"), ("b", "c"), ("c", "a")],
        )


def test_an_edge_to_no_level_is_named_with_those_that_exist():
    with pytest.raises(ValueError, match=r"names 'zz', but there is no such level.*'x', 'z'"):
        MultiLevelProblem.of([level("x"), solved("z")], [("x", "zz")])


def test_two_levels_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two levels are named 'z'"):
        MultiLevelProblem.of([level("x"), solved("z"), solved("z")], [("x", "z")])


def test_a_level_that_nothing_leads_to_is_named():
    with pytest.raises(StructureError, match="no edge leads to 'x' or 'z'"):
        MultiLevelProblem.of([level("x", "z"), solved("z")], [])
    with pytest.raises(StructureError, match=r"level 'z' has `solver` and .*no edge leads to it"):
        MultiLevelProblem.of([solved("z", "x"), solved("x")], [("z", "x")])


def test_a_level_that_cannot_be_solved_says_what_it_lacks():
    with pytest.raises(ValueError, match=r"level 'z' lies below.*no `solver`.*`method`.*`start`"):
        MultiLevelProblem.of([level("x", "z"), level("z", "x")], [("x", "z")])


def test_reading_without_an_edge_names_the_missing_one():
    problem = MultiLevelProblem.of(
        [level("x", "z"), solved("z", "x", "w"), solved("w", "x", "z")],
        [("x", "z"), ("z", "w")],
    )
    with pytest.raises(DependenceError, match=r"level 'w' reads 'x', but there is no edge x → w"):
        problem.hypergradient(torch.ones((), dtype=F64))


def test_reading_an_unknown_name_lists_the_levels():
    problem = MultiLevelProblem.of([level("x", "zed"), solved("z", "x")], [("x", "z")])
    with pytest.raises(DependenceError, match=r"level 'x' reads 'zed'.*the levels are 'x', 'z'"):
        problem.hypergradient(torch.ones((), dtype=F64))


def test_an_edge_that_nothing_depends_on_is_named():
    problem = MultiLevelProblem.of([level("x", "z"), solved("z")], [("x", "z")])
    with pytest.raises(DependenceError, match=r"level 'z' does not depend on 'x'.*x → z"):
        problem.hypergradient(torch.ones((), dtype=F64))


def test_a_solution_that_nobody_reads_is_named():
    problem = MultiLevelProblem.of(
        [level("x", "z"), solved("z", "x"), solved("w", "x")], [("x", "z"), ("x", "w")]
    )
    with pytest.raises(DependenceError, match="no objective depends on the solution of level 'w'"):
        problem.hypergradient(torch.ones((), dtype=F64))


def test_a_level_below_two_that_do_not_know_each_other_is_refused_where_one_reads_it():
    problem = MultiLevelProblem.of(
        [level("x", "a", "b"), solved("a", "x", "w"), solved("b", "x"), solved("w", "a", "b")],
        [("x", "a"), ("x", "b"), ("a", "w"), ("b", "w")],
    )
    with pytest.raises(StructureError, match=r"level 'a' reads 'w', which needs 'b'.*b → a"):
        problem.hypergradient(torch.ones((), dtype=F64))


def test_a_detached_solution_is_no_dependence():
    def objective(x, v, _):
        return v["z"].detach() * x

    problem = MultiLevelProblem.of([Level("x", objective), solved("z", "x")], [("x", "z")])
    with pytest.raises(DependenceError, match="no objective depends on the solution of level 'z'"):
        problem.hypergradient(torch.ones((), dtype=F64))


def test_dependence_is_looked_at_before_anything_is_solved():
    # Without it, z has no minimum, and a solve would say so instead.
    problem = MultiLevelProblem.of(
        [
            level("x", "z"),
            Level(
                "z",
                lambda z, v, _: v["w"] - z * v["x"],
                start=lambda v, _: 0 * v["x"],
                **EXACT,
            ),
            Level(
                "w",
                lambda w, v, _: (w - v["z"].detach()) ** 2,
                start=lambda v, _: 0 * v["z"],
                **EXACT,
            ),
        ],
        [("x", "z"), ("z", "w")],
    )
    with pytest.raises(DependenceError, match="level 'w' does not depend on 'z'"):
        problem.hypergradient(torch.ones((), dtype=F64))


def test_a_start_and_a_regularizer_read_what_is_above_alone():
    def problem(**more):
        return MultiLevelProblem.of(
            [
                Level("x", lambda x, v, _: v["z"] ** 2),
                Level("z", lambda z, v, _: (z - v["x"]) ** 2, **{**EXACT, **more}),
            ],
            [("x", "z")],
        )

    one = torch.ones((), dtype=F64)
    for more in (
        {"start": lambda v, _: v["q"]},
        {"start": lambda v, _: v["z"]},
        {"regularizer": Proximal(1.0, center=lambda v: v["q"])},
    ):
        with pytest.raises(DependenceError, match=r"of level 'z' reads '[qz]'; they see .*'x'"):
            problem(**more).hypergradient(one)


def test_what_only_a_level_below_another_has_is_refused_at_the_top():
    for more in ({"regularizer": Proximal(1.0)}, {"start": lambda v, _: 0}, {"batch": [Task(1)]}):
        with pytest.raises(StructureError, match="level 'x' has"):
            MultiLevelProblem.of(
                [Level("x", lambda x, v, _: v["z"], **more), solved("z", "x")], [("x", "z")]
            )


def test_a_level_below_many_tasks_is_refused():
    many = Level(
        "z", lambda z, v, _: v["w"], batch=[Task(1), Task(2)], start=lambda v, _: 0, **EXACT
    )
    with pytest.raises(StructureError, match="level 'z' has many tasks, and an edge"):
        MultiLevelProblem.of([level("x", "z"), many, solved("w", "z")], [("x", "z"), ("z", "w")])


def test_a_failing_adjoint_names_its_level():
    middle = {"solver": LBFGS(tol=1e-9), "method": NeumannSeries(terms=5, scale=50.0)}
    with pytest.raises(SolveError, match="level 'z': the adjoint solve failed"):
        three(middle).hypergradient(X)


def test_regularizers_with_tensors_of_their_own_are_told_apart():
    def below(name, strength):
        return Level(
            name,
            lambda z, v, _: ((z - v["x"]) ** 2).sum(),
            regularizer=Proximal(strength, center=lambda v: 0 * v["x"]),
            **EXACT,
        )

    problem = MultiLevelProblem.of(
        [
            Level("x", lambda x, v, _: (v["a"] + v["b"]).sum()),
            below("a", torch.tensor([1.0, 2.0], dtype=F64)),
            below("b", torch.tensor([3.0, 4.0], dtype=F64)),
        ],
        [("x", "a"), ("x", "b")],
    )
    want = sum(2 / (2 + torch.tensor(s, dtype=F64)) for s in ([1.0, 2.0], [3.0, 4.0]))
    torch.testing.assert_close(problem.hypergradient(X).gradient, want)


def test_a_failing_level_is_named_with_those_that_it_was_solved_in():
    problem = three(bottom={"solver": GradientDescent(lr=50.0), "method": ImplicitCG()})
    with pytest.raises(SolveError, match="level 'z': level 'w': the inner solve failed"):
        problem.hypergradient(X)


def test_a_method_without_derivative_is_refused():
    with (
        pytest.raises(TypeError, match="FirstOrder")
        if False
        else pytest.raises(Exception, match="FirstOrder")
    ):
        three({"solver": LBFGS(), "method": FirstOrder()}).hypergradient(X)


def test_what_is_no_graph_of_levels_is_refused():
    graph = nx.DiGraph()
    graph.add_node("x", level=level("x"))
    graph.add_edge("x", "z")
    with pytest.raises(ValueError, match="node 'z' holds no level"):
        MultiLevelProblem(graph)
    with pytest.raises(ValueError, match=r"pass a networkx\.DiGraph"):
        MultiLevelProblem([level("x")])
    with pytest.raises(ValueError, match="`graph` has 0 nodes"):
        MultiLevelProblem(nx.DiGraph())
    graph.nodes["z"]["level"] = solved("other")
    with pytest.raises(ValueError, match="node 'z' holds the level 'other'"):
        MultiLevelProblem(graph)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ""}, "`name` of a level"),
        ({"objective": 3}, "`objective` of level 'z' is a int"),
        ({"solver": LBFGS}, "`solver` of level 'z' is LBFGS"),
        ({"method": "cg"}, "`method` of level 'z' is 'cg'"),
        ({"regularizer": 1.0}, "`regularizer` of level 'z'"),
        ({"start": torch.zeros(2)}, "`start` of level 'z' is a Tensor"),
        ({"schedule": LBFGS()}, "`schedule` of level 'z' is a LBFGS"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Level(**{"name": "z", "objective": lambda z, v, _: z, **arguments})


def test_the_outer_variable_is_checked():
    with pytest.raises(ValueError, match="`outer` holds no tensor"):
        three().hypergradient({})
    with pytest.raises(ValueError, match="outer"):
        three().hypergradient(torch.ones(2, dtype=torch.int64))
