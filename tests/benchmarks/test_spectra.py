"""The benchmark of linear solvers on known spectra, at a size that takes seconds."""

import pytest
import torch

from bilevel import Status

N, BUDGET = 40, 100


@pytest.fixture
def spectra(script):
    return script("spectra")


def names():
    return [
        "uniform",
        "outliers",
        "clusters",
        "geometric",
        "scaled",
        "small-strength",
        "indefinite",
    ]


def test_these_are_all_matrices(spectra):
    assert list(spectra.TITLES) == names()


@pytest.mark.parametrize("name", names())
def test_the_matrix_has_the_spectrum_and_the_solution_solves(spectra, name):
    system = spectra.make_system(name, N)
    values = system.eigenvalues.sort().values
    scale = values.abs().max()
    for matrix in (system.matrix, system.before):
        assert torch.allclose(torch.linalg.eigvalsh(matrix), values, rtol=0, atol=1e-13 * scale)
    if name in spectra.PRESCRIBED:
        assert values.equal(spectra.PRESCRIBED[name](N).sort().values)
    turned = (system.before - system.matrix).norm() / system.matrix.norm()
    assert 1e-4 < turned < 2 * spectra.TURN
    rest = system.rhs - system.solution @ system.matrix
    assert rest.norm() / system.rhs.norm() < 1e-15 * system.condition + 1e-13
    assert system.definite == (name != "indefinite")


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", names())
def test_no_solver_lies(spectra, name, precision):
    """CONVERGED is true, the residual is the one claimed, and INDEFINITE only what may be it."""
    system = spectra.make_system(name, N)
    for solver in spectra.CANDIDATES:
        case = spectra.Case(system, solver, precision)
        run = case.run(case.most(BUDGET), spectra.RTOL)
        rounding = 2 * torch.finfo(precision).eps * system.condition
        claimed = run.found.residual.item()
        assert claimed == pytest.approx(run.residual, rel=0.01, abs=rounding), solver
        if run.status is Status.CONVERGED:
            assert run.residual <= spectra.RTOL + rounding, solver
        if run.status is Status.INDEFINITE:
            assert not system.definite or rounding > 0.1, solver


def test_an_indefinite_matrix_is_told_by_those_who_need_a_definite_one(spectra):
    system = spectra.make_system("indefinite", N)
    found = {}
    for solver in spectra.CANDIDATES:
        case = spectra.Case(system, solver)
        found[solver] = case.run(case.most(10 * BUDGET), spectra.RTOL)
    told = {solver for solver, run in found.items() if run.status is Status.INDEFINITE}
    assert told == {"cg", "cg-nystrom", "cg-jacobi", "cg-recycling", "nystrom", "dense"}
    diverged = {solver for solver, run in found.items() if run.status is Status.DIVERGED}
    assert diverged == {"neumann", "richardson"}
    for solver in ("minres", "gmres", "gmres-full", "bicgstab", "normal-cg", "dense"):
        assert found[solver].error < 1e-4, solver
    # The Rayleigh quotients that it meets may all be positive; its Ritz values are not.
    ritz = spectra._curvature(found["minres"])["ritz_min"]
    assert ritz == pytest.approx(float(system.eigenvalues.min()), rel=1e-3)


@pytest.mark.parametrize("name", [name for name in names() if name != "indefinite"])
def test_conjugate_gradients_keep_within_their_bound(spectra, name):
    system = spectra.make_system(name, N)
    runs = spectra.Case(system, "cg").curve(BUDGET)
    bounds = spectra._bound(system.condition, list(runs))
    assert len(runs) > 5
    for run, bound in zip(runs.values(), bounds, strict=True):
        assert run.error <= bound + 1e-9


def test_all_products_count(spectra):
    system = spectra.make_system("uniform", N)
    products = {name: spectra.Case(system, name).run(3).products for name in spectra.CANDIDATES}
    assert products["cg"] == products["minres"] == products["gmres"] == 3
    # Rank, samples, power iteration; the last product checks a residual.
    assert products["cg-nystrom"] == products["cg-jacobi"] == spectra.RANK + 3
    assert products["neumann"] == products["richardson"] == 12 + 3
    assert products["bicgstab"] == 6
    assert products["normal-cg"] == 3 + 3 + 1
    assert products["nystrom"] == 3 + 1
    assert products["dense"] == N


def test_the_needed_budget_is_the_least(spectra):
    system = spectra.make_system("geometric", N)
    case = spectra.Case(system, "cg")
    runs = case.curve(BUDGET)
    for target in spectra.TARGETS:
        steps, run = case.needed(runs, target)
        # To within 1 %, which is one step here.
        assert run.error <= target < case.run(steps - 1).error
        assert run.products == steps
    assert case.needed({k: one for k, one in runs.items() if one.error > 1e-3}, 1e-3) is None


@pytest.mark.parametrize(
    ("name", "solver"), [("outliers", "cg-recycling"), ("scaled", "cg-jacobi")]
)
def test_a_preconditioner_saves_products_where_it_should(spectra, name, solver):
    system = spectra.make_system(name, 2 * N)
    needed = {}
    for one in ("cg", solver):
        case = spectra.Case(system, one)
        needed[one] = case.needed(case.curve(3 * BUDGET), 1e-6)[1].products
    assert needed[solver] < 0.6 * needed["cg"]


def test_a_small_run_has_every_part(spectra, monkeypatch, tmp_path):
    few = ("cg", "neumann", "nystrom", "dense")
    candidates = {name: spectra.CANDIDATES[name] for name in few}
    monkeypatch.setattr(spectra, "CANDIDATES", candidates)
    found = {name: spectra.measure(name, N, BUDGET, 2) for name in ("outliers", "indefinite")}
    assert set(found["outliers"].times) == {"product", "cg", "dense"}
    assert found["indefinite"].needed.keys() == {("dense", target) for target in spectra.TARGETS}
    lines = list(spectra.table(found["indefinite"]))
    assert sum("INDEFINITE" in line for line in lines) == 3
    rows = spectra.rows_of("indefinite", found["indefinite"])
    ended = {(r.setting["solver"], r.setting["status"]) for r in rows if "status" in r.setting}
    assert ("cg", "INDEFINITE") in ended
    assert ("neumann", "DIVERGED") in ended
    spectra.draw(found, tmp_path / "spectra.png")
    assert (tmp_path / "spectra.png").stat().st_size > 10_000
