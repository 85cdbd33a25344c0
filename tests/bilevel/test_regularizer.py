import pytest
import torch

from bilevel import ObjectiveError, Proximal, Task, hypergradient, problem_from, solve_inner
from bilevel.solvers import DenseExact, GradientDescent, ImplicitCG, Unrolled
from tests.helpers import Solved, assert_directional, randn

F64 = torch.float64
SOLVER = GradientDescent(lr=0.15, max_steps=300, tol=1e-13)


def problem(regularizer, initial_inner=None):
    return problem_from(
        lambda z, x, batch: torch.log1p((z["a"] ** 2).sum() + z["b"] ** 2 * 2) + z["a"].sum(),
        lambda z, x, batch: (z["a"] ** 3).sum() + z["b"] ** 2,
        regularizer,
        initial_inner,
    )


def point():
    return {"a": randn(3, seed=1), "b": torch.tensor(0.7, dtype=F64)}


STRENGTHS = {
    "number": (4.0, {"a": 4.0, "b": 4.0}),
    "0-d": (torch.tensor(4.0, dtype=F64), {"a": 4.0, "b": 4.0}),
    "one element": (torch.full((1, 1), 4.0, dtype=F64), {"a": 4.0, "b": 4.0}),
    "prefix": ({"a": 4.0, "b": 5}, {"a": 4.0, "b": 5.0}),
    "entries": (
        {"b": torch.tensor(5.0), "a": torch.tensor([4.0, 5.0, 6.0])},
        {"a": torch.tensor([4.0, 5.0, 6.0], dtype=F64), "b": 5.0},
    ),
}


@pytest.mark.parametrize("kind", STRENGTHS)
@pytest.mark.parametrize("learned", [False, True])
def test_every_form_of_strength_is_the_formula(kind, learned):
    given, written = STRENGTHS[kind]
    x = point()
    found = solve_inner(
        problem(Proximal((lambda x: given) if learned else given)), x, inner_solver=SOLVER
    )
    assert found.ok
    z = {key: leaf.requires_grad_() for key, leaf in found.inner.items()}
    value = problem(None, lambda x, b: x).inner_objective(z, x, None)
    value = value + sum((0.5 * written[key] * (z[key] - x[key]) ** 2).sum() for key in z)
    torch.testing.assert_close(found.value[0], value.detach(), rtol=1e-12, atol=0)
    for gradient in torch.autograd.grad(value, list(z.values())):
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("method", [ImplicitCG(rtol=1e-12), DenseExact(), Unrolled()], ids=repr)
@pytest.mark.parametrize("tasks", [1, 2])
def test_learned_strengths_and_centers_have_exact_hypergradients(method, tasks):
    regular = Proximal(
        lambda x: x["log_strength"].exp() + 2.0,
        lambda x: {"a": x["w"] * x["scale"], "b": x["w"].sum()},
    )
    one = problem(regular)
    x = {
        "log_strength": torch.tensor(0.4, dtype=F64),
        "w": randn(3, seed=2),
        "scale": torch.tensor(1.5, dtype=F64),
    }
    data = [Task(torch.zeros(1, dtype=F64)) for _ in range(tasks)]
    result = hypergradient(one, x, data, inner_solver=SOLVER, method=method)
    assert result.ok
    assert_directional(result.gradient, Solved(one, x, data), x, rtol=1e-8)


def test_per_entry_learned_strengths_have_their_hypergradients_for_each_task():
    one = problem_from(
        lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        lambda z, x, batch: z.sum(),
        Proximal(lambda x: x["s"], lambda x: x["c"]),
    )
    x = {"s": torch.tensor([1.0, 2.0, 3.0], dtype=F64), "c": randn(3)}
    tasks = [Task(randn(3, seed=i)) for i in range(2)]
    result = hypergradient(
        one, x, tasks, inner_solver=SOLVER, method=ImplicitCG(rtol=1e-12), reduction="none"
    )
    # z = (d + s c) / (1 + s): dz/ds = (c − d) / (1 + s)², dz/dc = s / (1 + s).
    for i, task in enumerate(tasks):
        want = (x["c"] - task.inner_batch) / (1 + x["s"]) ** 2
        torch.testing.assert_close(result.gradient["s"][i], want, rtol=1e-9, atol=1e-10)
        want = x["s"] / (1 + x["s"])
        torch.testing.assert_close(result.gradient["c"][i], want, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        (-1.0, "`strength` has the entry -1.0"),
        (float("nan"), "finite"),
        (float("inf"), "finite"),
        ({"a": 1.0, "b": -2.0}, r"`strength\['b'\]` has the entry -2.0"),
        (torch.tensor([1.0, -0.5]), "-0.5"),
        ("strong", "is a str"),
    ],
    ids=str,
)
def test_a_fixed_strength_is_checked_when_it_is_made(strength, message):
    with pytest.raises(ValueError, match=message):
        Proximal(strength)


def test_a_learned_strength_that_turned_negative_is_refused():
    one = problem(Proximal(lambda x: x["b"] - 1.0))
    with pytest.raises(ObjectiveError, match=r"-0\.3.*exp\(\)"):
        solve_inner(one, point(), inner_solver=SOLVER)


def test_a_strength_of_zero_is_no_regularizer():
    x = point()
    free = solve_inner(problem(Proximal(0.0)), x, inner_solver=GradientDescent(0.1, 20))
    none = solve_inner(problem(None, lambda x, batch: x), x, inner_solver=GradientDescent(0.1, 20))
    assert torch.equal(free.inner["a"], none.inner["a"])


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        ({"a": 1.0}, "no prefix"),
        ({"a": torch.ones(2), "b": 1.0}, r"`inner\['a'\]` has shape \(2,\)"),
        (torch.ones(3), "does not broadcast"),
    ],
    ids=["keys", "shape", "tensor"],
)
def test_a_strength_that_does_not_fit_is_refused(strength, message):
    with pytest.raises(ObjectiveError, match=message):
        solve_inner(problem(Proximal(strength)), point(), inner_solver=SOLVER)


@pytest.mark.parametrize(
    ("center", "message"),
    [
        (lambda x: [x["a"], x["b"]], "structure"),
        (lambda x: {"a": x["a"][:2], "b": x["b"]}, "shapes"),
        (lambda x: {"a": x["a"].float(), "b": x["b"].float()}, "dtype"),
        (lambda x: {"a": x["a"], "b": 0.0}, "is a float"),
        (lambda x: {"a": x["a"].to("meta"), "b": x["b"].to("meta")}, "device"),
    ],
    ids=["structure", "shapes", "dtype", "number", "device"],
)
def test_a_center_unlike_the_inner_variable_is_refused(center, message):
    one = problem(Proximal(1.0, center), lambda x, batch: x)
    with pytest.raises(ObjectiveError, match=f"center.*{message}"):
        solve_inner(one, point(), inner_solver=SOLVER)


def test_an_identity_center_of_another_structure_says_how_to_write_one():
    one = problem(Proximal(1.0), lambda x, batch: {"a": x["w"], "b": x["w"][0]})
    with pytest.raises(ObjectiveError, match="`center` is None, so `outer` itself is the center"):
        solve_inner(one, {"w": randn(3)}, inner_solver=SOLVER)


def test_the_start_is_the_center():
    found = solve_inner(
        problem(Proximal(1.0)), point(), inner_solver=GradientDescent(0.1, max_steps=0)
    )
    assert torch.equal(found.inner["a"], point()["a"])
