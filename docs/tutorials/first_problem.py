# %% [markdown]
# # Your first bilevel problem
#
# You fit a model to data. Something about the fit is not learned but chosen: how strongly large
# weights are punished, how much each example counts, where training starts. You choose it so that
# the fitted model does well on *other* data.
#
# These are two minimisations, one inside the other. That is all that *bilevel* means:
#
# - **inner**: for a given choice $x$, fit the weights $z$ to the training rows;
# - **outer**: choose $x$ so that the fitted weights $z^\star(x)$ do well on the validation rows.
#
# $$
# \min_x\; F(x) = f(x, z^\star(x)) \qquad\text{with}\qquad z^\star(x) = \arg\min_z\; g(x, z)
# $$
#
# $x$ is the *outer variable*, $z$ the *inner variable*; $f$ and $g$ are the *outer objective* and
# the *inner objective*. [Bilevel problems](../concepts/problems.md) has more on these words.
#
# For one number $x$ you could try twenty values and keep the best. For a thousand numbers you need
# the gradient $dF/dx$, *through the fit*. It is called the *hypergradient*. This page computes one,
# checks it, and walks downhill along it.
#
# ## Some data
#
# Thirty noisy points of a curve: fifteen to train on, fifteen to validate with. The model is a
# sum of twelve bumps, and the inner variable is their heights.

# %%
import torch

generator = torch.Generator().manual_seed(8)
time = 6 * torch.rand(30, generator=generator, dtype=torch.float64)
signal = time.sin() + 0.3 * torch.randn(30, generator=generator, dtype=torch.float64)


def bumps(time):
    centers = torch.linspace(0, 6, 12, dtype=torch.float64)
    return torch.exp(-2 * (time[:, None] - centers) ** 2)


train = (bumps(time[:15]), signal[:15])  # features [15, 12], targets [15]
validation = (bumps(time[15:]), signal[15:])

# %% [markdown]
# Twelve heights and fifteen noisy points: without a penalty the fit follows the noise, with too
# strong a penalty it is flat. The right strength is somewhere between, and it shall be found.
#
# ## The problem, in twenty lines

# %%
from bilevel import Task, hypergradient, problem_from
from bilevel.solvers import HessianFree, ImplicitCG


def error(weights, batch):
    features, targets = batch
    return ((features @ weights - targets) ** 2).mean()


problem = problem_from(
    inner_objective=lambda z, x, batch: error(z, batch) + (x.exp() * z**2).sum(),
    outer_objective=lambda z, x, batch: error(z, batch),
    initial_inner=lambda x, batch: torch.zeros(12, dtype=torch.float64),
)
task = Task(inner_batch=train, outer_batch=validation)
solver, method = HessianFree(), ImplicitCG()
x = torch.tensor(1.0, dtype=torch.float64)  # the logarithm of the strength
result = hypergradient(problem, x, task, inner_solver=solver, method=method)
print(f"{result.gradient.item():.4f}")

# %% [markdown]
# Both objectives are functions of `(inner, outer, batch)` that return one number. The
# [task](../concepts/tasks.md) holds the data: the inner objective sees `inner_batch`, the outer one
# `outer_batch`. `initial_inner` says where the fit starts. The strength is $e^x$, so that it is
# positive for any $x$.
#
# Two things are left to choose, and each can be swapped without touching the problem: an
# [inner solver](../concepts/inner-solvers.md) that does the fitting, and a
# [hypergradient method](../concepts/hypergradients.md) that differentiates what came out.
#
# The answer is positive: where $x = 1$, a weaker penalty lowers the validation error.
#
# ## What the number means
#
# It is the slope of the validation error as a function of $x$, *with the weights fitted anew for
# every $x$*. So it can be had another way: fit twice more, a little to the left and a little to
# the right.

# %%
from bilevel import solve_inner


def validation_error(x):
    fitted = solve_inner(problem, x, task, inner_solver=solver)
    return error(fitted.inner, validation).item()


h = 0.01
slope = (validation_error(x + h) - validation_error(x - h)) / (2 * h)
print(f"from two more fits  {slope:.4f}")
print(f"hypergradient       {result.gradient.item():.4f}")

# %% [markdown]
# The two agree. But differences take two fits for *each* entry of $x$, while the hypergradient
# takes the one fit, and one linear system of equations, whatever the size of $x$.
#
# ??? note "Where the linear system comes from"
#     At the solution the inner gradient vanishes, $\partial_z g(x, z^\star(x)) = 0$, and it goes on
#     vanishing as $x$ changes. Differentiate that in $x$:
#
#     $$
#     H\,\frac{dz^\star}{dx} + \partial_x \partial_z g = 0
#     \qquad\text{with}\qquad H = \partial_{zz}^2 g .
#     $$
#
#     The chain rule needs this derivative only in the direction of $\partial_z f$, so one solve is
#     enough:
#
#     $$
#     H v = \partial_z f, \qquad \frac{dF}{dx} = \partial_x f - (\partial_x \partial_z g)^\top v .
#     $$
#
#     $v$ is called the *adjoint*. `ImplicitCG` finds it by conjugate gradients, from products of
#     $H$ with vectors alone; each costs about as much as a gradient. How the fit was found does
#     not enter. This is [implicit differentiation](../concepts/hypergradients.md#implicit-methods).
#
# ## What else the result says
#
# A number alone cannot tell whether it was computed well. The result can.

# %%
print(result)
print()
print("ok           ", result.ok)
print("status       ", result.status[0].name)
print("outer value  ", f"{result.outer_value.item():.4f}")
print("cost         ", result.diagnostics.counts)

# %% [markdown]
# - **`status`** says how the two solves ended, decided by their residuals. `CONVERGED`: both did
#   what was asked of them. `ok` is the short form. There are
#   [six statuses](../concepts/results.md#status).
# - The **inner residual** is $\|\partial_z g\|$ where the fit ended; at a minimum it is zero.
# - The **linear residual** is $\|\partial_z f - Hv\|$ relative to $\|\partial_z f\|$: how well the
#   adjoint solves its system.
# - **`counts`** is what it cost, in gradients of $g$, products with $H$, and values of $g$ or $f$.
#
# `result.inner` holds the fitted weights, and `result.outer_value` the validation error.
#
# ## Check it before you use it
#
# On a problem of this size nothing has to be believed.
# [`check_hypergradient`][bilevel.check_hypergradient] solves the inner problem to the last digit,
# builds the matrices and solves with them, and vouches for *that* by finite differences.

# %%
from bilevel import check_hypergradient

check = check_hypergradient(problem, x, task, inner_solver=solver, method=method, rtol=1e-4)
assert check.ok, check
print("agrees with dense algebra to 1e-6: ", check.error < 1e-6)
print("dense algebra agrees with differences: ", check.reference_ok)

# %% [markdown]
# `print(check)` shows a whole report. It is worth most where something is wrong. Suppose that you
# are in a hurry, and fit by three steps of gradient descent:

# %%
from bilevel.solvers import GradientDescent

hasty = check_hypergradient(
    problem,
    x,
    task,
    inner_solver=GradientDescent(lr=0.1, max_steps=3),
    method=method,
    rtol=1e-4,
)
print(f"ok: {hasty.ok}, the hypergradient is off by {hasty.error:.1%}")
for sentence in hasty.advice:
    print("→", sentence)

# %% [markdown]
# More ways to go wrong, and how to see them coming, are on
# [a page of their own](when_it_lies.md).
#
# ## Walk downhill
#
# A hypergradient is a gradient, so any optimizer of PyTorch can use it. `set_grad` puts it where
# `loss.backward()` would.

# %%
optimizer = torch.optim.SGD([x], lr=10.0)
path = []
for step in range(8):
    result = hypergradient(problem, x, task, inner_solver=solver, method=method)
    assert result.ok, result.summary()
    path.append((x.item(), result.outer_value.item(), result.gradient.item()))
    result.set_grad(x)
    optimizer.step()
    print("step {}   x {:6.3f}   validation error {:.4f}   slope {:7.4f}".format(step, *path[-1]))

# %% [markdown]
# The rate of 10 was a lucky guess. Where the data are the same at every step, there is nothing to
# guess: [`minimize`][bilevel.minimize.minimize] searches for the length of each step, and decides
# how accurately each fit has to be solved.

# %%
from bilevel import minimize

found = minimize(
    problem, torch.tensor(1.0, dtype=torch.float64), task, inner_solver=solver, method=method
)
print(found.status.name)
print(f"x {found.outer.item():.3f}, validation error {found.value:.4f}")

# %% [markdown]
# ## Look at it
#
# One number $x$ makes a problem of which the whole answer can be drawn.
#
# ![Left: the validation error against x is a valley; a straight line, the hypergradient, touches it
# at the start, dots go downhill step by step, and a star marks the minimum. Right: three fits to
# the same points, one that follows the noise, one that is flat, and the one found between
# them](first_problem_curve.png)
#
# Left, the valley: the hypergradient is the tangent, dots are the steps of the optimizer, the star
# is what `minimize` found. Right, the fits at its left end, at the start and at the minimum. What
# drew it:

# %%
import matplotlib.pyplot as plt

INK, BLUE, ORANGE, GREEN, RED = "#1e293b", "#2563eb", "#d97706", "#15803d", "#be123c"
figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 4.0), layout="constrained")
for axes in (left, right):
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#94a3b8")
    axes.tick_params(colors="#475569")

grid = torch.cat([torch.linspace(-8, -4.2, 12), torch.linspace(-4, 2, 37)]).double()
left.plot(grid, [validation_error(one) for one in grid], color=INK, lw=1.8)
steps_x, values, slopes = zip(*path, strict=True)
tangent = torch.tensor([steps_x[0] - 2.4, steps_x[0] + 0.9])
left.plot(tangent, values[0] + slopes[0] * (tangent - steps_x[0]), color=RED, lw=2.2)
left.text(-1.6, 0.335, "hypergradient", color=RED, ha="right")
left.plot(steps_x, values, "o", color=BLUE, ms=6.5, mec="white", zorder=3)
left.text(1.25, 0.52, "start", color=BLUE)
left.plot(found.outer, found.value, "*", color=GREEN, ms=17, mec="white", zorder=4)
left.text(found.outer, 0.075, "minimum", color=GREEN, ha="center")
left.set_xlabel("x, the logarithm of the strength", color=INK)
left.set_title("validation error of the fitted model", color=INK, fontsize=10.5, loc="left")
left.set_ylim(0.06, 0.64)

fine = torch.linspace(0, 5.8, 200, dtype=torch.float64)
for value, color, name in [
    (-8.0, ORANGE, "x = −8, too weak"),
    (1.0, BLUE, "x = 1, too strong"),
    (found.outer.item(), GREEN, f"x = −{abs(found.outer.item()):.1f}, found"),
]:
    at = torch.tensor(value, dtype=torch.float64)
    heights = solve_inner(problem, at, task, inner_solver=solver).inner
    right.plot(fine, bumps(fine) @ heights, color=color, lw=2, label=name)
right.plot(time[:15], signal[:15], "o", color=INK, ms=5, label="training rows")
right.plot(time[15:], signal[15:], "o", color=INK, mfc="white", ms=5, label="validation rows")
right.set_xlabel("time", color=INK)
right.set_title("three fits", color=INK, fontsize=10.5, loc="left")
right.set_ylim(-2.0, 2.7)
right.legend(frameon=False, fontsize=8.5, ncols=2, loc="upper center")
figure.savefig("first_problem_curve.png", dpi=116)

# %% [markdown]
# ## Twelve numbers instead of one
#
# Twenty values for each of twelve strengths would be $20^{12}$ fits. A hypergradient does not mind:
# give every bump a strength of its own, and nothing changes in the problem, `x` is a vector now.
# [`Trainer`][bilevel.Trainer] is the loop from above, with any optimizer, a record of each step,
# and a policy for [solves that fail](../concepts/training.md).

# %%
from bilevel import Trainer

trainer = Trainer(
    problem,
    inner_solver=solver,
    method=method,
    optimizer=lambda params: torch.optim.Adam(params, lr=0.5),
)
strengths = found.outer.repeat(12)
records = trainer.fit(strengths, task, steps=10)


def distance_to_the_curve(x):
    heights = solve_inner(problem, x, task, inner_solver=solver).inner
    return ((bumps(fine) @ heights - fine.sin()) ** 2).mean().item()


print(
    f"validation error       one strength {found.value:.3f}  twelve {records[-1].outer_value:.3f}"
)
one, twelve = distance_to_the_curve(found.outer), distance_to_the_curve(strengths)
print(f"error without noise    one strength {one:.3f}  twelve {twelve:.3f}")

# %% [markdown]
# The second line compares with the curve that the noise hides, which only an invented example
# knows. With real data keep a third part for it: the more numbers are chosen by the validation
# rows, the less those rows are unseen.
#
# ## Where to go from here
#
# - [Swap the method](swap_the_method.md): six ways to the same hypergradient, and what they cost.
# - [When implicit differentiation lies](when_it_lies.md): silent failures, and how to see them.
# - [Bilevel problems](../concepts/problems.md): data weights, learned initialisations, synthetic
#   examples, taxes; and what an objective has to be.
# - [Tasks and batching](../concepts/tasks.md): many inner problems at once.
