# %% [markdown]
# # Write your own solver
#
# An implicit hypergradient takes two solves: an [inner solver](../concepts/inner-solvers.md) walks
# to $z^\star(x)$, and a [linear solver](../concepts/linear-solvers.md) finds the
# [adjoint](../concepts/hypergradients.md#implicit-methods) $v$ in $Hv = \partial_z f$. Each has a
# place for one of your own. You write the lines that compute; batching over
# [tasks](../concepts/tasks.md), stopping, and the judgement of how the solve ended are there.
#
# This page writes one of each, from the same idea. It is old, and the library does not have it:
# *Chebyshev acceleration* (Golub and Varga, 1961). Suppose that the objective is quadratic, with
# curvatures in $[\mu, L]$. Of all methods whose steps combine the gradients met so far, with weights
# fixed beforehand, this one has the best worst case after $k$ steps, *for each* $k$. With
#
# $$
# \kappa = \frac{L}{\mu}, \qquad q = \frac{\sqrt\kappa - 1}{\sqrt\kappa + 1}, \qquad
# \beta_0 = 0, \qquad
# \beta_k = q^2\, \frac{1 + q^{2k-2}}{1 + q^{2k+2}} \quad (k \ge 1)
# $$
#
# the step number $k$ is
#
# $$
# d_k = \beta_k\, d_{k-1} - (1 + \beta_k)\, \frac{2}{L + \mu}\, \nabla_k , \qquad
# z_{k+1} = z_k + d_k ,
# $$
#
# with $\nabla_k$ the gradient at $z_k$. The first step is plain gradient descent. As $k$ grows,
# $\beta_k$ falls to $q^2$, which is the heavy ball of Polyak (1964): Chebyshev's method is heavy
# ball with a good beginning. The error after $k$ steps is at most
#
# $$
# \frac{\|z_k - z^\star\|}{\|z_0 - z^\star\|} \le \frac{2 q^k}{1 + q^{2k}} ,
# $$
#
# and it will be our test. Other objectives are nearly quadratic close to their minimum: the
# recurrence serves there, and the residual judges it.

# %%
import math

import torch


def chebyshev_factor(low, high):
    """q, by which the error falls per step in the long run."""
    root = math.sqrt(high / low)
    return (root - 1) / (root + 1)


def momentum(k, q):
    """βₖ; ``k`` is a 0-d tensor."""
    later = q**2 * (1 + q ** (2 * k - 2)) / (1 + q ** (2 * k + 2))
    return torch.where(k > 0, later, 0.0)


q = chebyshev_factor(1.0, 100.0)
first = [momentum(torch.tensor(float(k)), q).item() for k in (0, 1, 2, 5, 20)]
print("q²", f"{q**2:.3f}", "  β", *(f"{one:.3f}" for one in first))

# %% [markdown]
# ## An inner solver
#
# A solver is a frozen dataclass of its settings, with two hooks. `_init` makes the state that goes
# from step to step; `_step` takes one step of *all* tasks.

# %%
from dataclasses import dataclass

from bilevel import InnerSolver
from bilevel.registry import INNER_SOLVERS


@INNER_SOLVERS.register("chebyshev-descent")
@dataclass(frozen=True)
class ChebyshevDescent(InnerSolver):
    """Gradient descent with the momentum that is best for curvatures in a known interval.

    Args:
        low: μ > 0, the smallest curvature.
        high: L ≥ μ, the largest.
        max_steps: The most steps; all are taken where ``tol`` is None.
        tol: Stop a task once ‖∂_z G‖ ≤ tol, looked at every 10 steps; None: take all steps.
    """

    low: float
    high: float
    max_steps: int = 100
    tol: float | None = None

    def __post_init__(self):
        super().__post_init__()  # looks at max_steps and tol
        if not 0 < self.low <= self.high < math.inf:
            raise ValueError(f"`low` is {self.low} and `high` {self.high}; 0 < low <= high < ∞")

    def _init(self, flat, z):
        return torch.zeros_like(z), z.new_zeros(())  # d, k

    def _step(self, flat, z, state):
        d, k = state
        beta = momentum(k, chebyshev_factor(self.low, self.high))
        d = beta * d - (1 + beta) * 2 / (self.low + self.high) * flat.gradient(z)
        return z + d, (d, k + 1)


# %% [markdown]
# What there is to know about it:
#
# - **`flat` is the problem of all tasks**, as functions of one tensor `[tasks, n]`: each row is the
#   inner variable of a task, laid out flat. `flat.gradient(z)` is $\partial_z G$,
#   [regularizer](../concepts/regularizer.md) included, and counts itself. There is no pytree and no
#   batch to handle.
# - **State is passed, not held.** It is a pytree of tensors whose first dimension is that of tasks;
#   a 0-d tensor is a counter, the same for all.
# - **You write no loop and no stop.** The base takes steps while a task is above `tol`, freezes
#   the tasks that are below, and decides the [status](../concepts/results.md#status) from the
#   residual where the solve ended.
# - **Out of place, please.** `z + d` makes a new tensor, `z += d` would change one that others
#   hold. Then the step can be differentiated, and `Unrolled` may use the solver. If yours cannot
#   be, say so by the class attribute `differentiable = False`, and `Unrolled` refuses it; if it
#   needs values of the objective, by `needs_objective = True`, and an
#   [equilibrium](../concepts/problems.md#structure) refuses it.
#
# ### Does it compute what it claims?
#
# A falling objective shows nothing: many wrong methods fall. The bound from above is sharp, and so
# a better test. `Quadratic` is a problem that is built from its answer, with curvatures from 1 to
# 100; three tasks here, each with data of its own.

# %%
from dataclasses import replace

from bilevel import solve_inner
from bilevel.problems import Quadratic

example = Quadratic.generated(n=60, condition=100.0, tasks=3)
setting = (example.problem, example.outer, example.task)
exact = solve_inner(*setting, inner_solver=example.inner_solver).inner  # by formula
start = torch.zeros_like(exact)  # where `Quadratic` begins


def distance(solver):
    """‖z − z*‖ / ‖z₀ − z*‖, the worst of the tasks."""
    found = solve_inner(*setting, inner_solver=solver).inner
    return ((found - exact).norm(dim=1) / (start - exact).norm(dim=1)).max().item()


solver = ChebyshevDescent(low=example.mu, high=example.lipschitz)
q = chebyshev_factor(example.mu, example.lipschitz)
print("steps   error     bound")
for steps in (1, 10, 30, 60):
    bound = 2 * q**steps / (1 + q ** (2 * steps))
    error = distance(replace(solver, max_steps=steps))
    assert error <= bound
    print(f"{steps:5}   {error:.1e}   {bound:.1e}")

# %% [markdown]
# Below the bound, and never far. Now the whole:
# [`check_hypergradient`][bilevel.check_hypergradient] compares the hypergradient with dense
# algebra, and that with finite differences. First with an implicit method, which does not care how
# the solution was found; then with `Unrolled`, which differentiates through every step and would
# notice one that breaks the graph.

# %%
from bilevel import check_hypergradient
from bilevel.solvers import ImplicitCG, Unrolled

for name, one, method in [
    ("implicit", replace(solver, max_steps=500, tol=1e-9), ImplicitCG(rtol=1e-9)),
    ("unrolled", replace(solver, max_steps=120), Unrolled()),
]:
    check = check_hypergradient(*setting, inner_solver=one, method=method)
    statuses = {status.name for status in check.status}
    print(f"{name}   ok: {check.ok}   below 1e-6: {check.error < 1e-6}   {statuses}")

# %% [markdown]
# And a setting that is wrong. Nobody told the solver that the curvature goes up to 100:

# %%
wrong = ChebyshevDescent(low=1.0, high=50.0, max_steps=100, tol=1e-9)
report = solve_inner(*setting, inner_solver=wrong)
print(*(status.name for status in report.status))

# %% [markdown]
# The first two tasks have smaller curvatures, up to about 5 and 22, and are solved; the third blows
# up and says so. None of this is written in `ChebyshevDescent`.
#
# ## A linear solver
#
# For a quadratic, minimising and solving are the same, so the same recurrence solves $Hv = b$, with
# the residual $b - Hv$ in place of minus the gradient. It needs no inner products between vectors,
# where conjugate gradients need two in each step: on many devices at once, an inner product is
# where all wait for each other.
#
# The one hook is `_solve`. It is given
#
# - `operator`, products with the matrices of all tasks: `operator(v)`, for `v` of `[tasks, n]`;
# - `rhs`, of norm 1 or exactly 0 for each task, so that tolerances are relative;
# - `start`, a first iterate or None.
#
# and returns a [`LinearSolution`][bilevel.LinearSolution]. You may write the whole of it. The
# built-in solvers write one cycle of their iteration alone, and leave to `solve_in_cycles` what is
# easily got wrong: a recurrence drifts away from the true residual, so its claim is checked, and
# where it does not hold, another cycle begins from the true residual.

# %%
from bilevel import LinearSolver, Structure
from bilevel.registry import LINEAR_SOLVERS
from bilevel.rows import Choice, column, dot
from bilevel.solvers.linear.cycles import check_settings, solve_in_cycles
from bilevel.solvers.linear.power import safe_step


@LINEAR_SOLVERS.register("chebyshev")
@dataclass(frozen=True)
class Chebyshev(LinearSolver):
    """Chebyshev iteration for positive definite systems with eigenvalues in a known interval.

    Args:
        max_steps: The most products with the matrix spent on iterating.
        rtol: Tolerance in ‖b − A v‖ / ‖b‖ of each task; 0 asks for ``max_steps`` steps only.
        condition: L / μ. Where it is too small, what lies below L / condition converges slower.
        high: L; None: 1.3 times what 12 steps of power iteration find, for each task.
    """

    needs = Structure.SYMMETRIC  # without annotation: no setting
    max_steps: int = 100
    rtol: float = 1e-5
    condition: float = 1e3
    high: float | None = None

    def __post_init__(self):
        check_settings(self.max_steps, self.rtol)
        if not 1 <= self.condition < math.inf:
            raise ValueError(f"`condition` is {self.condition}; it is finite and at least 1")
        if self.high is not None and not 0 < self.high < math.inf:
            raise ValueError(f"`high` is {self.high}; it is finite and > 0, or None")

    def _solve(self, operator, rhs, start):
        if self.high is None:
            high = 1.3 / (1.1 * safe_step(operator, rhs))  # [tasks]
        else:
            high = torch.full((len(rhs),), self.high, dtype=torch.float64, device=rhs.device)
        rate = column(2 / (high + high / self.condition), rhs)  # [tasks, 1]
        q = chebyshev_factor(1.0, self.condition)

        def cycle(progress):
            """Iterate from the residual ``progress.r`` until no task is active."""
            entered, first = progress.active, progress.rr
            d = torch.zeros_like(rhs)
            for k in progress.rounds():
                beta = momentum(rhs.new_tensor(k), q)
                d = beta * d + (1 + beta) * rate * progress.r
                product = operator(d)
                curvature = dot(d, product)
                progress.observe(curvature / dot(d, d))
                good = Choice(progress.demand_finite(curvature))
                progress.step(good, progress.x + d, progress.r - product)
                # A task that blows up is left alone before it overflows.
                progress.active = progress.active & (progress.rr < 1e8 * first)
            lowest, _ = progress.curvature
            progress.diverged = progress.diverged | (entered & (progress.rr > first))
            progress.indefinite = progress.indefinite | (entered & (lowest <= 0))

        return solve_in_cycles(
            cycle, operator, rhs, start, max_steps=self.max_steps, rtol=self.rtol
        )


# %% [markdown]
# - **`progress` holds where each task stands**: iterate `x`, residual `r`, its square `rr`, which
#   tasks are `active`. `progress.step` moves the active ones; the others stay where they are.
# - **`observe` reports Rayleigh quotients**, $d^\top H d / d^\top d$. They lie between the ends of
#   the spectrum, so a single negative one proves that $H$ is not positive definite. (They cost the
#   inner products that were to be saved; leave them out where that matters.)
# - **`needs` says what is asked of the matrix.** An equilibrium, whose Jacobian is not symmetric,
#   is refused before any work.
# - **Every setting has a default**, and `rtol` and `max_steps` have these names: so that other
#   parts can ask for "the same solver, but to $10^{-10}$".
#
# First alone, against a dense solve: three matrices at once, the right-hand side of one of
# them zero. Then what must *not* be claimed solved.

# %%
generator = torch.Generator().manual_seed(0)


def matrices(eigenvalues):
    basis, _ = torch.linalg.qr(
        torch.randn(len(eigenvalues), 40, 40, generator=generator, dtype=torch.float64)
    )
    return basis @ torch.diag_embed(eigenvalues) @ basis.mT


def product_with(matrix):
    return lambda v: (matrix @ v[..., None])[..., 0]


conditions = torch.tensor([2.0, 50.0, 900.0], dtype=torch.float64)
definite = matrices(torch.stack([torch.linspace(1, c, 40).double() for c in conditions]))
b = torch.randn(3, 40, generator=generator, dtype=torch.float64)
b[0] = 0
found = Chebyshev(max_steps=2000, rtol=1e-12)(product_with(definite), b)
error = (found.value - torch.linalg.solve(definite, b)).norm(dim=1) / b.norm(dim=1).clamp_min(1)
print("solved       ", bool((error < 1e-9).all()), found.status.tolist(), found.steps.tolist())

from bilevel import Status

cases = {
    "indefinite": matrices(torch.linspace(-1, 1, 40).double()[None]),
    "NaN": definite[:1] * float("nan"),
}
for name, matrix in cases.items():
    found = Chebyshev()(product_with(matrix), b[1:2])
    print(f"{name:13} {Status(found.status.item()).name}")
found = Chebyshev(high=300.0, condition=300.0)(product_with(definite[2:]), b[1:2])
print(f"{'high too low':13} {Status(found.status.item()).name}")

# %% [markdown]
# Then where it belongs: `Implicit` takes any linear solver. Both new parts together, on a logistic
# regression with a strength for each of ten weights, three tasks, which is not a quadratic. What is
# known about an `example` includes $\mu$ and $L$.

# %%
from bilevel.problems import Logistic
from bilevel.solvers import Implicit

logistic = Logistic.example(tasks=3)
check = check_hypergradient(
    logistic.problem,
    logistic.outer,
    logistic.task,
    inner_solver=ChebyshevDescent(logistic.mu, logistic.lipschitz, max_steps=500, tol=1e-10),
    method=Implicit(Chebyshev(max_steps=500, rtol=1e-10)),
)
print(f"ok: {check.ok}, below 1e-6: {check.error < 1e-6}")

from bilevel import StructureError, hypergradient
from bilevel.problems import Equilibrium

layer = Equilibrium.example()
try:
    hypergradient(
        layer.problem,
        layer.outer,
        layer.task,
        inner_solver=layer.inner_solver,
        method=Implicit(Chebyshev()),
    )
except StructureError as error:
    print(error)

# %% [markdown]
# ## Beside the others
#
# What is it worth? Here are pairs of an inner and a linear solver on the quadratic with 60 unknowns
# and condition numbers up to 100. The cost is counted in gradients and products, which are the same
# on any machine. ([`compare`][bilevel.compare.compare] makes such tables for a problem that has no
# formula.)

# %%
from bilevel.solvers import CG, LBFGS, GradientDescent, Richardson

low, high = example.mu, example.lipschitz
heavy = GradientDescent(
    lr=4 / (math.sqrt(low) + math.sqrt(high)) ** 2, momentum=q**2, max_steps=5000, tol=1e-5
)
inner = {
    "descent": GradientDescent(lr=2 / (low + high), max_steps=5000, tol=1e-5),
    "heavy ball": heavy,
    "Chebyshev": replace(solver, max_steps=5000, tol=1e-5),
    "L-BFGS": LBFGS(max_steps=500, tol=1e-5),
}
bounded = Chebyshev(max_steps=2000, rtol=1e-6, condition=high / low, high=high)
linear = {
    "Richardson": Richardson(max_steps=5000, rtol=1e-6, step=2 / (low + high)),
    "Chebyshev, L found": Chebyshev(max_steps=2000, rtol=1e-6),
    "Chebyshev": bounded,
    "CG": CG(max_steps=2000, rtol=1e-6),
}
pairs = [(one, "CG") for one in inner]
pairs += [("Chebyshev", one) for one in linear if one != "CG"]
print("inner        linear               gradients  products  error < 1e-5")
for one, other in pairs:
    result = hypergradient(*setting, inner_solver=inner[one], method=Implicit(linear[other]))
    assert result.ok, result.summary()
    gap = (result.gradient - example.gradient).norm() / example.gradient.norm()
    counts = result.diagnostics.counts
    print(
        f"{one:12} {other:18} {counts['gradients']:11}{counts['products']:10}  {gap.item() < 1e-5}"
    )

# %% [markdown]
# Counts are sums over three tasks, of condition numbers 5, 22 and 100. Chebyshev's momentum turns
# $\kappa$ into $\sqrt\kappa$. Against heavy ball it gains what the good beginning is worth.
# Conjugate gradients know no interval and find the best polynomial for *this* right-hand side and
# *this* spectrum, task by task; they need the fewest products. And of Chebyshev with the guessed
# interval, the price is the power iteration and an interval at least ten times wider than need be.
#
# One picture says the same step by step, for the hardest of the tasks.
#
# ![Two panels of error on a logarithmic axis. Left, distance to the inner solution against
# gradients: descent hardly falls, heavy ball falls along a steep line that bends at first,
# Chebyshev falls steeply from the start and lies on its dotted bound. Right, error of the
# hypergradient against products: Richardson hardly falls, Chebyshev with a guessed interval
# somewhat faster, with the true interval along a steep line, conjugate gradients steeper
# still](own_solver_error.png)

# %%
import matplotlib.pyplot as plt

INK, BLUE, ORANGE, GREEN, PURPLE = "#1e293b", "#2563eb", "#d97706", "#15803d", "#7c3aed"
hard = example.task.unstack()[2]
setting = (example.problem, example.outer, hard)
solution = example.problem.solution(example.outer, hard.inner_batch)
truth = example.problem.exact_hypergradient(example.outer, hard)
counts = range(1, 102, 10)


def inner_errors(one):
    errors = []
    for k in counts:
        z = solve_inner(*setting, inner_solver=replace(one, max_steps=k, tol=None)).inner
        errors.append(((z - solution).norm() / solution.norm()).item())
    return errors


def gradient_errors(one):
    """Against products, the inner problem being solved by formula."""
    products, errors = [], []
    for k in counts:
        result = hypergradient(
            *setting,
            inner_solver=example.inner_solver,
            method=Implicit(replace(one, max_steps=k, rtol=0.0)),
        )
        products.append(result.diagnostics.counts["products"])
        errors.append(((result.gradient - truth).norm() / truth.norm()).item())
    return products, errors


figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 4.0), layout="constrained")
for axes in (left, right):
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#94a3b8")
    axes.tick_params(colors="#475569")
    axes.set_yscale("log")
    axes.set_xlim(0, 104)
    axes.set_ylim(1e-10, 4)
bound = [2 * q**k / (1 + q ** (2 * k)) for k in counts]
for name, color in [("descent", ORANGE), ("heavy ball", PURPLE), ("Chebyshev", BLUE)]:
    left.plot(counts, inner_errors(inner[name]), color=color, lw=2, label=name)
left.plot(counts, bound, ":", color=INK, lw=1.6, label="Chebyshev's bound")
left.set_xlabel("gradients", color=INK)
left.set_title("distance to the inner solution", color=INK, fontsize=10.5, loc="left")
for name, color, style in [
    ("Richardson", ORANGE, "-"),
    ("Chebyshev, L found", BLUE, ":"),
    ("Chebyshev", BLUE, "-"),
    ("CG", GREEN, "-"),
]:
    right.plot(*gradient_errors(linear[name]), style, color=color, lw=2, label=name)
right.set_xlabel("products with the inner Hessian", color=INK)
right.set_title("error of the hypergradient", color=INK, fontsize=10.5, loc="left")
for axes in (left, right):
    axes.legend(frameon=False, fontsize=8.5, loc="lower left")
figure.savefig("own_solver_error.png", dpi=100)

# %% [markdown]
# ## Under its name
#
# The line `@LINEAR_SOLVERS.register("chebyshev")` gave the class a name. Whoever imports your
# module can build it by that name, and the command line, told of the file by
# `bilevel --import my_solver.py list`, shows it among the rest. Here the class is known already:

# %%
import contextlib
import io

from bilevel.cli.app import app

print(LINEAR_SOLVERS.build("chebyshev", rtol=1e-8))

with contextlib.redirect_stdout(io.StringIO()) as printed:
    app(["list"], standalone_mode=False)
for line in printed.getvalue().splitlines():
    if "chebyshev" in line:
        print(*line.split()[:2])

# %% [markdown]
# The tests know it, too. Every linear solver that is registered meets the suite in
# `tests/solvers/linear/test_registry_contract.py`. With your classes in `mine.py`, in a checkout of
# the library:
#
# ```bash
# PYTHONPATH=. pytest -p mine tests/solvers/linear/test_registry_contract.py -k chebyshev
# ```
#
# It asks for more than this page did: agreement with dense solves in both precisions; a batch that
# is solved as its tasks alone would be; right-hand sides that are zero, NaN or of size
# $10^{\pm 30}$; a start at the solution, which takes no step; a spent budget with the true
# residual; and matrices without a solution, which are never claimed solved. `Chebyshev` as it
# stands here passes. An inner solver has its test beside it, such as the bound from above and a run
# under `Unrolled`.
#
# - [`InnerSolver`, `LinearSolver`](../api/own.md): the reference of all hooks.
# - [Inner solvers](../concepts/inner-solvers.md) and [linear
#   solvers](../concepts/linear-solvers.md): the built-in ones, and when to use which.
# - [Write your own method](own_method.md), where the idea is not in a solve.
