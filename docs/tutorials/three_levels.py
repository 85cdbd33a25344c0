# %% [markdown]
# # Three levels
#
# Eight laboratories sent rows of data, some measured carefully, some not, and one model is to be
# fitted to all of them. How much should each laboratory count? And how much should the model be
# shrunk? Each of these choices can be judged on rows that were held out, so each can be
# *optimised*, and the choices stand inside one another:
#
# $$
# \min_{x}\; f\big(w^\star(x)\big) ,
# $$
#
# $$
# \text{where}\quad d^\star(x) = \arg\min_{d}\; h\big(w^\star(x, d)\big)
# \quad\text{and}\quad
# w^\star(x, d) = \arg\min_{w}\; g(w, x, d) .
# $$
#
# The weights $x$ of the laboratories are at the top, the weight decay $d$ is in the middle, the
# model $w$ at the bottom. $h$ and $f$ are errors on two sets of held-out rows.
#
# A [bilevel problem](../concepts/problems.md) has two of these levels. This page states all three
# as one graph, takes its [hypergradient](../concepts/hypergradients.md), checks it against a nest
# of solves that shares no code with the library, looks at what a level costs, and uses it.
#
# ## The data
#
# A linear model with 24 coefficients. Each laboratory has 16 rows, and a noise of its own that the
# levels do not know. The three other sets come from an instrument with noise 0.5, on which the true
# coefficients themselves have an error of about $0.5^2 / 2 = 0.125$.

# %%
import math

import torch
from scipy.optimize import brentq

from bilevel import DependenceError, Level, MultiLevelProblem, StructureError
from bilevel.solvers import (
    LBFGS,
    ClosedForm,
    DenseExact,
    GradientDescent,
    HessianFree,
    ImplicitCG,
    Unrolled,
)

torch.set_default_dtype(torch.float64)
generator = torch.Generator().manual_seed(0)
LABS, EACH, FEATURES, HELD_OUT = 8, 16, 24, 150
noise = torch.tensor([0.3, 0.3, 0.6, 0.6, 1.2, 2.0, 3.0, 4.0])
truth = torch.randn(FEATURES, generator=generator) / math.sqrt(FEATURES)


def measured(noise, *shape):
    features = torch.randn(*shape, FEATURES, generator=generator)
    return features, features @ truth + noise * torch.randn(*shape, generator=generator)


training = measured(noise[:, None], LABS, EACH)
middle_rows, top_rows = measured(0.5, HELD_OUT), measured(0.5, HELD_OUT)
test_rows = measured(0.5, 4000)


def error(w, rows):
    features, targets = rows
    return 0.5 * (features @ w - targets).square().mean()


# %% [markdown]
# ## Three levels, three functions
#
# The objective of a level is a function of three arguments:
#
# - its own variable,
# - `v`, a mapping that gives the variables of the *other* levels by name
#   ([`Variables`][bilevel.Variables]),
# - its data.
#
# The bottom fits the model to weighted rows. The weights are positive and 1 on average, which a
# softmax sees to. The decay is an exponential, so that any real number may stand for it.


# %%
def share(x):
    """The weight of each laboratory, 1 on average."""
    return LABS * x.softmax(0)


def fit(w, v, data):
    features, targets = data
    of_each_lab = 0.5 * (features @ w - targets).square().mean(1)
    return (share(v["weights"]) * of_each_lab).mean() + 0.5 * v["decay"].exp() * w.square().sum()


def choose_decay(decay, v, rows):
    return error(v["model"], rows)


def choose_weights(x, v, rows):
    return error(v["model"], rows)


# %% [markdown]
# `choose_decay` never mentions its own variable. It need not: `v["model"]` is the model *solved
# for* this decay, and depends on it through the solve. Reading `v["model"]` is what runs the solver
# of the level below, and the tensor that comes back is in the autograd graph of everything it was
# solved for.
#
# Now the graph. A [`Level`][bilevel.Level] is a name, an objective, its data, and, except at the
# top, how it is solved and how its solution is differentiated. An edge `("above", "below")` says
# that the variable above enters the objective below. The reverse direction needs no edge: what is
# above always sees the solutions of what is below.
#
# The two inner levels get what suits them. The decay is one number: L-BFGS finds it, and the matrix
# of its adjoint system, one by one, is formed. The model has 24: Newton steps, which need one or
# two for a quadratic objective, and conjugate gradients for the adjoint.
#
# !!! tip "How accurately: about the square"
#     What is left of a solve below is [noise above](../concepts/levels.md#what-to-know). Close to a
#     minimum, at a slope $s$, the objective of the middle can only fall by about $s^2$ further, and
#     a line search has to see that through the noise. So a tolerance of $10^{-4}$ in the middle
#     wants about $10^{-8}$ at the bottom; one of $10^{-9}$ wants as much as rounding allows.


# %%
first_decay = torch.tensor(0.0)  # log of the decay


def levels(middle, bottom):
    """The problem, with a pair (inner solver, hypergradient method) for each inner level."""
    return MultiLevelProblem.of(
        [
            Level("weights", choose_weights, top_rows),
            Level(
                "decay",
                choose_decay,
                middle_rows,
                start=lambda v, rows: first_decay,
                solver=middle[0],
                method=middle[1],
            ),
            Level(
                "model",
                fit,
                training,
                start=lambda v, rows: torch.zeros(FEATURES),
                solver=bottom[0],
                method=bottom[1],
            ),
        ],
        edges=[("weights", "decay"), ("weights", "model"), ("decay", "model")],
    )


problem = levels(
    middle=(LBFGS(tol=1e-9), DenseExact()),
    bottom=(HessianFree(tol=1e-12), ImplicitCG(rtol=1e-10)),
)
print(problem.draw("three_levels_graph.png"))

# %% [markdown]
# `draw` returns the text above; with a path it draws the graph, too:
#
# ![Three boxes in a staircase. An arrow leads from weights to decay, one from weights to model, one
# from decay to model; each box names its inner solver and its method](three_levels_graph.png)
#
# The *routes* are the ways by which the weights reach a level, and so the ways by which the
# derivative comes back: straight from the model, and through the decay, which is another one for
# other weights.
#
# ## The hypergradient
#
# One call solves the nest from the inside out and differentiates it.

# %%
x = torch.zeros(LABS)  # all laboratories count the same
found = problem.hypergradient(x)
print("top's objective ", f"{found.value:.4f}")
print("decay found     ", f"{found.solutions['decay'].exp():.3f}")
print("hypergradient   ", " ".join(f"{one:+.3f}" for one in found.gradient))

# %% [markdown]
# The largest entry is that of the last laboratory, the worst, and it is positive: the top's
# objective falls where this one counts *less*. Is the number right, though?
#
# ## Checked against the whole nest
#
# Trust nothing that was computed by the code under test. Here the bottom is a linear system, solved
# by `torch.linalg.solve`, and the middle has one unknown, whose slope is brought to zero by a root
# finder. So the top's objective can be had to 12 digits without the library, and its derivative by
# central differences of the *entire nest*: for each laboratory, move its weight a little to either
# side, find the decay again, fit the model again, and look at the top.


# %%
def nest(x):
    """The top's objective by dense algebra and a root finder."""
    rows, targets = training[0].reshape(-1, FEATURES), training[1].reshape(-1)
    weight = share(x).repeat_interleave(EACH) / (LABS * EACH)

    def fitted(decay):
        hessian = rows.T @ (weight[:, None] * rows) + math.exp(decay) * torch.eye(FEATURES)
        return torch.linalg.solve(hessian, rows.T @ (weight * targets)), hessian

    def slope(decay):
        w, hessian = fitted(decay)
        response = -torch.linalg.solve(hessian, math.exp(decay) * w)  # dw/d(decay)
        features, held_out = middle_rows
        return float((features @ w - held_out) @ (features @ response)) / HELD_OUT

    return float(error(fitted(brentq(slope, -6.0, 4.0, xtol=1e-14))[0], top_rows))


def differences(function, x, step=1e-4):
    """The gradient of a function by central differences."""
    moves = step * torch.eye(len(x))
    return torch.stack(
        [torch.as_tensor((function(x + m) - function(x - m)) / (2 * step)) for m in moves]
    )


def gap(a, b):
    """The relative distance, as far as it is more than rounding."""
    distance = float((a - b).norm() / b.norm())
    return "below 1e-6" if distance < 1e-6 else f"{distance:.0e}"


wanted = differences(nest, x)
print("value   ", "off by", gap(found.value, torch.tensor(nest(x))))
print("gradient", "off by", gap(found.gradient, wanted))

# %% [markdown]
# The same check is possible where the bottom is a network, since
# [`problem.value`][bilevel.MultiLevelProblem.value] is the top's objective as an ordinary tensor,
# with all levels solved: differences of `value` need nothing but patience. One direction is enough
# for a test.

# %%
direction = torch.linspace(-1.0, 1.0, LABS)
with torch.no_grad():
    ahead, behind = (problem.value(x + sign * 1e-3 * direction) for sign in (1, -1))
slope = (ahead - behind) / 2e-3
print("along a direction, off by", gap(found.gradient @ direction, slope))

# %% [markdown]
# ## Other methods, same number
#
# Solver and [method](../concepts/hypergradients.md) are chosen for each level, and the choice at
# one level says nothing about another: a formula for the solution, say, where there is one, or
# [unrolled](../concepts/hypergradients.md#unrolling) steps of gradient descent. The derivative is
# that of the solution in any case; cost and accuracy change.


# %%
def formula(given, data):
    """The model in closed form; `given` holds the variables that enter it."""
    features, targets = data
    weighted = share(given["weights"])[:, None, None] * features
    moment = torch.einsum("lrf,lrg->fg", weighted, features) / (LABS * EACH)
    hessian = moment + given["decay"].exp() * torch.eye(FEATURES)
    return torch.linalg.solve(hessian, torch.einsum("lrf,lr->f", weighted, targets) / (LABS * EACH))


descent = GradientDescent(lr=0.35, momentum=0.5, max_steps=60)
others = {
    "Newton and CG over a formula and dense": levels(
        (HessianFree(tol=1e-8), ImplicitCG(rtol=1e-8)), (ClosedForm(formula), DenseExact())
    ),
    "Newton and dense over unrolled descent": levels(
        (HessianFree(tol=1e-8), DenseExact()), (descent, Unrolled())
    ),
    "the first one, with loose tolerances": levels(
        (LBFGS(tol=1e-3), DenseExact()), (HessianFree(tol=1e-5), ImplicitCG(rtol=1e-1))
    ),
}
for name, one in others.items():
    print(f"{name:40} off by {gap(one.hypergradient(x).gradient, wanted)}")

# %% [markdown]
# ## What a level costs
#
# A level inside is solved at every evaluation of the level around it. Costs are multiplied, not
# added:


# %%
def two_levels(decay):
    """Weights over model; the decay is a guess and stays."""

    def fit_with_guess(w, v, data):
        return fit(w, {"weights": v["weights"], "decay": decay}, data)

    return MultiLevelProblem.of(
        [
            Level("weights", choose_weights, top_rows),
            Level(
                "model",
                fit_with_guess,
                training,
                start=lambda v, rows: torch.zeros(FEATURES),
                solver=HessianFree(tol=1e-12),
                method=ImplicitCG(rtol=1e-10),
            ),
        ],
        edges=[("weights", "model")],
    )


step = 0.01 * direction
two = two_levels(first_decay)
print("objectives evaluated for one hypergradient   decay   model")
for name, spent in {
    "two levels": two.hypergradient(x).evaluations,
    "three levels": found.evaluations,
    "three levels, warm, after a small step": problem.hypergradient(x + step).evaluations,
}.items():
    print(f"{name:42} {spent.get('decay', 0):7} {spent['model']:7}")

# %% [markdown]
# Two things keep the price down. *Warm starts* are on: each solve begins at the last solution of
# its level. And only the tolerances that are asked for are paid: see [what levels
# cost](../concepts/levels.md#what-levels-cost) for chains of up to four.
#
# ## Used
#
# A hypergradient is a gradient: `set_grad` hands it to any optimizer of PyTorch. While the weights
# are still far from good, the solves need not be tight.

# %%
STEPS = 15


def trained(problem):
    x = torch.zeros(LABS, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.3)
    history = []
    for _ in range(STEPS):
        found = problem.hypergradient(x)
        found.set_grad(x)
        optimizer.step()
        history.append(found)
    history.append(problem.hypergradient(x))
    return x.detach(), history


loose = levels(
    middle=(LBFGS(tol=1e-4), DenseExact()), bottom=(HessianFree(tol=1e-9), ImplicitCG(rtol=1e-6))
)
x, history = trained(loose)
print("step  top's objective  decay  error on test rows")
for step in range(0, STEPS + 1, 5):
    one = history[step]
    w, decay = one.solutions["model"], one.solutions["decay"].exp()
    print(f"{step:4}  {one.value:15.3f}  {decay:5.2f}  {error(w, test_rows):18.3f}")

# %% [markdown]
# Step 0 is what tuning the decay alone achieves: the decay was optimal there, too, for equal
# weights. As the weights improve, the middle follows by itself, and shrinks less.
#
# Is the third level worth its price? Beside it stand the two-level problems in which the decay is a
# guess.

# %%
results = {"equal weights,\ntuned decay": float(error(history[0].solutions["model"], test_rows))}
for guess in (0.01, 0.1, 1.0):
    model = trained(two_levels(torch.tensor(math.log(guess))))[1][-1].solutions["model"]
    results[f"weights,\ndecay {guess:g}"] = float(error(model, test_rows))
results["three levels"] = float(error(history[-1].solutions["model"], test_rows))
for name, one in results.items():
    print(f"{' '.join(name.split()):28} {one:.3f}")

# %%
from matplotlib.figure import Figure

INK, BLUE, ORANGE, GREY = "#1e293b", "#2563eb", "#d97706", "#64748b"


def tidy(axes):
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#94a3b8")
    axes.tick_params(colors="#475569")
    axes.title.set_color(INK)


figure = Figure(figsize=(7.4, 3.3), dpi=150, layout="constrained")
left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
ideal = LABS * noise**-2 / (noise**-2).sum()
left.loglog(noise, ideal, color=GREY, linewidth=1.2, label="1 / noise²")
left.loglog(noise, share(x), "o", color=BLUE, markersize=6, label="learned")
left.set_xlabel("noise of the laboratory", color=INK)
left.set_ylabel("its weight", color=INK)
left.legend(frameon=False, labelcolor=INK)
left.set_xticks([0.3, 1.0, 3.0], ["0.3", "1", "3"])
left.minorticks_off()
names = list(results)
colors = [GREY] + [ORANGE] * 3 + [BLUE]
right.barh(range(len(names)), list(results.values()), color=colors, height=0.62)
right.axvline(0.125, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
right.set_yticks(range(len(names)), names, color=INK)
right.invert_yaxis()
right.set_xlabel("error on test rows", color=INK)
for axes in (left, right):
    tidy(axes)
right.grid(visible=False, axis="y")
figure.savefig("three_levels_result.png")

# %% [markdown]
# ![Left: learned weight of each laboratory against its noise, both on logarithmic axes; the points
# scatter about the line of one over noise squared, the three worst laboratories below a tenth.
# Right: test errors as bars; three levels have the shortest, next to a dashed line at the error of
# the truth itself](three_levels_result.png)
#
# The levels were never told the noise, and yet the weights fall with it: for least squares, the
# best weight of a source is one over its variance, which is the line. They scatter about it, since
# 150 rows do not tell a little from next to nothing. The third level is worth what a guess of the
# decay is wrong by: a good guess does nearly as well, and the third level does not need one.
#
# !!! note "Could weights and decay not stand together at the top?"
#     They could, as one outer variable of a bilevel problem, and that is the thing to do where both
#     are judged by the *same* objective: $\min_x \min_d$ is $\min_{x, d}$. Here the decay is chosen
#     on other rows than the weights, as a part of what the laboratories' weights are judged by. In
#     a game or a market the levels belong to different people, and there is no choice.
#
# ## What is refused
#
# A graph that states no problem is refused when it is made; an edge that is missing, when the
# objective that needs it is first looked at, before anything is solved.

# %%
import textwrap


def refusal(attempt):
    try:
        attempt()
    except (StructureError, DependenceError) as error:
        print(textwrap.fill(f"{type(error).__name__}: {error}", 90), end="\n\n")


given = [problem.level(name) for name in ("weights", "decay", "model")]
circle = [("weights", "decay"), ("decay", "model"), ("model", "decay")]
refusal(lambda: MultiLevelProblem.of(given, circle))

incomplete = MultiLevelProblem.of(given, [("weights", "decay"), ("decay", "model")])
refusal(lambda: incomplete.value(x))

# %% [markdown]
# ## Where to go from here
#
# - [Many levels](../concepts/levels.md) is the reference: schedules, many tasks in a level, levels
#   that are solved together, and the same kind of problem on real data.
# - [Argmin in the graph](../concepts/argmin.md) is what each level is made of.
# - [Write your own problem](own_problem.md), where two levels are enough.
