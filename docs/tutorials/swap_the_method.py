# %% [markdown]
# # Swap the method
#
# There are several ways to a hypergradient. They differ in what they cost and in how far off they
# are, and none is best everywhere. In this library a way is one argument, `method=`, so that you
# can try them all on *your* problem. This page does it on one problem whose exact answer is known,
# and then looks at why the numbers are what they are.
#
# New to the words? Start with [Your first bilevel problem](first_problem.md).
#
# ## One problem
#
# Forty rows, sixty features: too little to fit sixty weights. So the fit is pulled towards weights
# $x$ that are known from elsewhere, and the question is how $x$ should have been chosen for the
# fitted weights $z^\star(x)$ to do well on other rows:
#
# $$
# z^\star(x) = \arg\min_z\; \tfrac1N \|A z - b\|^2 + \tfrac{s}{2} \|z - x\|^2 .
# $$
#
# The pull is a [proximal regularizer](../concepts/regularizer.md) of strength $s$; its center is
# $x$, and the inner solver starts there. With a network in place of $A$, this is
# [iMAML](../concepts/imaml.md).

# %%
import torch

from bilevel import Proximal, Task, hypergradient, problem_from

generator = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


scales = torch.logspace(0, -1, 60, dtype=torch.float64)  # features of different size
true_weights = randn(60)
rows = randn(120, 60) * scales
targets = rows @ true_weights + 0.3 * randn(120)
task = Task(inner_batch=(rows[:40], targets[:40]), outer_batch=(rows[40:], targets[40:]))
x = true_weights + 0.5 * randn(60)


def error(weights, outer, batch):
    features, targets = batch
    return ((features @ weights - targets) ** 2).mean()


strength = 0.2
problem = problem_from(error, error, regularizer=Proximal(strength))

# %% [markdown]
# Everything below is governed by the extreme eigenvalues $\mu$ and $L$ of the inner Hessian $H$ and
# their ratio, the condition number $\kappa = L / \mu$. Here they can be computed.

# %%
hessian = 2 * rows[:40].mT @ rows[:40] / 40 + strength * torch.eye(60, dtype=torch.float64)
eigenvalues = torch.linalg.eigvalsh(hessian)
mu, largest = eigenvalues[0].item(), eigenvalues[-1].item()
print(f"eigenvalues {mu:.2f} to {largest:.2f}, condition {largest / mu:.1f}")

# %% [markdown]
# ## Six methods
#
# All of them get the same inner solver: gradient descent at the rate $1/L$, until the gradient is
# below $10^{-8}$. The reference is dense algebra at an inner solution that is exact to rounding.

# %%
from bilevel import solve_inner
from bilevel.solvers import (
    MINRES,
    DenseExact,
    FirstOrder,
    GradientDescent,
    HessianFree,
    Implicit,
    ImplicitCG,
    NeumannSeries,
    NormalCG,
    Unrolled,
)

solver = GradientDescent(lr=1 / largest, max_steps=400, tol=1e-8)
solution = solve_inner(problem, x, task, inner_solver=HessianFree(tol=1e-12)).inner
exact = hypergradient(
    problem, x, task, inner=solution, inner_solver=None, method=DenseExact()
).gradient


def off_by(gradient):
    return ((gradient - exact).norm() / exact.norm()).item()


methods = {
    "ImplicitCG, loose": ImplicitCG(rtol=0.1),
    "ImplicitCG": ImplicitCG(),
    "Neumann, 10 terms": NeumannSeries(terms=10, scale=1 / largest),
    "Neumann, 100 terms": NeumannSeries(terms=100, scale=1 / largest),
    "Unrolled": Unrolled(),
    "Unrolled, last 10": Unrolled(truncate=10),
    "Unrolled, last 100": Unrolled(truncate=100),
    "FirstOrder": FirstOrder(),
    "DenseExact": DenseExact(),
    "Implicit, MINRES": Implicit(MINRES()),
    "Implicit, NormalCG": Implicit(NormalCG()),
}
found = {}
print("method                     error  gradients  products  status")
for name, method in methods.items():
    result = hypergradient(problem, x, task, inner_solver=solver, method=method)
    far, counts = off_by(result.gradient), result.diagnostics.counts
    found[name] = (far, counts.get("products", 0))
    shown = "below 1e-6" if far < 1e-6 else f"{far:.1e}"
    print(
        f"{name:20} {shown:>11} {counts['gradients']:10} {found[name][1]:9}"
        f"  {result.status[0].name}"
    )

# %% [markdown]
# *Gradients* are those of the inner objective, *products* are $H$ times a vector, each of which
# costs as much as one or two gradients. Counts are the same on every machine.
#
# - **`ImplicitCG`** solves $Hv = \partial_z f$ by conjugate gradients, to the tolerance that you
#   ask for. Twenty products here; seven, if 5 % are good enough.
# - **`NeumannSeries`** adds up $v \approx a \sum_{j<K} (I - aH)^j\, \partial_z f$. It is as short
#   to write, and needs many more products for the same accuracy.
# - **`Unrolled`** differentiates through the steps of gradient descent. It is exact for what was
#   run, takes a product for every step, and keeps them all in memory. It takes every permitted
#   step, since the derivative needs them even where the point does not.
# - **`Unrolled(truncate=10)`** differentiates the last ten steps only. Compare its error with that
#   of the Neumann series of ten terms, and 100 with 100: they are the same, since at the solution
#   the two are the same sum (Lorraine et al., 2020,
#   [arXiv:1911.02590](https://arxiv.org/abs/1911.02590)). Its status is `MAX_STEPS`: the point has
#   converged, the derivative has not.
# - **`FirstOrder`** takes no product at all: it treats the inner steps as if they passed every
#   change of $x$ on as it is (FOMAML; Finn et al., 2017,
#   [arXiv:1703.03400](https://arxiv.org/abs/1703.03400)). Its length is off by more than the
#   gradient itself; what is left is a direction.
# - **`DenseExact`** builds $H$, from one product for each of the 60 weights, and factorises it.
# - **`Implicit(...)`** takes [any linear solver](../concepts/linear-solvers.md): `MINRES` is the
#   one for symmetric matrices with negative eigenvalues; `NormalCG` solves
#   $H^\top H v = H^\top \partial_z f$, which is safe for any matrix and squares the condition
#   number, as its products show.

# %%
direction = hypergradient(problem, x, task, inner_solver=solver, method=FirstOrder()).gradient
cosine = torch.nn.functional.cosine_similarity(direction, exact, dim=0).item()
print(f"cosine between FirstOrder and the hypergradient {cosine:.2f}")

# %% [markdown]
# ![Error against Hessian products on logarithmic axes: first-order far up at no products; Neumann
# series and truncated unrolling fall slowly along one line; conjugate gradients are far below at 7
# and 20 products](swap_the_method_cost.png)

# %%
import matplotlib.pyplot as plt

INK, BLUE, ORANGE, GREEN, PURPLE, RED, GREY = (
    *("#1e293b", "#2563eb", "#d97706", "#15803d", "#7c3aed", "#be123c", "#64748b"),
)


def axes_for(figure, columns=1):
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        axes.grid(color="#e2e8f0", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#94a3b8")
        axes.tick_params(colors="#475569")
        axes.set_yscale("log")
        axes.minorticks_off()
    return panels


figure = plt.figure(figsize=(8, 4.2), layout="constrained")
(axes,) = axes_for(figure)
colors = {"Imp": BLUE, "Neu": ORANGE, "Unr": GREEN, "Fir": RED, "Den": GREY}
for name, (far, products) in found.items():
    color, ring = colors[name[:3]], name.startswith("Unrolled, last")
    axes.plot(
        products,
        max(far, 1e-8),
        "o",
        color=color,
        ms=12 if ring else 8,
        mfc="none" if ring else color,
        mew=1.8,
    )
labels = {
    "ImplicitCG, loose": (9, 3, "left"),
    "ImplicitCG": (-9, -5, "right"),
    "Neumann, 10 terms": (-10, -16, "right"),
    "Neumann, 100 terms": (-10, -14, "right"),
    "Unrolled": (-9, 6, "right"),
    "Unrolled, last 10": (10, 2, "left"),
    "Unrolled, last 100": (10, 2, "left"),
    "FirstOrder": (11, -3, "left"),
    "DenseExact": (-9, -3, "right"),
    "Implicit, MINRES": (9, 4, "left"),
    "Implicit, NormalCG": (9, -3, "left"),
}
for name, (right, up, side) in labels.items():
    far, products = found[name]
    axes.annotate(
        name,
        (products, max(far, 1e-8)),
        (right, up),
        textcoords="offset points",
        color=colors[name[:3]],
        ha=side,
    )
axes.set_xscale("symlog", linthresh=4)
axes.set_xlim(-0.4, 620)
axes.minorticks_off()
axes.set_xticks([0, 1, 2, 3, 4, 10, 20, 50, 100, 200, 400])
axes.set_xticklabels(["0", "1", "2", "3", "4", "10", "20", "50", "100", "200", "400"])
axes.set_yticks([1, 1e-2, 1e-4, 1e-6, 1e-8], ["1", "1e-2", "1e-4", "1e-6", "below\n1e-8"])
axes.set_xlabel("products with the inner Hessian, beside the inner solve", color=INK)
axes.set_title("relative error of the hypergradient", color=INK, fontsize=10.5, loc="left")
figure.savefig("swap_the_method_cost.png", dpi=120)

# %% [markdown]
# ## Why: two rates
#
# How fast should the error fall? For conjugate gradients with $k$ steps, and for the Neumann series
# of $K$ terms with $a = 1/L$, there are bounds ([more of them](../concepts/linear-solvers.md)):
#
# $$
# \frac{\|v_k - v\|}{\|v\|} \le
# 2\sqrt\kappa \left(\frac{\sqrt\kappa - 1}{\sqrt\kappa + 1}\right)^{k}
# \qquad\text{and}\qquad
# \frac{\|v_K - v\|}{\|v\|} \le \left(1 - \frac1\kappa\right)^{K} .
# $$
#
# One depends on $\sqrt\kappa$, the other on $\kappa$. In this problem $x$ enters only as the
# center, the hypergradient is $s\,v$, and so its error is that of $v$. To see nothing else, the
# inner solution is passed in, with no inner solver.


# %%
def at_the_solution(method):
    result = hypergradient(problem, x, task, inner=solution, inner_solver=None, method=method)
    return off_by(result.gradient)


def unrolled_from_the_solution(steps):
    few = GradientDescent(lr=1 / largest, max_steps=steps)
    result = hypergradient(problem, x, task, inner=solution, inner_solver=few, method=Unrolled())
    return off_by(result.gradient)


root = (largest / mu) ** 0.5
counts = [1, 2, 3, 5, 8, 12, 16, 20, 25, 30, 40, 60, 80, 100]
cg_counts = counts[:10]
cg = [at_the_solution(ImplicitCG(max_steps=k, rtol=0)) for k in cg_counts]
neumann = [at_the_solution(NeumannSeries(terms=k, scale=1 / largest)) for k in counts]
unrolled = [unrolled_from_the_solution(k) for k in counts]
cg_bound = [2 * root * ((root - 1) / (root + 1)) ** k for k in cg_counts]
neumann_bound = [(1 - mu / largest) ** k for k in counts]
print(" k   CG       bound    Neumann  bound    unrolled")
for row in zip(cg_counts, cg, cg_bound, neumann, neumann_bound, unrolled, strict=False):
    if row[0] in (1, 5, 12, 20):
        print("{:2}   {:.1e}  {:.1e}  {:.1e}  {:.1e}  {:.1e}".format(*row))

# %% [markdown]
# The Neumann series, and unrolling from the solution with it, keep to their bound almost exactly.
# Conjugate gradients do better than theirs: it knows the two extreme eigenvalues only, while the
# method profits from the twenty that coincide at $s$, one for each direction that the forty rows
# leave open.
#
# The other error is that of the inner solution: a hypergradient from a point $z_T$ that is not yet
# $z^\star$. It shrinks as the inner error does, by $1 - 1/\kappa$ a step or better, and more
# products do not help.

# %%
inner_steps = [1, 10, 20, 40, 70, 100, 140, 180]
families = {
    "ImplicitCG": ImplicitCG(rtol=1e-10),
    "Unrolled": Unrolled(),
    "Unrolled, last 10": Unrolled(truncate=10),
}
curves = {name: [] for name in families}
for steps in inner_steps:
    few = GradientDescent(lr=1 / largest, max_steps=steps)
    for name, method in families.items():
        result = hypergradient(problem, x, task, inner_solver=few, method=method)
        curves[name].append(off_by(result.gradient))
for name, curve in curves.items():
    print(f"{name:20}", "  ".join(f"{far:.0e}" for far in curve))

# %% [markdown]
# ![Left: error against steps of the linear solve; conjugate gradients plunge below their dashed
# bound, the Neumann series follows its bound, truncated unrolling lies on it as rings. Right: error
# against inner steps; implicit and unrolled fall together, below the dashed rate, and truncated
# unrolling stays where its ten steps leave it](swap_the_method_rates.png)

# %%
figure = plt.figure(figsize=(8.2, 3.8), layout="constrained")
left, right = axes_for(figure, 2)
left.plot(counts, neumann_bound, "--", color=ORANGE, lw=1.4)
left.plot(counts, neumann, "o", color=ORANGE, ms=5)
left.plot(counts, unrolled, "o", color=GREEN, ms=9.5, mfc="none", mew=1.5)
left.plot(cg_counts, cg_bound, "--", color=BLUE, lw=1.4)
left.plot(cg_counts, cg, "o-", color=BLUE, ms=5, lw=1.6)
left.text(34, 3e-6, "bound for CG", color=BLUE)
left.text(32, 3e-10, "ImplicitCG(max_steps=k)", color=BLUE)
neumann_label = "NeumannSeries(terms=k), its bound,\nk unrolled steps (rings)"
left.text(102, 1.5, neumann_label, color=ORANGE, ha="right", va="bottom")
left.set_ylim(2e-11, 200)
left.set_xlabel("k, products with the inner Hessian", color=INK)
left.set_title("error, inner problem solved", color=INK, fontsize=10.5, loc="left")
rate = [(1 - mu / largest) ** steps for steps in inner_steps]
right.plot(inner_steps, rate, "--", color=GREY, lw=1.4)
right.plot(inner_steps, curves["ImplicitCG"], "o-", color=BLUE, ms=5, lw=1.6)
right.plot(inner_steps, curves["Unrolled"], "o", color=GREEN, ms=9.5, mfc="none", mew=1.5)
right.plot(inner_steps, curves["Unrolled, last 10"], "s-", color=PURPLE, ms=5, lw=1.6)
right.text(103, 0.008, "rate (1 − 1/κ)ᵀ", color=GREY)
right.text(92, 4e-6, "ImplicitCG,\nUnrolled (rings)", color=BLUE, ha="right")
right.text(180, 0.75, "Unrolled(truncate=10)", color=PURPLE, ha="right", va="bottom")
right.set_ylim(3e-7, 6)
right.set_xlabel("T, inner steps", color=INK)
right.set_title("error, inner problem cut off", color=INK, fontsize=10.5, loc="left")
figure.savefig("swap_the_method_rates.png", dpi=104)

# %% [markdown]
# ## Have it compared
#
# [`compare`][bilevel.compare.compare] does all of this in one call: it runs the methods, takes
# their errors, and recommends the cheapest that is accurate enough. A pair `(method, inner_solver)`
# brings an inner solver of its own; that is where the savings are, since implicit methods do not
# care how the solution was found.

# %%
from bilevel import compare
from bilevel.solvers import LBFGS

candidates = methods | {
    "CG after L-BFGS": (ImplicitCG(), LBFGS()),
    "CG after Newton": (ImplicitCG(), HessianFree()),
    "corrected, 5 steps": (
        ImplicitCG(rtol=1e-3, correct=True),
        GradientDescent(lr=1 / largest, max_steps=5),
    ),
}
comparison = compare(
    problem, x, task, candidates, inner_solver=solver, accuracy=1e-3, repeats=1, memory=False
)
for one in sorted(comparison.results, key=lambda one: (one.cost, one.name)):
    mark = "→" if one is comparison.recommendation else "✓" if comparison.accurate(one) else " "
    shown = "below 1e-6" if one.error < 1e-6 else f"{one.error:.1e}"
    print(f"{mark} {one.name:20} error {shown:>10}   cost {one.cost}")

# %% [markdown]
# `print(comparison)` shows the whole table, with the time that each method takes on your machine
# (and the memory, unless `memory=False`), and `comparison.plot("methods.png")` draws it; see
# [Comparing methods](../concepts/comparing.md). *Cost* is gradients plus products of the whole
# call. Most of it was the inner solve: a better inner solver saves more than any method for the
# adjoint.
#
# The cheapest of all takes five inner steps and lets `correct=True` do the rest, one Newton step
# that [removes most of the inner error](../concepts/trust.md#the-error-removed). (All of it here:
# with a quadratic inner objective, Newton's step is the solution, as far as its linear solve is.)
#
# What is recommended depends on what you need:

# %%
from dataclasses import replace

for accuracy in (1e-1, 1e-4, 1e-6):
    best = replace(comparison, accuracy=accuracy).recommendation
    print(f"error of at most {accuracy:.0e}: {best.name}, cost {best.cost}")

# %% [markdown]
# ## Which one, then
#
# 1. `ImplicitCG`, after an inner solver that suits the problem: the fewest products, a tolerance to
#    choose, and a status that tells about [negative curvature](when_it_lies.md).
# 2. `Unrolled`, where a few inner steps *are* the model, and their end is not meant to be a
#    minimum.
# 3. `NeumannSeries`, where only a handful of products is affordable and $L$ is known.
# 4. `DenseExact`, while the problem is small, to compare with.
#
# [Hypergradient methods](../concepts/hypergradients.md) has the formulas, and
# [Linear solvers](../concepts/linear-solvers.md) what to plug into `Implicit`.
