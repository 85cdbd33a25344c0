# %% [markdown]
# # Write your own problem
#
# The problems that come with the library are small and known. Yours is neither. This page states
# three, in the three ways there are:
#
# | Way | For |
# |---|---|
# | [`problem_from`][bilevel.problem_from] | two functions, and done |
# | subclass [`BilevelProblem`][bilevel.BilevelProblem] | a network, settings, metrics, promises |
# | `stationarity` | an equilibrium: something is *solved*, nothing is minimised |
#
# Each is then put to the same two tests, which are the ones to write for yours:
# [`check_hypergradient`][bilevel.check_hypergradient] for the derivatives and
# [`doctor`][bilevel.doctor.doctor] for the rest. At the end stand the usual mistakes, with what the
# library says to each.
#
# If the words *inner* and *outer* are new to you, begin with [Your first bilevel
# problem](first_problem.md).
#
# ## From functions
#
# Fit a curve by a sum of bumps. How *high* each bump is and where the zero line lies, the fit
# finds: that is the inner variable. How *wide* the bumps are, and how strongly their heights are
# held down, is the outer variable.

# %%
import torch

from bilevel import Task, problem_from

generator = torch.Generator().manual_seed(3)
place = torch.rand(60, generator=generator, dtype=torch.float64)
noise = 0.15 * torch.randn(60, generator=generator, dtype=torch.float64)
reading = (8 * place).sin() / (0.3 + place) + noise
centers = torch.linspace(0, 1, 15, dtype=torch.float64)


def curve(inner, outer, place):
    width = outer["log width"].exp()
    bumps = torch.exp(-0.5 * ((place[:, None] - centers) / width) ** 2)
    return bumps @ inner["heights"] + inner["zero"]


def misfit(inner, outer, batch):
    return ((curve(inner, outer, batch["place"]) - batch["reading"]) ** 2).mean()


def penalised(inner, outer, batch):
    return misfit(inner, outer, batch) + outer["log strength"].exp() * (
        (inner["heights"] ** 2).mean() + 0.01 * inner["zero"] ** 2
    )


curves = problem_from(
    inner_objective=penalised,
    outer_objective=misfit,
    initial_inner=lambda outer, batch: {
        "heights": torch.zeros(15, dtype=torch.float64),
        "zero": torch.zeros((), dtype=torch.float64),
    },
)
train = {"place": place[:30], "reading": reading[:30]}
validation = {"place": place[30:], "reading": reading[30:]}
outer = {
    "log width": torch.tensor(-4.0, dtype=torch.float64),
    "log strength": torch.tensor(-5.0, dtype=torch.float64),
}
task = Task(inner_batch=train, outer_batch=validation)

# %% [markdown]
# - **All three arguments are pytrees**: dicts, lists and tuples of tensors, or one tensor. The
#   hypergradient has the structure of `outer`, the solution that of `initial_inner`.
# - **Both objectives return one number**, a 0-d tensor. Data come in by `batch` alone: the inner
#   objective is handed `inner_batch`, the outer one `outer_batch`.
# - **The width enters both objectives.** It changes the fit, and the curve that the fit draws.
#   Nothing is to be done about it: both paths are followed.
# - **Where a number has to be positive, pass its logarithm.** No step of an optimizer can then make
#   it negative.

# %%
from bilevel import hypergradient
from bilevel.solvers import HessianFree, ImplicitCG

solver, method = HessianFree(tol=1e-9), ImplicitCG(rtol=1e-9)
result = hypergradient(curves, outer, task, inner_solver=solver, method=method)
print({name: f"{slope.item():.3f}" for name, slope in result.gradient.items()})
print({name: tuple(leaf.shape) for name, leaf in result.inner.items()})

# %% [markdown]
# The slope in the width is large and negative: wider bumps, by all means.
#
# ### The test to write for it
#
# Two calls. The first has the derivatives checked by dense algebra, and the algebra by finite
# differences, leaf by leaf. The second looks for what makes a *correct* derivative worthless: an
# unsolved inner problem, vanishing curvature, kinks, chance. Both are cheap on a small instance, so
# keep one small.

# %%
from bilevel import check_hypergradient, doctor


def test(problem, outer, task, solver, method):
    check = check_hypergradient(problem, outer, task, inner_solver=solver, method=method)
    for leaf in check.leaves:
        print(f"{leaf.name:24} off by less than 1e-6: {leaf.error < 1e-6}")
    assert check.ok, check
    diagnosis = doctor(problem, outer, task, inner_solver=solver, method=method)
    assert diagnosis.ok, diagnosis
    print("doctor finds", [finding.kind for finding in diagnosis.findings])


test(curves, outer, task, solver, method)

# %% [markdown]
# In a test suite the first call is [`assert_hypergradient`][bilevel.assert_hypergradient], whose
# failure prints the whole report. A problem that passes can be handed to everything else:

# %%
from bilevel import minimize

found = minimize(curves, outer, task, inner_solver=solver, method=method)
print(found.status.name)
print(f"validation error {result.outer_value.item():.3f} → {found.value:.3f}")
print(
    f"width            {outer['log width'].exp().item():.3f} → {found.outer['log width'].exp():.3f}"
)

# %% [markdown]
# ## A class, around a network
#
# Four groups of rows, few in each. A small network shall be fitted to each group; what the groups
# share is how: the strength of the weight decay of each layer, and how much the labels are
# smoothed. So there are four *tasks*, inner problems of their own with one outer variable.
#
# A class has room for settings and for more to say about the problem.

# %%
from torch import nn

from bilevel import BilevelProblem, Proximal, Structure, stateless


class SmoothedNetwork(BilevelProblem):
    """Fit a binary classifier; learn its weight decay, layer by layer, and its label smoothing."""

    structure = Structure.SYMMETRIC  # all that a network can promise; it is the default

    def __init__(self, module):
        self.start, self.net = stateless(module)
        self.regularizer = Proximal(self.strength, center=self.zeros)

    def strength(self, outer):
        layers = outer["log decay"]
        return {name: layers[name.split(".")[0]].exp() for name in self.start}

    def zeros(self, outer):
        return {name: torch.zeros_like(value) for name, value in self.start.items()}

    def initial_inner(self, outer, batch):
        return self.start

    def predict(self, inner, outer, batch):
        return self.net(inner, batch["rows"]).squeeze(-1)

    def loss(self, prediction, outer, batch):
        smoothing = 0.5 * outer["smoothing"].sigmoid()
        target = smoothing + (1 - 2 * smoothing) * batch["labels"]
        return nn.functional.binary_cross_entropy_with_logits(prediction, target)

    def outer_objective(self, inner, outer, batch):
        prediction = self.predict(inner, outer, batch)
        return nn.functional.binary_cross_entropy_with_logits(prediction, batch["labels"])

    def metrics(self, inner, outer, batch):
        right = (self.predict(inner, outer, batch) > 0) == (batch["labels"] > 0.5)
        return {"accuracy": right.double().mean()}


# %% [markdown]
# - **[`stateless`][bilevel.stateless.stateless] splits a module** into its parameters, which are
#   the inner variable as a dict, and a pure function of them. The module itself is never touched
#   again.
# - **`predict` and `loss` are the inner objective in two parts.** They could be one
#   `inner_objective`. In two parts the library knows where the network ends, and can build the
#   *Gauss-Newton matrix*, which is positive semidefinite where the loss is convex in the
#   prediction, whatever the network is.
# - **The weight decay is the [proximal regularizer](../concepts/regularizer.md)** with its center
#   at zero; its strength is a number for each parameter tensor, here a function of `outer`. It is
#   no part of `loss`. Where a regularizer gives a center, `initial_inner` may be left out, and the
#   center is the start; but at zero this network is stuck: the gradient of its weights vanishes
#   there.
# - **`metrics`** are reported, and not differentiated.
# - **[`structure`](../concepts/problems.md#structure)** is your promise about the inner Hessian. If
#   your objective is strongly convex, say `POSITIVE_DEFINITE`: the search for negative curvature is
#   then left out of [error estimates](../concepts/trust.md#the-error-estimated), and `doctor` holds
#   you to it.
#
# The tasks have rows of one shape, so they stack: objectives are written for one task, and [the
# library maps them](../concepts/tasks.md) over the stack.

# %%
torch.manual_seed(0)
module = nn.Sequential()
module.add_module("hidden", nn.Linear(2, 5))
module.add_module("tanh", nn.Tanh())
module.add_module("last", nn.Linear(5, 1))
network = SmoothedNetwork(module.double())


def group(angle):
    rows = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    direction = torch.tensor([angle, 1 - angle], dtype=torch.float64)
    labels = ((rows * direction).sum(1) + rows[:, 0] * rows[:, 1] > 0).double()
    labels[:3] = 1 - labels[:3]  # wrong ones
    part = {"rows": rows[:20], "labels": labels[:20]}, {"rows": rows[20:], "labels": labels[20:]}
    return Task(*part, key=angle)


groups = Task.stack([group(angle) for angle in (0.1, 0.3, 0.6, 0.9)])
shared = {
    "log decay": {
        "hidden": torch.tensor(-3.0, dtype=torch.float64),
        "last": torch.tensor(-3.0, dtype=torch.float64),
    },
    "smoothing": torch.tensor(-1.0, dtype=torch.float64),
}
test(network, shared, groups, solver, method)
result = hypergradient(network, shared, groups, inner_solver=solver, method=method)
print("statuses", [status.name for status in result.status])
print("accuracy", [f"{one:.2f}" for one in result.metrics["accuracy"].tolist()])

# %% [markdown]
# The gradient is the mean over the tasks. Each has its own status, metrics and solution
# (`result.inner["hidden.weight"]` is `[4, 5, 2]`).
#
# What is the Gauss-Newton matrix for? A network that is not fitted yet has directions of negative
# curvature, and conjugate gradients stop there. Ask them to go on with the Gauss-Newton matrix:

# %%
from bilevel.solvers import CG, GradientDescent, Implicit

early = GradientDescent(lr=0.1, max_steps=2)
for policy in ("truncate", "ggn"):
    hasty = hypergradient(
        network, shared, groups, inner_solver=early, method=Implicit(CG(indefinite=policy))
    )
    print(f"{policy:9} {hasty.status[0].name}, slope in smoothing", end=" ")
    print(f"{hasty.gradient['smoothing'].item():.4f}")

# %% [markdown]
# The status is the same, because the finding is: the curvature is negative, this point is no
# minimum, and no hypergradient there deserves trust. The second value at least solves a system that
# has a solution. [Negative curvature](../concepts/linear-solvers.md#negative-curvature) has the
# other policies.
#
# ### Constants, where you know them
#
# A convex problem can promise more: numbers, from which the error of a hypergradient is not
# estimated but [certified](../concepts/trust.md#the-error-certified). Here is ridge regression with
# one strength $\lambda = e^x$, where each constant is a line of calculus. The mixed derivative
# $\partial_x \partial_w G$ is $\lambda w$. It changes with $w$ at the rate $\lambda$, and its
# length is at most $\lambda$ times that of the longest $w$ on the way. A solver that begins at zero
# and descends meets none with
#
# $$
# \tfrac{\lambda}{2} \|w\|^2 > G(0) .
# $$

# %%
from bilevel import Smoothness


class Shrunk(BilevelProblem):
    """Ridge regression; learn the strength."""

    structure = Structure.POSITIVE_DEFINITE
    regularizer = Proximal(torch.exp, center=lambda x: x.new_zeros(4))

    def inner_objective(self, w, x, batch):
        return 0.5 * ((batch["rows"] @ w - batch["targets"]) ** 2).mean()

    outer_objective = inner_objective  # on other rows

    def smoothness(self, x, task):
        strength = x.exp()
        longest = ((task.inner_batch["targets"] ** 2).mean() / strength).sqrt()  # ‖w‖
        rows = task.outer_batch["rows"]
        return Smoothness(
            cross_norm=(strength * longest).item(),  # ‖∂ₓ∂_w G‖
            cross=strength.item(),  # how fast it changes with w
            outer_gradient=torch.linalg.eigvalsh(rows.T @ rows / len(rows))[-1].item(),
        )


rows = torch.randn(80, 4, generator=generator, dtype=torch.float64)
targets = rows.sum(1) + 0.5 * torch.randn(80, generator=generator, dtype=torch.float64)
halves = [{"rows": rows[k], "targets": targets[k]} for k in (slice(40), slice(40, None))]
ridge = Shrunk(), torch.tensor(-1.0, dtype=torch.float64), Task(*halves)
test(*ridge, solver, method)

exact = hypergradient(*ridge, inner_solver=solver, method=method).gradient
asked = ImplicitCG(rtol=1e-9, error_estimate=True, error_bound=True)
print("steps  error    estimated  certified")
for steps in (5, 10, 20):
    short = GradientDescent(lr=0.4, max_steps=steps)
    result = hypergradient(*ridge, inner_solver=short, method=asked)
    error = ((result.gradient - exact) / result.gradient).abs().item()
    told = result.diagnostics
    print(f"{steps:5}  {error:.1e}  {told.error_estimate.item():.1e}", end="    ")
    print(f"{told.error_bound.item():.1e}")
    assert error <= told.error_bound.item()

# %% [markdown]
# The estimate is what to steer by. The bound is hundreds of times larger, and holds as far as the
# constants do. ($\mu$ need not be said: where the rest is convex, it is the smallest strength of
# the regularizer.)
#
# ## An equilibrium
#
# Sometimes the inner variable minimises nothing. Six people hold opinions. Each listens to some of
# the others, and also keeps to what they think themselves:
#
# $$
# z_i = s_i\, u_i + (1 - s_i) \sum_j W_{ij} z_j
# \qquad\text{with}\qquad s_i = \frac{1}{1 + e^{-x_i}}
# $$
#
# $u_i$ is their own opinion, $s_i$ how stubborn they are, and the rows of $W$ sum to one: the model
# of Friedkin and Johnsen (1990). The opinions settle where this holds. Since people listen to some
# who do not listen to them, the difference of both sides is not the gradient of any objective.
# State it as it is, as what *vanishes* where the opinions settle:

# %%
listens = torch.tensor(
    [
        [0, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [0, 1, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 1, 0, 1],
        [1, 0, 0, 0, 1, 0],
    ],
    dtype=torch.float64,
)
listens = listens / listens.sum(1, keepdim=True)


def unrest(z, x, batch):
    s = x.sigmoid()
    return z - s * batch["own"] - (1 - s) * (listens @ z)


opinions = problem_from(
    inner_objective=None,
    stationarity=unrest,
    outer_objective=lambda z, x, batch: ((z - z.mean()) ** 2).mean() + 0.02 * (x**2).mean(),
    initial_inner=lambda x, batch: batch["own"],
)
town = Task(
    {"own": torch.tensor([1.0, 0.8, 0.3, -0.2, -0.7, -1.0], dtype=torch.float64)},
)
x = torch.zeros(6, dtype=torch.float64)
print(opinions.structure.name)

# %% [markdown]
# The outer objective asks for agreement, without bending anyone too far: who should be more open,
# and who may stay as they are?
#
# Two things follow from the form. An inner solver must not look for values of an objective:
# `GradientDescent` iterates $z \leftarrow z - \eta\, F(z)$ on whatever vanishes, and with a rate of
# 1 that is the plain iteration. And the Jacobian is not symmetric, so that the structure is
# `GENERAL` and the linear solver one that copes:

# %%
from bilevel.solvers import GMRES

settle = GradientDescent(lr=1.0, max_steps=1000, tol=1e-10)
general = Implicit(GMRES(rtol=1e-10))
test(opinions, x, town, settle, general)

# %% [markdown]
# This one is linear in $z$, so there is more: an answer by a route that shares nothing with the
# library. Where a problem has such a route, it is the best test of all.

# %%
wanted = torch.autograd.functional.jacobian(
    lambda x: opinions.outer_objective(
        torch.linalg.solve(
            torch.eye(6, dtype=torch.float64) - (1 - x.sigmoid())[:, None] * listens,
            x.sigmoid() * town.inner_batch["own"],
        ),
        x,
        None,
    ),
    x,
)
result = hypergradient(opinions, x, town, inner_solver=settle, method=general)
print("agrees with a dense solve to 1e-6:", torch.allclose(result.gradient, wanted, rtol=1e-6))

calm = minimize(opinions, x, town, inner_solver=settle, method=general)
spread = (result.inner.max() - result.inner.min()).item()
after = (calm.result.inner.max() - calm.result.inner.min()).item()
print(f"{calm.status.name}: the opinions span {spread:.2f} → {after:.2f}")

# %% [markdown]
# ![Left: sixty noisy points of a curve with a peak and a trough; the fit with narrow bumps swings
# wildly between the points, that with the width found is smooth and goes through them. Right: the
# opinions of six people; gray dots what each thinks alone, orange dots where they settle at first,
# and blue dots where they settle in the end, closest together, since persons four to six gave
# in](own_problem_found.png)
#
# Left, the curves before and after; right, the opinions. What drew them:

# %%
import matplotlib.pyplot as plt

from bilevel import solve_inner

INK, BLUE, ORANGE, GREY = "#1e293b", "#2563eb", "#d97706", "#64748b"
figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.7), layout="constrained")
for axes in (left, right):
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#94a3b8")
    axes.tick_params(colors="#475569")
fine = torch.linspace(0, 1, 300, dtype=torch.float64)
for at, color, name in [(outer, ORANGE, "at the start"), (found.outer, BLUE, "found")]:
    fit = solve_inner(curves, at, task, inner_solver=solver).inner
    left.plot(fine, curve(fit, at, fine), color=color, lw=2, label=name)
left.plot(train["place"], train["reading"], "o", color=INK, ms=4.5, label="training rows")
left.plot(place[30:], reading[30:], "o", color=INK, mfc="white", ms=4.5, label="validation rows")
left.set_title("a curve as a sum of bumps", color=INK, fontsize=10.5, loc="left")
left.set_xlabel("place", color=INK)
left.legend(frameon=False, fontsize=8.5)
people = range(1, 7)
right.plot(people, town.inner_batch["own"], "o", color=GREY, ms=7, label="alone")
right.plot(people, result.inner, "o", color=ORANGE, ms=7, label="settled, at the start")
right.plot(people, calm.result.inner, "o", color=BLUE, ms=7, label="settled, found")
right.set_title("opinions of six people", color=INK, fontsize=10.5, loc="left")
right.set_xlabel("person", color=INK)
right.legend(frameon=False, fontsize=8.5)
figure.savefig("own_problem_found.png", dpi=110)

# %% [markdown]
# ## The usual mistakes
#
# Before a problem is used for the first time, its functions are evaluated once and watched. These
# are the mistakes of a first evening, and what you read then.

# %%
import textwrap

from bilevel import BilevelError


def show(error):
    print(textwrap.fill(f"{type(error).__name__}: {error}", 90), end="\n\n")


strength = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
zeros = torch.zeros(15, dtype=torch.float64)


def flawed(inner_objective, initial=curves.initial_inner, by=method):
    problem = problem_from(inner_objective, misfit, initial_inner=initial)
    try:
        hypergradient(problem, outer, task, inner_solver=solver, method=by)
    except (BilevelError, ValueError) as error:
        show(error)


# 1. A residual for each row instead of one number.
flawed(lambda z, x, batch: (curve(z, x, batch["place"]) - batch["reading"]) ** 2)

# 2. The strength is no part of `outer`.
flawed(lambda z, x, batch: misfit(z, x, batch) + strength * (z["heights"] ** 2).sum())

# 3. Chance inside an objective.
flawed(lambda z, x, batch: misfit(z, x, batch) * (1 + torch.rand(()).double()))

# 4. Two dtypes.
flawed(penalised, lambda x, batch: {"heights": zeros.float(), "zero": torch.zeros(())})

# 5. Dropout in a network.
try:
    SmoothedNetwork(nn.Sequential(nn.Linear(2, 5), nn.Dropout(0.5), nn.Linear(5, 1)))
except BilevelError as error:
    show(error)

# 6. Conjugate gradients for an equilibrium.
try:
    hypergradient(opinions, x, town, inner_solver=settle, method=method)
except BilevelError as error:
    show(error)

# %% [markdown]
# One mistake raises nothing. A `.detach()`, a `.item()` or a round trip through NumPy cuts a path
# to the outer variable, and what is left looks like a gradient. The other leaf still has its slope.
# For this there is the test:


# %%
def cut(z, x, batch):
    return penalised(z, {**x, "log width": x["log width"].detach()}, batch)


silent = problem_from(cut, misfit, initial_inner=curves.initial_inner)
result = hypergradient(silent, outer, task, inner_solver=solver, method=method)
print("ok:", result.ok)
check = check_hypergradient(silent, outer, task, inner_solver=solver, method=method)
print("check ok:", check.ok, "  the reference agrees with differences:", check.reference_ok)
diagnosis = doctor(silent, outer, task, inner_solver=solver, method=method)
for finding in diagnosis.findings:
    print(f"{finding.kind}: {finding.found}")

# %% [markdown]
# Dense algebra differentiates the same function, so it falls for the cut as well; the finite
# differences do not. `doctor` names the place.
#
# ## Under its name
#
# A problem that is to be used from the command line, or to stand in the library, is a class that is
# registered with `@PROBLEMS.register("name")` from `bilevel.registry`, and that makes a small
# instance of itself: a class method `example(*, tasks=None, dtype=torch.float64, seed=0)` that
# returns an [`Example`][bilevel.problems.Example] with what is known, bounds on the curvature, and
# the exact hypergradient where there is a formula. Then `bilevel --import my_problem.py check name`
# knows it from the file that registers it.
#
# - [Bilevel problems](../concepts/problems.md): what an objective has to be, in short.
# - [Checking a hypergradient](../concepts/checking.md) and [a preflight](../concepts/doctor.md).
# - [Write your own solver](own_solver.md), or [your own method](own_method.md).
