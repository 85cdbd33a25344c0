"""`minimize_bounded`: known minima, active bounds, pytrees, failures."""

import math

import pytest
import torch

from bilevel import (
    OuterStatus,
    Proximal,
    SolveError,
    Task,
    minimize_bounded,
    problem_from,
)
from bilevel.solvers import LBFGS, GradientDescent, HessianFree, ImplicitCG
from tests.helpers import randn

F64 = torch.float64
SOLVER = LBFGS(max_steps=500, tol=1e-11)
METHOD = ImplicitCG(max_steps=500, rtol=1e-11)


def chain(matrix, target):
    """z* = x by a quadratic, and f = ½ zᵀAz − bᵀz: a quadratic program in x."""
    return problem_from(
        lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        lambda z, x, batch: 0.5 * z @ matrix @ z - target @ z,
        initial_inner=lambda x, batch: torch.zeros_like(x),
    )


def run(problem, outer, task=None, **settings):
    settings = {"inner_solver": SOLVER, "method": METHOD, "bounds": (None, None)} | settings
    return minimize_bounded(problem, outer, task, **settings)


def random_program(n, seed):
    A = randn(n, n, seed=seed).to(F64)
    return A @ A.mT / n + 0.1 * torch.eye(n, dtype=F64), randn(n, seed=seed + 1).to(F64)


def by_projection(matrix, target, low, high):
    """The minimum of a bounded quadratic program by many projected gradient steps."""
    x = torch.zeros_like(target)
    rate = 1.0 / torch.linalg.matrix_norm(matrix, 2)
    for _ in range(20_000):
        x = (x - rate * (matrix @ x - target)).clamp(low, high)
    return x


@pytest.mark.parametrize("seed", range(4))
def test_a_quadratic_program_with_active_bounds(seed):
    matrix, target = random_program(8, seed)
    expected = by_projection(matrix, target, -0.3, 0.5)
    assert ((expected == -0.3) | (expected == 0.5)).any()
    outer = torch.zeros(8, dtype=F64)
    found = run(chain(matrix, target), outer, bounds=(-0.3, 0.5), tol=1e-7)
    assert found.status is OuterStatus.CONVERGED
    torch.testing.assert_close(found.outer, expected, rtol=0, atol=1e-6)
    assert found.outer.min() >= -0.3
    assert found.outer.max() <= 0.5
    assert not outer.any()
    value = 0.5 * expected @ matrix @ expected - target @ expected
    assert found.value == pytest.approx(value.item(), abs=1e-12)
    assert found.result.ok


def test_without_active_bounds_it_is_the_free_minimum():
    matrix, target = random_program(6, 9)
    for bounds in ((None, None), (-1e6, None), (None, 1e6), (-math.inf, math.inf)):
        found = run(chain(matrix, target), torch.ones(6, dtype=F64), bounds=bounds, tol=1e-7)
        assert found.status is OuterStatus.CONVERGED
        exact = torch.linalg.solve(matrix, target)
        torch.testing.assert_close(found.outer, exact, rtol=1e-6, atol=1e-6)


def test_pytrees_of_variables_and_bounds():
    problem = problem_from(
        lambda z, x, batch: 0.5 * ((z - x["a"]) ** 2).sum(),
        lambda z, x, batch: ((z - 2.0) ** 2).sum() + ((x["b"][0] + 3.0) ** 2).sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x["a"]),
    )
    outer = {"a": torch.zeros(2, 2, dtype=F64), "b": [torch.zeros((), dtype=torch.float32)]}
    high = torch.tensor([[1.0, 9.0], [9.0, 1.5]])
    found = run(problem, outer, bounds=({"a": None, "b": [-1.0]}, {"a": high, "b": None}))
    assert found.status is OuterStatus.CONVERGED
    expected = torch.tensor([[1.0, 2.0], [2.0, 1.5]], dtype=F64)
    torch.testing.assert_close(found.outer["a"], expected, rtol=1e-5, atol=1e-5)
    assert found.outer["b"][0].item() == -1.0
    assert found.outer["b"][0].dtype == torch.float32


def test_the_start_is_clipped_and_a_fixed_variable_stays():
    matrix, target = random_program(3, 3)
    low = torch.tensor([0.25, -1.0, -1.0])
    high = torch.tensor([0.25, 1.0, 1.0])
    found = run(chain(matrix, target), torch.full((3,), 7.0, dtype=F64), bounds=(low, high))
    assert found.status is OuterStatus.CONVERGED
    assert found.outer[0] == 0.25
    assert found.steps[0].step == 0


def test_a_start_at_the_bounded_minimum_takes_no_step():
    found = run(
        chain(torch.eye(2, dtype=F64), torch.tensor([3.0, -3.0]).to(F64)),
        torch.tensor([1.0, -1.0]).to(F64),
        bounds=(-1.0, 1.0),
    )
    assert found.status is OuterStatus.CONVERGED
    assert len(found.steps) == 1
    assert found.steps[0].gradient_norm == 0.0


def test_weighted_tasks():
    problem = problem_from(
        lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        lambda z, x, batch: ((z - batch) ** 2).sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x),
    )
    tasks = [
        Task(torch.zeros((), dtype=F64), torch.full((2,), float(i), dtype=F64), weight=w)
        for i, w in ((0, 1.0), (3, 2.0))
    ]
    for task in (tasks, Task.stack(tasks)):
        found = run(problem, torch.zeros(2, dtype=F64), task, tol=1e-8)
        torch.testing.assert_close(found.outer, torch.full((2,), 2.0, dtype=F64))
        assert found.value == pytest.approx((1 * 8 + 2 * 2) / 3)


def test_records_and_callback():
    matrix, target = random_program(8, 1)
    seen = []
    found = run(chain(matrix, target), torch.zeros(8, dtype=F64), callback=seen.append, tol=1e-8)
    assert seen == found.steps
    assert [one.step for one in seen] == list(range(len(seen)))
    values = [one.value for one in seen]
    assert values == sorted(values, reverse=True)
    assert seen[0].length == 0.0
    assert all(one.length > 0 and one.attempts >= 1 for one in seen[1:])
    assert seen[-1].counts["gradients"] <= found.counts["gradients"]
    assert seen[0].inner_tolerance == 1e-11


def test_the_budget_of_steps():
    matrix, target = random_program(8, 1)
    found = run(chain(matrix, target), torch.zeros(8, dtype=F64), max_steps=2, tol=1e-12)
    assert found.status is OuterStatus.MAX_STEPS
    assert len(found.steps) == 3


def test_scale_replaces_the_first_slope():
    matrix, target = random_program(8, 1)
    outer = torch.linalg.solve(matrix, target) + 1e-7
    found = run(chain(matrix, target), outer, tol=1e-3, scale=1.0)
    assert (found.status, len(found.steps)) == (OuterStatus.CONVERGED, 1)


def test_warm_starts_save_inner_steps():
    matrix, target = random_program(8, 5)
    first = run(chain(matrix, target), torch.zeros(8, dtype=F64))
    again = run(chain(matrix, target), first.outer, state=first.result.state)
    assert again.counts["gradients"] < first.counts["gradients"]


def walled(limit=1.0):
    """An inner problem that has no solution beyond a wall: f is NaN there."""
    return problem_from(
        lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        lambda z, x, batch: ((z - 3.0) ** 2 + 0.0 * (limit - x).sqrt()).sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x),
    )


def test_a_value_that_is_not_finite_ends_the_run_at_the_best_point():
    found = run(walled(), torch.zeros(1, dtype=F64))
    assert found.status is OuterStatus.FAILED
    assert 0.0 <= found.outer.item() < 1.0
    assert math.isfinite(found.value)
    assert torch.isfinite(found.result.gradient).all()
    # Bounds keep away from the wall.
    inside = run(walled(), torch.zeros(1, dtype=F64), bounds=(None, 0.9))
    assert (inside.status, inside.outer.item()) == (OuterStatus.CONVERGED, 0.9)


def test_a_first_point_that_fails_raises():
    with pytest.raises(SolveError):
        run(walled(-1.0), torch.zeros(1, dtype=F64))


def test_an_inner_solver_short_of_steps_is_inaccurate_not_believed():
    matrix, target = random_program(4, 2)
    steep = problem_from(
        lambda z, x, batch: (
            0.5 * (z - x) @ torch.diag(torch.tensor([1.0, 1.0, 1.0, 1e-3]).to(F64)) @ (z - x)
        ),
        lambda z, x, batch: 0.5 * z @ matrix @ z - target @ z,
        initial_inner=lambda x, batch: torch.zeros_like(x),
    )
    short = GradientDescent(lr=1.0, max_steps=40, tol=1e-10)
    found = run(steep, torch.zeros(4, dtype=F64), inner_solver=short)
    assert found.status is OuterStatus.INACCURATE
    with pytest.raises(SolveError, match="MAX_STEPS"):
        run(steep, torch.ones(4, dtype=F64), inner_solver=short)


def test_a_warm_start_that_fails_is_tried_anew():
    """Newton's method on √(1 + z²) diverges from afar: the problem's own start is near."""
    problem = problem_from(
        lambda z, x, batch: ((z - x) ** 2 + 1.0).sqrt().sum(),
        lambda z, x, batch: (0.5 * (z - 3.0) ** 2).sum(),
        initial_inner=lambda x, batch: x.detach(),
    )
    newton = HessianFree(max_steps=20, tol=1e-10, cg_rtol=1e-10)
    found = run(problem, torch.zeros(2, dtype=F64), inner_solver=newton)
    assert found.status is OuterStatus.CONVERGED
    torch.testing.assert_close(found.outer, torch.full((2,), 3.0, dtype=F64), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bounds": (1.0,)}, "`bounds` is no pair"),
        ({"bounds": (1.0, 0.0)}, "entry 0 of the outer variable no room: low 1 is above high 0"),
        ({"bounds": (math.nan, 0.0)}, "low holds a NaN"),
        ({"bounds": (torch.zeros(3), None)}, r"low for `outer` is \[3\], but the leaf is \[2\]"),
        ({"bounds": ("a", None)}, "low for `outer` is str"),
        ({"bounds": ({"a": 1.0}, None)}, "no prefix"),
        ({"tol": 0.0}, "`tol` is 0"),
        ({"scale": -1.0}, "`scale` is -1"),
        ({"max_steps": 0}, "`max_steps` is 0"),
        ({"memory": 0}, "`memory` is 0"),
        ({"inner_solver": None}, "`inner_solver` is None"),
        ({"method": "cg"}, "`method` is a str"),
    ],
)
def test_wrong_arguments_are_named(settings, message):
    problem = chain(torch.eye(2, dtype=F64), torch.ones(2, dtype=F64))
    with pytest.raises(ValueError, match=message):
        run(problem, torch.zeros(2, dtype=F64), **settings)


def test_a_regularizer_as_the_outer_variable():
    """The strength of a proximal regularizer, bounded away from 0."""
    problem = problem_from(
        lambda z, x, batch: 0.5 * ((z - 1.0) ** 2).sum(),
        lambda z, x, batch: ((z - 0.25) ** 2).sum(),
        Proximal(lambda x: x, center=lambda x: torch.zeros(2, dtype=F64)),
    )
    free = run(problem, torch.ones((), dtype=F64), bounds=(0.0, None), tol=1e-8)
    assert free.outer.item() == pytest.approx(3.0, abs=1e-5)  # z = 1 / (1 + x)
    bound = run(problem, torch.ones((), dtype=F64), bounds=(0.0, 2.0), tol=1e-8)
    assert (bound.status, bound.outer.item()) == (OuterStatus.CONVERGED, 2.0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e7])
@pytest.mark.parametrize("width", [1e-3, 1.0])
def test_neither_narrow_bounds_nor_units_make_a_start_a_minimum(scale, width):
    problem = problem_from(
        lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        lambda z, x, batch: scale * ((z - 0.5 * width) ** 2).sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x),
    )
    start = torch.full((2,), width, dtype=F64)
    found = run(problem, start, bounds=(0.0, width), tol=1e-6)
    assert found.status is OuterStatus.CONVERGED
    torch.testing.assert_close(found.outer, start / 2, rtol=1e-5, atol=0)
    assert len(found.steps) > 1


def test_rounding_to_the_leafs_dtype_does_not_leave_the_bounds():
    problem = problem_from(
        lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        lambda z, x, batch: -z.sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x),
    )
    settings = {"inner_solver": LBFGS(tol=1e-5), "method": ImplicitCG(rtol=1e-5)}
    found = run(problem, torch.zeros(2), bounds=(0.0, 0.1), **settings)
    assert found.outer.dtype == torch.float32
    assert (found.outer.double() <= 0.1).all()
    assert (found.outer > 0.0999).all()


@pytest.mark.parametrize("at", [0, 1])
def test_a_callback_that_raises_stop_iteration_is_not_taken_for_an_end(at):
    matrix, target = random_program(4, 0)

    def callback(step):
        if step.step == at:
            raise StopIteration

    with pytest.raises(RuntimeError, match="`callback` raised StopIteration"):
        run(chain(matrix, target), torch.zeros(4, dtype=F64), callback=callback)
