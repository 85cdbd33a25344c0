# %% [markdown]
# # When implicit differentiation lies
#
# A wrong hypergradient looks like a right one: it has the right shape, it is finite, and training
# goes on. This page makes four of them on purpose. Each time the wrong number comes first, then
# what shows that it is wrong, then the cure. At the end one call finds all four.
#
# If the words are new, [Your first bilevel problem](first_problem.md) explains them.
#
# ## 1. The inner problem is not solved
#
# The fit of twelve bumps to fifteen noisy points, with a ridge strength $e^x$ to be chosen by the
# validation objective. This time the loss is $\log\cosh$, which forgives outliers, and the inner
# solver takes five steps, as if that were enough.

# %%
import torch

from bilevel import Task, hypergradient, problem_from, solve_inner
from bilevel.solvers import GradientDescent, HessianFree, ImplicitCG


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


generator = torch.Generator().manual_seed(8)
time = 6 * torch.rand(30, generator=generator, dtype=torch.float64)
signal = time.sin() + 0.3 * torch.randn(30, generator=generator, dtype=torch.float64)
bumps = torch.exp(-2 * (time[:, None] - torch.linspace(0, 6, 12, dtype=torch.float64)) ** 2)
task = Task(inner_batch=(bumps[:15], signal[:15]), outer_batch=(bumps[15:], signal[15:]))


def misfit(weights, batch):
    features, targets = batch
    return (features @ weights - targets).cosh().log().mean()


fit = problem_from(
    inner_objective=lambda z, x, batch: misfit(z, batch) + x.exp() * (z**2).sum(),
    outer_objective=lambda z, x, batch: misfit(z, batch),
    initial_inner=lambda x, batch: torch.zeros(12, dtype=torch.float64),
)
x = torch.tensor(-5.0, dtype=torch.float64)
five_steps = GradientDescent(lr=1.5, max_steps=5)
result = hypergradient(fit, x, task, inner_solver=five_steps, method=ImplicitCG())
print(f"hypergradient {result.gradient.item():+.4f}, {result.status[0].name}, ok: {result.ok}")

# %% [markdown]
# Positive: weaken the penalty. But fit to the end, twice, and take the difference:

# %%
to_the_end = HessianFree(tol=1e-10)


def validation(x):
    return misfit(solve_inner(fit, x, task, inner_solver=to_the_end).inner, task.outer_batch)


h = 0.01
print(f"slope         {(validation(x + h) - validation(x - h)).item() / (2 * h):+.4f}")

# %% [markdown]
# The sign is wrong. An optimizer would walk uphill, and a smaller learning rate would not help it.
#
# The formula of [implicit differentiation](../concepts/hypergradients.md#implicit-methods) holds
# where $\partial_z G = 0$. Five steps from zero the weights are still small, so everything looks as
# if the penalty held them down. The status was `BUDGET`, which is `ok`: five steps were asked
# for, and five were taken. **Ask for a tolerance, and the status tells:**

# %%
strict = GradientDescent(lr=1.5, max_steps=5, tol=1e-6)
result = hypergradient(fit, x, task, inner_solver=strict, method=ImplicitCG())
print(result.ok, result.summary())

# %% [markdown]
# A tolerance bounds the residual, though, and what you want to know is the error of the
# hypergradient. **Ask for that**: [`error_estimate=True`](../concepts/trust.md#the-error-estimated)
# looks one Newton step ahead, and compares. It is relative to the norm of what was returned.

# %%
method = ImplicitCG(error_estimate=True)
result = hypergradient(fit, x, task, inner_solver=five_steps, method=method)
exact = hypergradient(fit, x, task, inner_solver=to_the_end, method=ImplicitCG(rtol=1e-10)).gradient
true = (result.gradient - exact).abs() / result.gradient.abs()
print(f"estimated error {result.diagnostics.error_estimate.item():.1f} times the hypergradient")
print(f"true error      {true.item():.1f} times the hypergradient")

# %% [markdown]
# **Or have it removed**: [`correct=True`](../concepts/trust.md#the-error-removed) takes the
# hypergradient after that Newton step.

# %%
result = hypergradient(fit, x, task, inner_solver=five_steps, method=ImplicitCG(correct=True))
print(f"corrected {result.gradient.item():+.4f}, exact {exact.item():+.4f}")

# %% [markdown]
# How many steps would have been enough? The same three numbers, for more and more of them:

# %%
inner_steps = [3, 5, 8, 12, 20, 30, 45, 60, 80, 110, 150, 200, 260]
plain, estimated, corrected = [], [], []
for steps in inner_steps:
    solver = GradientDescent(lr=1.5, max_steps=steps)
    result = hypergradient(fit, x, task, inner_solver=solver, method=method)
    plain.append(result.gradient.item())
    estimated.append((result.diagnostics.error_estimate * result.diagnostics.gradient_norm).item())
    better = ImplicitCG(rtol=1e-8, correct=True)
    result = hypergradient(fit, x, task, inner_solver=solver, method=better)
    corrected.append(result.gradient.item())

# %% [markdown]
# ![Left: the plain hypergradient against inner steps begins on the wrong side of zero and needs a
# hundred steps to come near the exact value; the corrected one is there from the start. Right: the
# errors on logarithmic axes; rings of the estimate lie on the true error, and the corrected error
# falls twice as fast](when_it_lies_unsolved.png)
#
# The estimate (rings) lies on the true error, which nobody could know. The corrected error falls
# at twice the slope, for it goes with the square of the inner error.

# %%
import matplotlib.pyplot as plt

INK, BLUE, ORANGE, GREEN, RED, GREY = (
    *("#1e293b", "#2563eb", "#d97706", "#15803d", "#be123c", "#64748b"),
)
figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.8), layout="constrained")
for axes in (left, right):
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#94a3b8")
    axes.tick_params(colors="#475569")
    axes.set_xlabel("inner steps", color=INK)
left.set_xscale("log")
left.set_xticks([3, 10, 30, 100, 300], ["3", "10", "30", "100", "300"])
left.minorticks_off()
left.axhspan(0, 0.0065, color="#fee2e2", lw=0)
left.text(290, 0.0052, "wrong sign", color=RED, ha="right")
left.axhline(exact.item(), color=GREY, ls="--", lw=1.4)
left.text(290, -0.0076, "exact", color=GREY, ha="right", va="top")
left.plot(inner_steps, plain, "o-", color=ORANGE, ms=5, lw=1.6)
left.text(19, 0.0004, "as it is", color=ORANGE)
left.plot(inner_steps, corrected, "s-", color=GREEN, ms=5, lw=1.6)
left.text(8, -0.0066, "corrected", color=GREEN)
left.set_ylim(-0.0089, 0.0065)
left.set_xlim(2.7, 320)
left.set_title("hypergradient", color=INK, fontsize=10.5, loc="left")
right.plot(inner_steps, [abs(u - exact.item()) for u in plain], "o-", color=ORANGE, ms=4, lw=1.6)
right.plot(inner_steps, estimated, "o", color=BLUE, ms=9.5, mfc="none", mew=1.5)
right.plot(inner_steps, [abs(u - exact.item()) for u in corrected], "s-", color=GREEN, ms=5, lw=1.6)
right.set_yscale("log")
right.minorticks_off()
right.text(120, 2e-3, "true error", color=ORANGE)
right.text(150, 4e-4, "estimated (rings)", color=BLUE)
right.text(112, 1e-8, "corrected", color=GREEN, ha="right")
right.set_title("its error", color=INK, fontsize=10.5, loc="left")
figure.savefig("when_it_lies_unsolved.png", dpi=110)

# %% [markdown]
# ## 2. The inner point is no minimum
#
# Two valleys with a ridge between them, tilted a little by $x$. A gradient that vanishes
# is all that an inner solver looks for, and on the ridge it vanishes too.

# %%
target = torch.tensor([1.5, 0.5], dtype=torch.float64)


def two_valleys(z, x, batch):
    return 0.25 * ((z**2 - 1) ** 2).sum() - (x * z).sum()


def distance(z, x, batch):
    return 0.5 * ((z - target) ** 2).sum()


valleys = problem_from(two_valleys, distance, initial_inner=lambda x, batch: torch.zeros_like(x))
x_ridge = torch.tensor([0.0, 0.3], dtype=torch.float64)
downhill = GradientDescent(lr=0.2, max_steps=500, tol=1e-8)
solution = solve_inner(valleys, x_ridge, inner_solver=downhill)
z = solution.inner
print(solution.status[0].name, [f"{one:.3f}" for one in z.tolist()])

# %% [markdown]
# `CONVERGED`. The second coordinate rolled into a valley; the first had no slope to follow, and
# balances on the ridge. Now the formula, written by hand:

# %%
from torch.func import grad, jacrev

gradient = grad(two_valleys)
hessian = jacrev(gradient)(z, x_ridge, None)
cross = jacrev(gradient, argnums=1)(z, x_ridge, None)
adjoint = torch.linalg.solve(hessian, grad(distance)(z, x_ridge, None))
by_hand = -cross.T @ adjoint
print([f"{one:+.3f}" for one in by_hand.tolist()])

# %% [markdown]
# The first entry says: lower $x_1$. But push $x_1$ up by any amount, and $z_1$ rolls into the
# valley at $+1$, towards the target at $1.5$; push it down, and $z_1$ ends at $-1$, far from it.

# %%
for push in (-0.01, 0.01):
    pushed = x_ridge + torch.tensor([push, 0.0])
    found = solve_inner(valleys, pushed, inner_solver=downhill).inner
    value = distance(found, pushed, None).item()
    print(f"x₁ = {push:+.2f}: z₁ = {found[0].item():+.2f}, outer objective {value:.3f}")

# %% [markdown]
# The number by hand is the derivative of the *ridge*, which moves to the left when the landscape is
# tilted to the right. No residual is large, and nothing is NaN. What gives it away is
# the curvature, and conjugate gradients meet it on their way: $p^\top H p < 0$.

# %%
result = hypergradient(valleys, x_ridge, inner_solver=downhill, method=ImplicitCG())
print(result.ok, result.summary())

# %% [markdown]
# What value comes with that status is
# [your choice](../concepts/linear-solvers.md#negative-curvature); none of them is the derivative of
# a minimum.

# %%
from bilevel import SolveError

for policy in ("truncate", "damp", "minres", "error"):
    try:
        result = hypergradient(
            valleys, x_ridge, inner_solver=downhill, method=ImplicitCG(indefinite=policy)
        )
        shown = [f"{one:+.3f}" for one in result.gradient.tolist()]
        print(f"{policy:8}  {shown}  {result.status[0].name}")
    except SolveError as error:
        print(f"{policy:8}  SolveError: {str(error).split(':')[0]}")

# %% [markdown]
# - `"truncate"` returns the last iterate before the bad direction: here the very first was bad, so
#   zero.
# - `"damp"` solves with $H + \delta I$ for about the smallest $\delta$ that hides the negative
#   curvature. One that barely does makes a nearly singular matrix, hence the large number.
# - `"minres"` solves with $H$ all the same, and gives what was computed by hand.
# - `"error"` stops. `"ggn"`, for problems stated by `predict` and `loss`, takes the Gauss-Newton
#   matrix.
#
# One saddle no solve can see: one across which $\partial_z f$ does not look. Here the outer
# objective ignores $z_1$. `check_minimum=True` looks for it, from a random vector, for eight
# products more.

# %%
blind = problem_from(
    two_valleys,
    lambda z, x, batch: 0.5 * (z[1] - target[1]) ** 2,
    initial_inner=lambda x, batch: torch.zeros_like(x),
)
for method in (ImplicitCG(), ImplicitCG(check_minimum=True)):
    result = hypergradient(blind, x_ridge, inner_solver=downhill, method=method)
    print(f"check_minimum={method.check_minimum}: {result.status[0].name}")

# %% [markdown]
# **The cure** is a minimum: start off the ridge, solve further, or add a
# [proximal regularizer](../concepts/regularizer.md#why-it-helps) stronger than the negative
# curvature.

# %%
cured = problem_from(two_valleys, distance, initial_inner=lambda x, batch: torch.full_like(x, 0.5))
result = hypergradient(cured, x_ridge, inner_solver=downhill, method=ImplicitCG())
print(result.status[0].name, [f"{one:+.3f}" for one in result.gradient.tolist()])

# %% [markdown]
# ## 3. The objective is no function
#
# The implicit function theorem is about functions: the same arguments, the same value. An
# ordinary network in training mode is none.

# %%
from torch import nn
from torch.func import functional_call


def network(norm, dropout):
    module = nn.Sequential(nn.Linear(1, 6), norm, nn.Tanh(), dropout, nn.Linear(6, 1)).double()
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = randn(*parameter.shape, seed=seed)
    return module


module = network(nn.BatchNorm1d(6), nn.Dropout(0.2))
weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
rows = randn(12, 1, seed=9)
net_task = Task((rows[:6], rows[:6].sin()), (rows[6:], rows[6:].sin()))


def impure(w, x, batch):
    return nn.functional.mse_loss(functional_call(module, w, (batch[0],)), batch[1])


print("running mean of the norm:", module[1].running_mean[0].item())
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    values = [impure(weights, None, net_task.inner_batch).item() for _ in range(3)]
print("three values at one point:", ", ".join(f"{one:.1f}" for one in values))
print(f"running mean of the norm: {module[1].running_mean[0].item():.2f}")

# %% [markdown]
# Three values for the same weights and the same rows: that is the dropout. And the running mean is
# another one: batch normalisation wrote into the module, although `functional_call` looks as if it
# left the module alone. In evaluation mode that network now depends on *how often* the inner solver
# asked.
#
# [`stateless`][bilevel.stateless.stateless] makes a pure function of a module, and refuses what
# cannot be one:

# %%
import textwrap

from bilevel import BilevelError, stateless


def tell(text):
    print(textwrap.fill(text, 92, subsequent_indent="    "))


def attempt(module):
    try:
        stateless(module)
        print("accepted")
    except BilevelError as error:
        tell(f"{type(error).__name__}: {error}")


attempt(module)
pure_norm = nn.BatchNorm1d(6, track_running_stats=False)  # statistics of the batch at hand
attempt(network(pure_norm, nn.Dropout(0.2)))
attempt(network(pure_norm, nn.Dropout(0.0)))

# %% [markdown]
# Whoever goes around `stateless` and draws random numbers is caught at the door: each objective is
# looked at before anything is solved. A norm that only writes statistics passes there, since it
# returns the same value twice; `doctor`, below, sees it.

# %%
from bilevel import Proximal

random_network = problem_from(impure, impure, regularizer=Proximal(2.0))
few_steps = GradientDescent(lr=0.05, max_steps=100)
try:
    hypergradient(random_network, weights, net_task, inner_solver=few_steps, method=ImplicitCG())
except BilevelError as error:
    tell(f"{type(error).__name__}: {error}")

# %% [markdown]
# ### And a trap that PyTorch sets
#
# A pure network with normalisation can go wrong as well, if many tasks are stacked by hand. The
# gradient of each task is `vmap(grad(loss))`; differentiate that once more for a product with the
# Hessian, and compare with central differences of the same gradient:

# %%
from torch.func import vmap

weights, net = stateless(network(pure_norm, nn.Dropout(0.0)))
stacked = {k: w + 0.1 * randn(3, *w.shape, seed=20) for k, w in weights.items()}  # three tasks
direction = {k: randn(*w.shape, seed=30) for k, w in stacked.items()}
many_rows = randn(3, 6, 1, seed=40)


def loss(w, rows):
    return ((net(w, rows) - rows.sin()) ** 2).mean()


def gradient_by_vmap(w):
    return vmap(grad(loss))(w, many_rows)


def gradient_of_the_sum(w):
    total = vmap(loss)(w, many_rows).sum()
    return dict(
        zip(w, torch.autograd.grad(total, list(w.values()), create_graph=True), strict=True)
    )


def at(step):
    return {k: (w + step * direction[k]).requires_grad_() for k, w in stacked.items()}


def joined(tree):
    return torch.cat([leaf.detach().flatten() for leaf in tree.values()])


def product(gradient):
    w = at(0.0)
    slope = sum((g * direction[k]).sum() for k, g in gradient(w).items())
    return joined(dict(zip(w, torch.autograd.grad(slope, list(w.values())), strict=True)))


h = 1e-5
ahead, behind = joined(gradient_of_the_sum(at(h))), joined(gradient_of_the_sum(at(-h)))
differences = (ahead - behind) / (2 * h)
one, other = joined(gradient_by_vmap(at(0.0))), joined(gradient_of_the_sum(at(0.0)))
print("gradients agree to 1e-6:", bool((one - other).norm() < 1e-6 * other.norm()))
for gradient in (gradient_by_vmap, gradient_of_the_sum):
    off = ((product(gradient) - differences).norm() / differences.norm()).item()
    shown = f"{off:.0%}" if off > 1e-6 else "less than 1e-6"
    print(f"{gradient.__name__:20} product off by {shown}")

# %% [markdown]
# Both gradients are right, and one of the products is wrong, with no error and no warning. (It
# takes BatchNorm, InstanceNorm or LayerNorm with affine weights.) The library maps the objective,
# sums over tasks, and differentiates outside; see
# [Tasks and batching](../concepts/tasks.md#at-once-in-chunks-or-one-by-one).
#
# ## 4. The derivative never arrives
#
# Back to the bumps, with two things to choose: the ridge strength, and a weight for each training
# row. Somewhere a tensor becomes a number: `.item()`, `float()`, a `.detach()`, a `no_grad`.

# %%
import warnings


def weighted_misfit(z, x, batch):
    features, targets = batch
    misfits = (features @ z - targets).cosh().log()
    strength = x["log strength"].exp().item()  # here
    return (x["row weights"] * misfits).mean() + strength * (z**2).sum()


leaky = problem_from(
    inner_objective=weighted_misfit,
    outer_objective=lambda z, x, batch: misfit(z, batch),
    initial_inner=lambda x, batch: torch.zeros(12, dtype=torch.float64),
)
both = {
    "log strength": torch.tensor(-5.0, dtype=torch.float64),
    "row weights": torch.ones(15, dtype=torch.float64),
}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    result = hypergradient(leaky, both, task, inner_solver=to_the_end, method=ImplicitCG())
print("strength:", result.gradient["log strength"].item(), " status:", result.status[0].name)

# %% [markdown]
# Zero, and `CONVERGED`. The slope is $-0.0071$, as in the first part: at equal weights it is the
# same problem. Automatic differentiation cannot know of it, but the library says when nothing
# depends on a part of the outer variable, and names the part:

# %%
print(result.diagnostics.unused)
for one in caught:
    tell(f"{one.category.__name__}: {one.message}")

# %% [markdown]
# Where nothing depends on *any* part of it, there is an error, for such a training would go
# nowhere:

# %%
from bilevel import DependenceError

only_strength = problem_from(
    inner_objective=lambda z, x, batch: misfit(z, batch) + x.exp().item() * (z**2).sum(),
    outer_objective=lambda z, x, batch: misfit(z, batch),
    initial_inner=lambda x, batch: torch.zeros(12, dtype=torch.float64),
)
try:
    hypergradient(only_strength, x, task, inner_solver=to_the_end, method=ImplicitCG())
except DependenceError as error:
    tell(f"DependenceError: {error}")

# %% [markdown]
# ## All of them at once
#
# [`doctor`][bilevel.doctor.doctor] looks at a problem, its solver and its method before you train.
# It examines the four patients of this page:

# %%
from bilevel import doctor

patients = {
    "five inner steps": (fit, x, task, five_steps),
    "on the ridge": (valleys, x_ridge, None, downhill),
    "dropout and running statistics": (
        random_network,
        {name: w.detach() for name, w in module.named_parameters()},
        net_task,
        few_steps,
    ),
    "a lost derivative": (leaky, both, task, to_the_end),
}
for name, (problem, outer, data, inner_solver) in patients.items():
    diagnosis = doctor(
        problem, outer, data, inner_solver=inner_solver, method=ImplicitCG(rtol=1e-8)
    )
    print(name.upper())
    for finding in diagnosis.findings:
        tell(f"  {finding.severity}: {finding.kind}. {finding.found}.")
        tell(f"  → {finding.cure}.")
    print()

# %% [markdown]
# `print(diagnosis)` has the measured numbers as well; [A preflight](../concepts/doctor.md) lists
# all that is looked for.
#
# ## Habits
#
# 1. Give the inner solver a `tol`, and look at `result.ok`. [`Trainer`][bilevel.Trainer] looks, and
#    stops.
# 2. Call `doctor` before the first training, and again when the problem changes.
# 3. Ask for `error_estimate=True` now and then; and where inner steps are dear, for `correct=True`.
# 4. Put a small instance into your tests, with
#    [`assert_hypergradient`][bilevel.assert_hypergradient].
#
# [Can I trust this number?](../concepts/trust.md) has the mathematics, and what each of these
# costs.
