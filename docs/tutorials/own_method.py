# %% [markdown]
# # Write your own method
#
# A [hypergradient method](../concepts/hypergradients.md) turns a solved inner problem into a
# hypergradient. Papers propose new ones all the time, and you may have one in mind. If it plugs in
# here, then the checks, the comparison, the trainer and the stacking of tasks are there already,
# and the method can be held against all others on the same problem.
#
# There are two ways in:
#
# - **Your idea is a way to solve $Hv = \partial_z f$.** Subclass `ImplicitMethod` and name the
#   linear solver. That takes ten lines, most of them settings.
# - **Your idea is something else.** Subclass `HypergradientMethod` and compute. This page writes
#   the method of DARTS (Liu, Simonyan and Yang, 2019,
#   [arXiv:1806.09055](https://arxiv.org/abs/1806.09055)), which takes no second
#   derivative, and shows what to test a method against that is *meant* to be off.
#
# ## A problem to try it on
#
# Logistic regression on sixty rows, a third of them with the wrong label. The outer variable $x$
# holds a number for each row, whose sigmoid is the row's weight in the fit; the weights should make
# the fit do well on clean rows. Every derivative can be written out densely at this size.

# %%
import torch

from bilevel import Task, problem_from, solve_inner
from bilevel.solvers import HessianFree

generator = torch.Generator().manual_seed(0)
features = torch.randn(160, 20, generator=generator, dtype=torch.float64)
features = features * torch.logspace(0.3, -0.5, 20, dtype=torch.float64)
labels = (features.sum(1) > 0).double() * 2 - 1
labels[:20] *= -1  # wrong ones, among the sixty to train on
task = Task(
    inner_batch=(features[:60], labels[:60]),
    outer_batch=(features[60:], labels[60:]),
)


def losses(z, batch):
    rows, signs = batch
    return torch.nn.functional.softplus(-signs * (rows @ z))


def cleaning(strength):
    def inner_objective(z, x, batch):
        return (x.sigmoid() * losses(z, batch)).mean() + strength / 2 * (z**2).sum()

    return problem_from(
        inner_objective,
        lambda z, x, batch: losses(z, batch).mean(),
        initial_inner=lambda x, batch: x.new_zeros(20),
    )


problem = cleaning(0.1)
x = torch.zeros(60, dtype=torch.float64)
solution = solve_inner(problem, x, task, inner_solver=HessianFree(tol=1e-11)).inner

# %% [markdown]
# ## The easy way: name a linear solver
#
# By the implicit function theorem the hypergradient is
#
# $$
# \frac{dF}{dx} = \partial_x f - (\partial_x \partial_z g)^\top v
# \qquad\text{with}\qquad H v = \partial_z f ,
# $$
#
# with $H$ the inner Hessian. An [`ImplicitMethod`][bilevel.ImplicitMethod] does all of it except
# the solve. Here is one that uses conjugate gradients with a Nyström preconditioner, under settings
# of its own:

# %%
from dataclasses import dataclass

from bilevel import ImplicitMethod
from bilevel.registry import METHODS
from bilevel.solvers import CG, NystromPreconditioner


@METHODS.register("nystrom-cg")
@dataclass(frozen=True)
class ImplicitNystromCG(ImplicitMethod):
    """Implicit differentiation by conjugate gradients, preconditioned from a few probes.

    Args:
        rank: Probes of the preconditioner, one product each.
        max_steps: The most CG steps.
        rtol: Tolerance relative to each task's ‖∂_z f‖.
    """

    rank: int = 8
    max_steps: int = 100
    rtol: float = 1e-5

    def _linear_solver(self):
        return CG(self.max_steps, self.rtol, NystromPreconditioner(self.rank))


# %% [markdown]
# Settings are checked by the solver, which the base builds once as soon as the method is made; what
# the solver needs of the matrix is compared with what the problem promises before any work. And
# `damping`, `correct`, `error_estimate` and the other
# [questions that an implicit method can be asked](../concepts/trust.md) came with the base.

# %%
from bilevel import check_hypergradient

check = check_hypergradient(
    problem, x, task, inner_solver=HessianFree(tol=1e-10), method=ImplicitNystromCG(), rtol=1e-4
)
print("ok:", check.ok)

hasty = ImplicitNystromCG(rtol=0.1, error_estimate=True)
check = check_hypergradient(
    problem, x, task, inner_solver=HessianFree(tol=1e-10), method=hasty, rtol=1e-4
)
estimate = check.result.diagnostics.error_estimate.item()
print(f"with rtol 0.1: error {check.error:.1e}, and the method's own estimate {estimate:.1e}")

try:
    ImplicitNystromCG(rank=0)
except ValueError as error:
    print(error)

# %% [markdown]
# If you need the solver once and no name for it, write no class:
# `Implicit(CG(preconditioner=NystromPreconditioner(8)))` is the same method. And if the new idea is
# the linear solver itself, [write that](own_solver.md), and hand it to `Implicit`.
#
# ## A method with its own formula
#
# DARTS looks for the architecture of a network by its validation loss. Solving the inner problem at
# every step is too dear for that, and so is a Hessian. So it does two things.
#
# **It looks one step ahead.** Let $w$ be where the inner solver ended. Take one more step of
# gradient descent at the rate $\xi$, and differentiate *that step*, as if $w$ were a constant:
#
# $$
# z(x) = w - \xi\, \partial_z g(x, w),
# $$
#
# $$
# \frac{d}{dx} f(x, z(x)) =
# \partial_x f - \xi\, (\partial_x \partial_z g)^\top b
# \qquad\text{with}\qquad b = \partial_z f(x, z) .
# $$
#
# **It takes the mixed product by differences.** The product is the derivative of $\partial_x g$ in
# the direction $b$, so two more first derivatives will do:
#
# $$
# (\partial_x \partial_z g)^\top b \approx
# \frac{\partial_x g(x, w + \varepsilon b) - \partial_x g(x, w - \varepsilon b)}{2 \varepsilon}
# \qquad\text{with}\qquad \varepsilon = \frac{0.01}{\|b\|} .
# $$
#
# Set beside the formula above, $\xi b$ stands where the adjoint $v = H^{-1} b$ should be. At the
# inner solution, where $z = w$, that is off by
#
# $$
# \xi b - v = -(I - \xi H)\, v
# \qquad\text{so that}\qquad
# \frac{\|\xi b - v\|}{\|v\|} \le \rho = \|I - \xi H\| .
# $$
#
# $\rho$ is the factor by which one step of gradient descent contracts the distance to the solution.
# The method is good where a *single* step nearly solves the inner problem, and biased elsewhere,
# however long you solve. Without the differences this is *one-step differentiation*, which Bolte,
# Pauwels and Vaiter (2023, [arXiv:2305.13768](https://arxiv.org/abs/2305.13768)) analyse for any
# iteration; the library has it as `Unrolled(truncate=1)`.
#
# ## Written down
#
# The one hook is `_compute`. It gets the problem as `flat`, functions of a single tensor
# `[tasks, n]`: one row for each task, with the inner variable of the task laid out flat. It never
# sees a pytree, a regularizer or a batch, and so the method works with all of them. It returns an
# [`Estimate`][bilevel.Estimate].

# %%
import math
from dataclasses import replace

from bilevel import Estimate, HypergradientMethod, StructureError
from bilevel.inner_solver import given_solution
from bilevel.linearised import outer_at
from bilevel.point import add
from bilevel.rows import column, norm


@METHODS.register("darts")
@dataclass(frozen=True)
class DARTS(HypergradientMethod):
    """One step ahead, its mixed product by differences (DARTS). Biased.

    dF/dx ≈ ∂ₓf − ξ (∂ₓg(x, w + εb) − ∂ₓg(x, w − εb)) / 2ε, with w where the inner solver ended,
    z = w − ξ ∂_z g(x, w), f and b = ∂_z f at z, and ε = reach / ‖b‖.

    Args:
        rate: ξ > 0.
        reach: How far from w the differences are taken, > 0.
    """

    rate: float = 0.025
    reach: float = 0.01

    def __post_init__(self):
        for name in ("rate", "reach"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` is {value}; it is finite and > 0")

    def check(self, flat):
        if flat.problem.is_equilibrium:
            raise StructureError(
                "DARTS differentiates the inner objective, but this problem is an equilibrium "
                "without one; use an implicit method such as Implicit(GMRES())"
            )

    def _compute(self, flat, inner_solver, weights, start):
        # 1. The inner point, and the step ahead. None of this has a graph.
        carry = None if inner_solver is None else inner_solver.solve(flat, start.inner)
        w = flat.start if carry is None else carry.z
        z = w - self.rate * flat.gradient(w)
        inner_value, slope = flat.value_and_gradient(z)
        if carry is None:
            report = given_solution(z, norm(slope))
        else:
            first = flat.notes.get("first_residual")
            report = inner_solver.report(replace(carry, z=z), norm(slope), first)

        # 2. The outer objective there, with a graph that leads to the outer variable.
        graph = flat.with_outer(flat.outer.differentiable(), differentiable=True)
        outer_value, metrics, b = outer_at(graph, z)

        # 3. The inner objective on both sides of w, and its derivative in x alone.
        size = norm(b)
        epsilon = self.reach / torch.where(size > 0, size, 1.0)
        with torch.enable_grad():
            ahead = graph.value(w + column(epsilon, b) * b)
            behind = graph.value(w - column(epsilon, b) * b)
            difference = ahead - behind
        flat.counts["gradients"] += 2 * flat.count

        # 4. Both parts, one tensor for each leaf of x, or None where nothing depends on it.
        through = derivative(difference, graph, -self.rate * weights / (2 * epsilon))
        return Estimate(
            add(derivative(outer_value, graph, weights), through),
            z,
            inner_value,
            outer_value.detach(),
            report,
            inner_depends=any(leaf is not None for leaf in through),
            metrics=metrics,
        )


def derivative(values, graph, weights):
    """Σ weightsᵢ ∂ₓ valuesᵢ over tasks, leaf by leaf."""
    leaves = graph.outer.leaves
    if not values.requires_grad:
        return (None,) * len(leaves)
    return torch.autograd.grad(values, leaves, weights.to(values.dtype), allow_unused=True)


# %% [markdown]
# Some of it is worth a second look:
#
# - **`flat` and `graph` are the same problem**, once without a graph and once with one.
#   `flat.gradient` and `flat.value` are $\partial_z g$ and $g$, the
#   [regularizer](../concepts/regularizer.md) included; `outer_at` gives $f$ and $\partial_z f$.
# - **Everything is `[tasks, …]`.** There is a separate $\varepsilon$ for each task. The caller's
#   `weights` make the mean over tasks, or leave a failed task out; where gradients of single tasks
#   are asked for, each has a copy of $x$, and the same lines give one gradient for each.
# - **The report is judged by a residual**, $\|\partial_z g\|$ at the point that is returned. A
#   method does not decide whether the solve was good: `inner_solver.report` does, and what comes
#   out is the [status](../concepts/results.md#status).
# - **Costs are counted.** `flat.gradient` counts itself; the two derivatives in $x$ are counted by
#   hand, as gradients.
# - **It refuses what it cannot do**, in `check`, before any work: an
#   [equilibrium](../concepts/problems.md#structure) has no inner objective to difference.
#
# `Estimate` and the two bases are in the [reference](../api/own.md). The helpers that are imported
# from modules of the package (`outer_at`, `norm`) are what the built-in methods use; plain PyTorch
# does in their place.
#
# ## First test: its own formula
#
# The method is biased by design, so comparing it with the exact hypergradient proves nothing: a
# slip in the code would look like bias. What it must meet is the formula that it claims. At this
# size that takes a few lines of dense algebra that share nothing with the class.

# %%
from torch.func import grad, jacrev

from bilevel import hypergradient
from bilevel.solvers import GradientDescent


def dense_formula(problem, w, rate):
    """∂ₓf − ξ Mᵀ b with the whole mixed Jacobian M = ∂ₓ∂_z g, [20, 60]."""
    slope = grad(problem.inner_objective)
    mixed = jacrev(slope, argnums=1)(w, x, task.inner_batch)
    z = w - rate * slope(w, x, task.inner_batch)
    b, direct = grad(problem.outer_objective, argnums=(0, 1))(z, x, task.outer_batch)
    return direct - rate * mixed.T @ b


def hessian(problem, z):
    return jacrev(grad(problem.inner_objective))(z, x, task.inner_batch)


def gap(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


eigenvalues = torch.linalg.eigvalsh(hessian(problem, solution))
rate = 1 / eigenvalues[-1].item()
few = GradientDescent(lr=rate, max_steps=5)  # far from solved, on purpose
w = solve_inner(problem, x, task, inner_solver=few).inner
formula = dense_formula(problem, w, rate)
print("reach   off its formula by")
for reach in (1.0, 0.1, 0.01):
    result = hypergradient(problem, x, task, inner_solver=few, method=DARTS(rate=rate, reach=reach))
    print(f"{reach:<7} {gap(result.gradient, formula):.1e}")

# %% [markdown]
# A reach ten times smaller, an error a hundred times smaller: central differences are of second
# order, and so the gap is theirs and not a slip. A wrong sign or a forgotten factor would leave a
# gap that does not move.
#
# A second witness is in the library. Five steps and one step ahead end where six steps of gradient
# descent end, and of those `Unrolled(truncate=1)` differentiates the last:

# %%
from bilevel.solvers import Unrolled

six = replace(few, max_steps=6)
one_step = hypergradient(problem, x, task, inner_solver=six, method=Unrolled(truncate=1))
close = hypergradient(problem, x, task, inner_solver=few, method=DARTS(rate=rate, reach=1e-3))
print("the same point:", torch.allclose(one_step.inner, close.inner, rtol=1e-12))
print("the same gradient to 1e-6:", gap(close.gradient, one_step.gradient) < 1e-6)

# %% [markdown]
# ## Second test: the truth
#
# Now the bias may show. [`check_hypergradient`][bilevel.check_hypergradient] knows the
# hypergradient of the *solved* problem, and has a method measured against it.

# %%
solved = HessianFree(tol=1e-10)
check = check_hypergradient(
    problem, x, task, inner_solver=solved, method=DARTS(rate=rate), rtol=1e-4
)
rho = 1 - rate * eigenvalues[0].item()
print(f"contraction factor {rho:.2f}")
print(f"off by {check.error:.2f}, cosine {check.leaves[0].cosine:.2f}, ok: {check.ok}")

# %% [markdown]
# The length is far off, the direction less so. The inner problem is solved to ten digits, so
# solving it further would not help. The contraction factor says what would: a better conditioned
# inner problem, here by a stronger penalty. Below, the strength goes from 0.01 to 32,
# and the rate is always $1/L$, so that $\rho = 1 - \mu/L$.

# %%
from bilevel.solvers import DenseExact, NeumannSeries

curves = {"DARTS": [], "one step": [], "5 terms": [], "25 terms": []}
factors = []
print("strength  factor  adjoint off by  gradient off by")
for strength in torch.logspace(-2, 1.5, 10, dtype=torch.float64).tolist():
    harder = cleaning(strength)
    at = solve_inner(harder, x, task, inner_solver=HessianFree(tol=1e-12)).inner

    def gradient_by(method, solver=None, harder=harder, at=at):
        return hypergradient(harder, x, task, inner_solver=solver, inner=at, method=method).gradient

    matrix = hessian(harder, at)
    b = grad(harder.outer_objective)(at, x, task.outer_batch)
    v = torch.linalg.solve(matrix, b)
    ends = torch.linalg.eigvalsh(matrix)
    step = 1 / ends[-1].item()
    exact = gradient_by(DenseExact())
    found = {
        "DARTS": gradient_by(DARTS(rate=step)),
        "one step": gradient_by(Unrolled(), GradientDescent(lr=step, max_steps=1)),
        "5 terms": gradient_by(NeumannSeries(terms=5, scale=step)),
        "25 terms": gradient_by(NeumannSeries(terms=25, scale=step)),
    }
    factors.append(1 - step * ends[0].item())
    for name, one in found.items():
        curves[name].append(gap(one, exact))
    assert gap(step * b, v) <= factors[-1]
    if len(factors) % 3 == 1:
        off = f"{gap(step * b, v):10.2f} {curves['DARTS'][-1]:16.2f}"
        print(f"{strength:7.2f} {factors[-1]:8.2f} {off}")

# %% [markdown]
# The adjoint keeps to its bound at every strength (the script asserts it), and the gradient goes
# with it.
#
# ![Left: error against contraction factor; the error of DARTS falls with the factor, rings of
# one-step differentiation lie on it, Neumann series of 5 and 25 terms fall away much faster.
# Right: error of the differences against their reach, a valley in float64 and a shallower one in
# float32; the reach of DARTS, 0.01, is marked](own_method_error.png)
#
# Left: DARTS and one-step differentiation are the same thing here, and both are a Neumann series of
# one term. Each further term multiplies the error by about $\rho$ and costs one product, which is
# the trade that DARTS declines. Right: what the differences add. Truncation grows to the right,
# rounding to the left; the published reach of 0.01 is well chosen for float32, which is what
# networks are trained in.

# %%
import matplotlib.pyplot as plt

reaches = torch.logspace(-7, 1, 17, dtype=torch.float64).tolist()
valley = {}
single = Task(
    inner_batch=tuple(one.float() for one in task.inner_batch),
    outer_batch=tuple(one.float() for one in task.outer_batch),
)
wanted = dense_formula(problem, solution, rate)
for dtype, data in [(torch.float64, task), (torch.float32, single)]:
    valley[dtype] = [
        gap(
            hypergradient(
                problem,
                x.to(dtype),
                data,
                inner_solver=None,
                inner=solution.to(dtype),
                method=DARTS(rate=rate, reach=reach),
            ).gradient.double(),
            wanted,
        )
        for reach in reaches
    ]

INK, BLUE, ORANGE, GREEN, PURPLE, GREY = (
    *("#1e293b", "#2563eb", "#d97706", "#15803d", "#7c3aed", "#64748b"),
)
figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.9), layout="constrained")
for axes in (left, right):
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#94a3b8")
    axes.tick_params(colors="#475569")
    axes.set_yscale("log")
    axes.minorticks_off()
left.plot(factors, factors, "--", color=GREY, lw=1.4)
left.plot(factors, curves["DARTS"], "o-", color=BLUE, ms=5, lw=1.6)
left.plot(factors, curves["one step"], "o", color=ORANGE, ms=10, mfc="none", mew=1.5)
left.plot(factors, curves["5 terms"], "s-", color=GREEN, ms=4.5, lw=1.4)
left.plot(factors, curves["25 terms"], "^-", color=PURPLE, ms=4.5, lw=1.4)
left.set_ylim(1e-9, 9)
left.set_xlabel("contraction factor ρ of one inner step", color=INK)
left.set_title("error of the hypergradient", color=INK, fontsize=10.5, loc="left")
left.text(0.02, 2.2, "ρ, the bound for the adjoint", color=GREY)
left.text(0.13, 2.2e-3, "DARTS,\none step (rings)", color=BLUE)
left.text(0.27, 4e-6, "Neumann,\n5 terms", color=GREEN)
left.text(0.7, 1e-7, "Neumann,\n25 terms", color=PURPLE)
right.axvline(0.01, color=GREY, lw=1.4, ls="--")
right.text(0.014, 6e-10, "reach of\nDARTS", color=GREY)
right.plot(reaches, valley[torch.float64], "o-", color=BLUE, ms=4, lw=1.5)
right.plot(reaches, valley[torch.float32], "o-", color=ORANGE, ms=4, lw=1.5)
right.text(1.2e-4, 1.2e-10, "float64", color=BLUE)
right.text(1e-5, 1e-2, "float32", color=ORANGE)
right.set_xscale("log")
right.minorticks_off()
right.set_xlabel("reach of the differences", color=INK)
right.set_title("distance from its own formula", color=INK, fontsize=10.5, loc="left")
figure.savefig("own_method_error.png", dpi=100)

# %% [markdown]
# ## Beside the others
#
# [`compare`][bilevel.compare.compare] takes your methods with the built-in ones. The cost is in
# gradients and products, on any machine the same.

# %%
from bilevel import compare
from bilevel.solvers import FirstOrder, ImplicitCG

descent = GradientDescent(lr=rate, max_steps=200, tol=1e-7)
comparison = compare(
    problem,
    x,
    task,
    {
        "DARTS": DARTS(rate=rate),
        "Nyström CG": ImplicitNystromCG(),
        "Nyström CG, Newton": (ImplicitNystromCG(), HessianFree()),
        "CG": ImplicitCG(),
        "CG, loose": ImplicitCG(rtol=0.1),
        "Neumann, 5 terms": NeumannSeries(terms=5, scale=rate),
        "last step": Unrolled(truncate=1),
        "first-order": FirstOrder(),
    },
    inner_solver=descent,
    accuracy=1e-3,
    repeats=1,
    memory=False,
)
for one in sorted(comparison.results, key=lambda one: (one.cost, one.name)):
    if one.error is None:
        print(f"{one.name:20} {one.note.split(':')[0]}")
        continue
    mark = "→" if one is comparison.recommendation else " "
    print(f"{mark} {one.name:20} error {one.error:.1e}   cost {one.cost}")

# %% [markdown]
# What the method is good for, and what not, can be read off. On a solved inner problem, which has
# already cost its gradients, a few products more buy several digits, and DARTS saves nothing that
# matters; its error is that of one-step differentiation, "last step". It was made for the other
# case: an inner problem that is never solved, at one step of the inner solver for each step of the
# outer one. The first-order method has no row of numbers, since the start of this fit does not
# depend on $x$: it would answer zero, and refuses. The preconditioner does not earn its eight
# probes here, where plain CG takes about as few steps; the time to use it is a system with a few
# large eigenvalues.
#
# ## What the contract asks
#
# Inside the library a registered method is tested by a suite,
# `tests/test_contract.py`, against every registered problem. It asks:
#
# | | An exact method | A biased one |
# |---|---|---|
# | On every problem, one task and three | agrees with dense float64 algebra, which agrees with finite differences; in float64 and float32 | meets its own formula, task by task: a test that you write beside that of `FirstOrder` |
# | Settings | a line in `exact_settings`: those under which it is exact, and an inner solver | its name in `BIASED`, and a default for every setting |
# | Structure that it needs and a problem lacks | `StructureError` | the same |
# | Condition number up to $10^4$, as far as it promises | the same tolerance, in a row of its own | |
# | A strength and a center that are learned | the same | |
#
# Here is its heart for `DARTS`, and you can run the like in your own project. The formula again
# has a witness: one step of gradient descent from the same point, unrolled.

# %%
import warnings

import bilevel.problems  # noqa: F401  # registers them
from bilevel import BilevelWarning, DependenceError
from bilevel.pytree import tree_leaves
from bilevel.registry import PROBLEMS


def meets_its_formula(example):
    """DARTS, one gradient for each task, against one unrolled step from the same point."""
    here = (example.problem, example.outer, example.task)
    at = solve_inner(*here, inner_solver=example.inner_solver).inner
    step = GradientDescent(lr=0.025, max_steps=1)
    found, wanted = (
        hypergradient(*here, inner_solver=solver, inner=at, method=method, reduction="none")
        for solver, method in [(None, DARTS(reach=1e-4)), (step, Unrolled())]
    )
    return gap(flattened(found.gradient), flattened(wanted.gradient)) < 1e-6


def flattened(gradient):
    """All leaves side by side, ``[tasks, …]``: the gradient of a single one may be zero."""
    return torch.cat([leaf.flatten(1) for leaf in tree_leaves(gradient)], dim=1)


for name in PROBLEMS:
    if name in ("network-design", "road-tolls"):
        continue  # they meet it, too, but take their time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BilevelWarning)
            met = meets_its_formula(PROBLEMS[name].example(tasks=3))
        verdict = "meets its formula" if met else "DOES NOT MEET IT"
    except (StructureError, DependenceError) as error:
        verdict = f"refused, {type(error).__name__}"
    print(f"{name:17}{verdict}")

# %% [markdown]
# The two equilibria without an objective are refused, as `check` says. All others are met,
# with regularizers, networks and normalisation in them, although the method was written with none
# of them in mind.
#
# A method that passes goes into a file of its own in `solvers/hypergradient/`, with its equation
# and its source at the top, and from then on stands in every comparison.
#
# - [Hypergradient methods](../concepts/hypergradients.md): the built-in ones, and when to use
#   which.
# - [Checking a hypergradient](../concepts/checking.md), of any method.
# - [Write your own solver](own_solver.md): an inner or a linear one.
