"""The linear solvers on symmetric matrices of known spectrum: error in the solution by products.

    python benchmarks/spectra.py [--full] [--threads 1] [--out benchmarks/results]

Dense matrices with prescribed eigenvalues and random eigenvectors, 100 unknowns and 400 products at
most; with ``--full`` 1,000 and 4,000. Every product counts: those that a preconditioner or a step
size is made of, and those that check a residual. The error is that of the solution itself, against
the eigendecomposition, for a random right-hand side. *Needed* products are those of the least
budget, to within 1 %, that reaches an error in float64; seconds are those of that run. The status
is that of a run that is asked for a relative residual of 1e-6, in float64 and in float32. Writes a
table, JSON and a picture.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from arguments import arguments
from timing import Times, alternate
from torch import Tensor

from bilevel.experiments.pictures import COLORS, INK, new_figure, tidy
from bilevel.experiments.results import Row, write_results
from bilevel.linear_solver import LinearSolution, LinearSolver
from bilevel.operator import Operator, SecantPairs
from bilevel.result import ritz_values
from bilevel.solvers import (
    CG,
    GMRES,
    MINRES,
    BiCGStab,
    Dense,
    JacobiPreconditioner,
    Neumann,
    NormalCG,
    Nystrom,
    NystromPreconditioner,
    RecyclingPreconditioner,
    Richardson,
    SciPy,
)
from bilevel.status import Status

F64 = torch.float64
TARGETS = (1e-3, 1e-6)
RTOL = 1e-6
# Points of a curve lie so far apart, and end there.
RATIO, FLOOR, TOP = 1.25, 1e-8, 20.0
# The matrix of the last outer step, from which directions are recycled, has eigenvectors turned by
# up to this angle.
TURN = 0.01
RANK = 20


# Matrices


@dataclass(frozen=True)
class System:
    """A symmetric matrix by its eigendecomposition, with a right-hand side.

    Attributes:
        basis: Eigenvectors in the columns, ``[n, n]``.
        eigenvalues: ``[n]``.
        rhs: b, ``[1, n]``.
    """

    basis: Tensor
    eigenvalues: Tensor
    rhs: Tensor

    @cached_property
    def matrix(self) -> Tensor:
        """A."""
        return _symmetric(self.basis, self.eigenvalues)

    @cached_property
    def solution(self) -> Tensor:
        """A⁻¹ b."""
        return (self.rhs @ self.basis / self.eigenvalues) @ self.basis.mT

    @cached_property
    def before(self) -> Tensor:
        """The matrix of the last outer step: its eigenvectors are turned a little."""
        size = len(self.eigenvalues)
        skew = torch.randn(size, size, dtype=F64, generator=_random(2))
        skew = skew - skew.mT
        turn = torch.matrix_exp(TURN / torch.linalg.matrix_norm(skew, 2) * skew)
        return _symmetric(turn @ self.basis, self.eigenvalues)

    @property
    def condition(self) -> float:
        """κ, by absolute values."""
        sizes = self.eigenvalues.abs()
        return float(sizes.max() / sizes.min())

    @property
    def definite(self) -> bool:
        """All eigenvalues are positive."""
        return bool((self.eigenvalues > 0).all())


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _symmetric(basis: Tensor, eigenvalues: Tensor) -> Tensor:
    matrix = (basis * eigenvalues) @ basis.mT
    return (matrix + matrix.mT) / 2


def _rotation(size: int) -> Tensor:
    basis: Tensor = torch.linalg.qr(torch.randn(size, size, dtype=F64, generator=_random(0)))[0]
    return basis


def uniform(n: int) -> Tensor:
    """Evenly spaced."""
    return torch.linspace(1.0, 100.0, n, dtype=F64)


def geometric(n: int) -> Tensor:
    """Evenly spaced logarithms."""
    return torch.logspace(-4.0, 0.0, n, dtype=F64)


def outliers(n: int) -> Tensor:
    """A cluster at λ and ten eigenvalues far above: a trained network's Hessian plus λ."""
    bulk = 1.0 + torch.rand(n - 10, dtype=F64, generator=_random(3))
    return torch.cat([bulk, torch.logspace(1.0, 3.0, 10, dtype=F64)])


def clusters(n: int) -> Tensor:
    """Four tight clusters, a decade apart."""
    spread = 1.0 + 1e-3 * torch.rand(n, dtype=F64, generator=_random(3))
    return spread * 10.0 ** (torch.arange(n) % 4)


def small_strength(n: int) -> Tensor:
    """A spectrum that decays to nothing, above a λ that is smaller still."""
    return torch.logspace(-10.0, 0.0, n, dtype=F64) + 1e-6


def indefinite(n: int) -> Tensor:
    """Evenly spaced, but for five negative ones."""
    negative = -(2.0 ** torch.arange(5, dtype=F64))
    return torch.cat([negative, torch.linspace(1.0, 100.0, n - 5, dtype=F64)])


PRESCRIBED: dict[str, Callable[[int], Tensor]] = {
    "uniform": uniform,
    "geometric": geometric,
    "outliers": outliers,
    "clusters": clusters,
    "small-strength": small_strength,
    "indefinite": indefinite,
}
TITLES = {
    "uniform": "uniform",
    "outliers": "ten outliers above a cluster",
    "clusters": "four clusters",
    "geometric": "geometric decay",
    "scaled": "unknowns of different scale",
    "small-strength": "decay, above a small λ",
    "indefinite": "uniform, but for five negative",
}


def make_system(name: str, n: int) -> System:
    """The matrix of that name; ``scaled`` is a well-conditioned one in badly chosen units."""
    rhs = torch.randn(1, n, dtype=F64, generator=_random(1))
    if name in PRESCRIBED:
        return System(_rotation(n), PRESCRIBED[name](n), rhs)
    units = torch.logspace(0.0, -2.0, n, dtype=F64)
    inside = _symmetric(_rotation(n), torch.linspace(0.5, 1.5, n, dtype=F64))
    eigenvalues, basis = torch.linalg.eigh(units.unsqueeze(-1) * inside * units)
    return System(basis, eigenvalues, rhs)


# Solvers


@dataclass(frozen=True)
class Look:
    """How a curve is drawn."""

    color: str
    style: str = "-"
    width: float = 1.8


@dataclass(frozen=True)
class Candidate:
    """A solver by its budget.

    Attributes:
        make: ``(steps, rtol, smallest) -> solver``, given the smallest absolute eigenvalue.
        label: In the legend.
        look: How it is drawn; None: not at all.
        each: Products of a step.
    """

    make: Callable[[int, float, float], LinearSolver]
    label: str
    look: Look | None
    each: int = 1


JACOBI, NYSTROM = JacobiPreconditioner(samples=RANK), NystromPreconditioner(rank=RANK)
RECYCLING = RecyclingPreconditioner(pairs=RANK)
BLUE, GREEN, TEAL, VIOLET, RED, GREY = (COLORS[i] for i in (2, 1, 6, 3, 4, 5))
CANDIDATES: dict[str, Candidate] = {
    "cg": Candidate(lambda k, r, _: CG(k, r), "CG", Look(BLUE, width=2.4)),
    "cg-nystrom": Candidate(
        lambda k, r, _: CG(k, r, preconditioner=NYSTROM),
        f"CG, Nyström rank {RANK}",
        Look(BLUE, "--"),
    ),
    "cg-jacobi": Candidate(
        lambda k, r, _: CG(k, r, preconditioner=JACOBI),
        f"CG, Jacobi {RANK} samples",
        Look(BLUE, ":"),
    ),
    "cg-recycling": Candidate(
        lambda k, r, _: CG(k, r, preconditioner=RECYCLING),
        f"CG, recycling {RANK} pairs",
        Look(BLUE, "-."),
    ),
    "minres": Candidate(lambda k, r, _: MINRES(k, r), "MINRES", Look(GREEN)),
    "gmres": Candidate(lambda k, r, _: GMRES(k, r), "GMRES, restart 30", Look(TEAL)),
    "gmres-full": Candidate(
        lambda k, r, _: GMRES(k, r, restart=k), "GMRES, no restart", Look(TEAL, "--")
    ),
    "bicgstab": Candidate(lambda k, r, _: BiCGStab(k, r), "BiCGStab", Look(VIOLET), each=2),
    "normal-cg": Candidate(lambda k, r, _: NormalCG(k, r), "NormalCG", Look(RED), each=2),
    "neumann": Candidate(lambda k, r, _: Neumann(k, rtol=r), "Neumann = Richardson", Look(GREY)),
    "richardson": Candidate(lambda k, r, _: Richardson(k, r), "Richardson", None),
    # What a user knows of the spectrum is the strength of the regularizer.
    "nystrom": Candidate(
        lambda k, r, low: Nystrom(rank=k, rho=low, rtol=r), "Nyström, direct", Look(COLORS[0])
    ),
    "dense": Candidate(lambda *_: Dense(rtol=RTOL), "dense", Look(INK)),
    "scipy-cg": Candidate(lambda k, r, _: SciPy("cg", r, k), "SciPy's CG", None),
    "scipy-minres": Candidate(lambda k, r, _: SciPy("minres", r, k), "SciPy's MINRES", None),
}


@dataclass(frozen=True)
class Run:
    """One solve.

    Attributes:
        products: All products with the matrix.
        found: What the solver returned.
        error: ‖v − v*‖ / ‖v*‖.
        residual: ‖b − A v‖ / ‖b‖, computed here in float64, with A and b as the solver had them.
    """

    products: int
    found: LinearSolution
    error: float
    residual: float

    @property
    def status(self) -> Status:
        """How the solver says that it ended."""
        return Status(int(self.found.status))

    @property
    def steps(self) -> int:
        """Steps, as the solver counts them."""
        return int(self.found.steps)


class Case:
    """A solver on a matrix, in one precision."""

    def __init__(self, system: System, name: str, dtype: torch.dtype = F64) -> None:
        self.system, self.name = system, name
        self._make = CANDIDATES[name].make
        self._matrix, self._rhs = system.matrix.to(dtype), system.rhs.to(dtype)
        self._smallest = float(system.eigenvalues.abs().min())
        self._pairs: SecantPairs | None = None
        if name == "cg-recycling":
            self._pairs = self._of_the_last_step()

    def _of_the_last_step(self) -> SecantPairs | None:
        """What CG learned of the matrix of the last outer step, from another right-hand side."""
        before = self.system.before.to(self._matrix.dtype)
        operator = Operator.symmetric(lambda v: v @ before)
        n = len(before)
        rhs = torch.randn(1, n, dtype=F64, generator=_random(4)).to(before.dtype)
        return self._make(n, RTOL, self._smallest)(operator, rhs).pairs

    def solve(self, steps: int, rtol: float = 0.0) -> tuple[LinearSolution, int]:
        """Solve within a budget, or to a tolerance; the products it took, too."""
        products = 0

        def product(v: Tensor) -> Tensor:
            nonlocal products
            products += 1
            return v @ self._matrix

        operator = replace(Operator.symmetric(product), recycled_pairs=self._pairs)
        found = self._make(steps, rtol, self._smallest)(operator, self._rhs)
        return found, products

    def run(self, steps: int, rtol: float = 0.0) -> Run:
        """Solve, and look at what came of it."""
        found, products = self.solve(steps, rtol)
        value, rhs, wanted = found.value.double(), self._rhs.double(), self.system.solution
        return Run(
            products,
            found,
            float((value - wanted).norm() / wanted.norm()),
            float((rhs - value @ self._matrix.double()).norm() / rhs.norm()),
        )

    def most(self, budget: int) -> int:
        """Steps that so many products pay for; no more columns than there are."""
        if self.name == "nystrom":
            return min(budget, len(self._matrix))
        return budget // CANDIDATES[self.name].each

    def curve(self, budget: int) -> dict[int, Run]:
        """Runs by steps, until the error is small, the budget spent, or no step is of use."""
        runs: dict[int, Run] = {}
        for steps in _budgets(self.most(budget)):
            runs[steps] = run = self.run(steps)
            if not run.error > FLOOR or run.steps < steps:
                break
        return runs

    def needed(self, runs: Mapping[int, Run], target: float) -> tuple[int, Run] | None:
        """The least budget, to within 1 %, that reaches the error; None where none did."""
        enough = next((steps for steps, run in runs.items() if run.error <= target), None)
        if enough is None:
            return None
        low = max((steps for steps in runs if steps < enough), default=0)
        best = runs[enough]
        while enough - low > max(1, enough // 100):
            middle = (low + enough) // 2
            run = self.run(middle)
            if run.error <= target:
                enough, best = middle, run
            else:
                low = middle
        return enough, best


def _budgets(most: int) -> Iterator[int]:
    steps = 1
    while steps <= most:
        yield steps
        steps = max(steps + 1, round(RATIO * steps))


@dataclass(frozen=True)
class Found:
    """What was measured of one matrix.

    Attributes:
        system: The matrix.
        curves: Products and error of each solver.
        needed: Products to each error, where it is reached.
        times: Of the run to the smallest error.
        final: The run that is asked for a tolerance, by solver and precision.
    """

    system: System
    curves: dict[str, list[tuple[int, float]]]
    needed: dict[tuple[str, float], int]
    times: dict[str, Times]
    final: dict[tuple[str, str], Run]


def measure(name: str, n: int, budget: int, rounds: int) -> Found:
    """All solvers on one matrix."""
    system = make_system(name, n)
    curves, needed, final = {}, {}, {}
    timed: dict[str, Callable[[], object]] = {"product": lambda: system.rhs @ system.matrix}
    for solver in CANDIDATES:
        case = Case(system, solver)
        runs = case.curve(budget)
        curves[solver] = [(run.products, run.error) for run in runs.values()]
        for target in TARGETS:
            least = case.needed(runs, target)
            if least is None:
                continue
            steps, run = least
            needed[solver, target] = run.products
            if target == min(TARGETS):
                timed[solver] = partial(case.solve, steps)
        final[solver, "float64"] = case.run(case.most(budget), RTOL)
        final[solver, "float32"] = Case(system, solver, torch.float32).run(case.most(budget), RTOL)
    return Found(system, curves, needed, alternate(timed, rounds), final)


# Reporting


def rows_of(name: str, found: Found) -> list[Row]:
    """As they stand in the file."""
    rows = [
        Row({"spectrum": name}, "condition", found.system.condition),
        Row({"spectrum": name}, "unknowns", len(found.system.eigenvalues)),
    ]
    for (solver, target), products in found.needed.items():
        where = {"spectrum": name, "solver": solver, "error": f"{target:.0e}"}
        rows.append(Row(where, "products", products))
    for solver, times in found.times.items():
        rows.append(Row({"spectrum": name, "solver": solver}, "seconds", times.median))
        rows.append(Row({"spectrum": name, "solver": solver}, "spread", times.spread))
    for (solver, precision), run in found.final.items():
        where = {
            "spectrum": name,
            "solver": solver,
            "precision": precision,
            "status": run.status.name,
        }
        rows.append(Row(where, "final_products", run.products))
        rows.append(Row(where, "final_error", run.error))
        rows.append(Row(where, "final_residual", run.residual))
        rows.append(Row(where, "claimed_residual", float(run.found.residual)))
        for metric, value in _curvature(run).items():
            if math.isfinite(value):
                rows.append(Row(where, metric, value))
    return rows


def _curvature(run: Run) -> dict[str, float]:
    """The smallest curvature met, and the smallest Ritz value, where they are known."""
    found = run.found
    out = {"curvature_min": float(found.curvature_min)}
    if found.lanczos is not None and found.lanczos.shape[1]:
        out["ritz_min"] = float(ritz_values(found.lanczos)[0, 0])
    return out


def table(found: Found) -> Iterator[str]:
    """Lines to print."""
    asked = f"asked for {RTOL:.0e} in"
    yield f"  {'':14}{'products to':>18}{'':19}" + "".join(
        f"{asked:>20} {precision:21}" for precision in ("float64", "float32")
    )
    yield (
        f"  {'':14}"
        + "".join(f"{target:9.0e}" for target in TARGETS)
        + f"{'ms':>9}{'±':>8}"
        + 2 * f"  {'status':12}{'products':>9}{'residual':>10}{'error':>9}"
    )
    for solver in CANDIDATES:
        cells = [found.needed.get((solver, target)) for target in TARGETS]
        line = f"  {solver:14}" + "".join(f"{'—' if one is None else one:>9}" for one in cells)
        times = found.times.get(solver)
        if times is None:
            line += f"{'—':>9}{'':8}"
        else:
            line += f"{1e3 * times.median:9.2f}{1e3 * times.spread * times.median:8.2f}"
        for precision in ("float64", "float32"):
            run = found.final[solver, precision]
            line += f"  {run.status.name:12}{run.products:9}{run.residual:10.1e}{run.error:9.1e}"
        yield line


def draw(everything: Mapping[str, Found], path: Path) -> None:
    """One panel for each matrix, its spectrum above it; the legend takes the last place."""
    columns = math.ceil((len(everything) + 1) / 2)
    figure = new_figure(3.4 * columns, 7.2)
    panels = figure.subplots(2, columns, squeeze=False).flatten()
    most = max(points[-1][0] for one in everything.values() for points in one.curves.values())
    entries: dict[str, Any] = {}
    for axes, (name, found) in zip(panels, everything.items(), strict=False):
        system = found.system
        for solver, points in found.curves.items():
            candidate, status = CANDIDATES[solver], found.final[solver, "float64"].status
            if candidate.look is None:
                continue
            lines = _curve(axes, points, candidate)
            entries.setdefault(candidate.label, lines)
            if status in (Status.INDEFINITE, Status.DIVERGED) and solver != "dense":
                last = (points[-1][0], min(points[-1][1], TOP / 3))
                axes.plot(*last, "X", ms=8, mec="white", color=candidate.look.color)
        if system.definite:
            steps = list(_budgets(most))
            bounds = _bound(system.condition, steps)
            entries["bound of CG by κ"] = axes.plot(steps, bounds, color=GREY, lw=1, ls=(0, (1, 2)))
        axes.set(xscale="log", yscale="log", xlim=(1, 1.3 * most), ylim=(FLOOR / 2, TOP))
        axes.set_yticks([10.0**-k for k in range(0, 9, 2)])
        axes.minorticks_off()
        tidy(axes)
        title = f"{TITLES[name]}, κ ≈ 10$^{round(math.log10(system.condition))}$"
        axes.set_title(title, fontsize=10, color=INK, pad=20)
        _spectrum(axes, system.eigenvalues)
    for axes in panels[len(everything) - columns : len(everything)]:
        axes.set_xlabel("products", color=INK)
    for axes in panels[::columns]:
        axes.set_ylabel("error in the solution", color=INK)
    for axes in panels[len(everything) :]:
        axes.axis("off")
    entries["INDEFINITE or DIVERGED"] = panels[-1].plot([], [], "X", ms=8, mec="white", color=INK)
    handles = [lines[0] for lines in entries.values()]
    panels[-1].legend(
        handles, list(entries), loc="center", frameon=False, fontsize=9, handlelength=3
    )
    figure.savefig(path)


def _curve(axes: Any, points: Sequence[tuple[int, float]], candidate: Candidate) -> Any:
    """A line; what takes all of its products at once is a point, kept within the picture."""
    look = candidate.look
    assert look is not None
    products, errors = zip(*points, strict=True)
    if len(points) == 1:
        return axes.plot(products, [max(*errors, FLOOR)], "D", ms=6, color=look.color, ls="")
    return axes.plot(products, errors, look.style, color=look.color, lw=look.width)


def _bound(condition: float, steps: Sequence[int]) -> list[float]:
    """That of the error in the energy norm, turned into one of the error itself."""
    root = condition**0.5
    rate = (root - 1) / (root + 1)
    return [2 * root * rate**k for k in steps]


def _spectrum(axes: Any, eigenvalues: Tensor) -> None:
    """A strip above the panel with a line for each eigenvalue; negative ones in red."""
    strip = axes.inset_axes([0.0, 1.02, 1.0, 0.06])
    sizes = eigenvalues.abs() / eigenvalues.abs().max()
    strip.vlines(sizes[eigenvalues > 0].tolist(), 0, 1, color=INK, lw=0.5, alpha=0.4)
    strip.vlines(sizes[eigenvalues < 0].tolist(), 0, 1, color=RED, lw=1.6)
    strip.set(xscale="log", xlim=(5e-7, 2.0), ylim=(0, 1))
    strip.axis("off")


def main() -> None:
    """Measure, print, write."""
    args = arguments(__doc__, "1,000 unknowns, not 100", rounds=5)
    n, budget = (1000, 4000) if args.full else (100, 400)
    everything, rows = {}, []
    for name in TITLES:
        found = measure(name, n, budget, args.rounds)
        print(f"\n{name}, {n} unknowns, κ = {found.system.condition:.3g}")
        for line in table(found):
            print(line)
        everything[name] = found
        rows += rows_of(name, found)
    path = write_results(args.out, "spectra", sys.argv, rows, seeds=[0])
    draw(everything, path.with_suffix(".png"))
    print(f"written: {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
