# %% [markdown]
# # Numerical accuracy
#
# Three errors enter every hypergradient: the inner problem is not quite solved, the adjoint system
# is not quite solved, and every operation rounds. [Can I trust this number?](../concepts/trust.md)
# shows how to have the first two estimated. This page is about what stands behind the settings:
# which dtype, which tolerances, what a residual says and what it does not, and what the options
# that touch digits do.
#
# In short:
#
# | You see | Cause | Cure |
# |---|---|---|
# | `MAX_STEPS` in float32 | rounding, times the condition | `refine=True`, or float64 |
# | `CONVERGED`, but far away | `tol` is absolute, the objective small | a lower `tol` |
# | finite differences disagree | the step, or the inner tolerance | tighter solves, a larger step |
# | a smooth run with a wrong limit | damping | no damping; the proximal strength |
# | other last digits | another engine, thread count, card | [why](reproducibility.md) |
#
# ## float32 or float64
#
# float32 keeps 7 digits, float64 16. A linear solve loses as many of them as the [condition
# number](glossary.md#condition-number) $\kappa$ has: in float32 at $\kappa = 10^4$, three digits
# may be left. Here are adjoint systems of rising condition number, the inner solution given
# exactly, so that all the error is rounding in the linear solve:

# %%
import torch

from bilevel import Task, hypergradient, problem_from
from bilevel.solvers import ImplicitCG

problem = problem_from(
    inner_objective=lambda z, x, batch: 0.5 * z @ (batch["A"] @ z) - z @ x,
    outer_objective=lambda z, x, batch: 0.5 * ((z - batch["target"]) ** 2).sum(),
    initial_inner=lambda x, batch: torch.zeros_like(x),
)


def system(condition, n=40):
    """A matrix with eigenvalues from 1 down to 1/condition, an inner solution, and a target."""
    random = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=random, dtype=torch.float64))
    eigenvalues = torch.tensor(1 / condition, dtype=torch.float64) ** torch.linspace(0, 1, n)
    matrix = ((basis * eigenvalues) @ basis.T).float()
    target, z = torch.randn(2, n, generator=random)
    return (matrix + matrix.T) / 2, z, target


def solved(condition, dtype, **options):
    """The hypergradient, and its error against a dense solve in float64."""
    matrix, z, target = system(condition)
    exact = torch.linalg.solve(matrix.double(), (z - target).double())
    batch = {"A": matrix.to(dtype), "target": target.to(dtype)}
    result = hypergradient(
        problem,
        (matrix @ z).to(dtype),
        Task(batch, batch),
        inner_solver=None,
        inner=z.to(dtype),
        method=ImplicitCG(max_steps=500, rtol=1e-6, **options),
    )
    return result, ((result.gradient.double() - exact).norm() / exact.norm()).item()


conditions = [1e1, 1e2, 1e3, 1e4, 1e5]
runs = {
    "float32": {"dtype": torch.float32},
    "float32, refined": {"dtype": torch.float32, "refine": True},
    "float64": {"dtype": torch.float64},
}
curves = {name: [solved(c, **options) for c in conditions] for name, options in runs.items()}

for name, runs_of_it in curves.items():
    result, error = runs_of_it[3]
    found = "below 1e-5" if error < 1e-5 else "above 1e-5"
    status = result.diagnostics.linear.status[0].name
    print(f"condition 1e4, {name:17} {status:10} error {found}")

# %% [markdown]
# ![Relative error of the hypergradient against the condition number, both logarithmic: float32
# rises along a line of slope one, below the line of kappa times rounding; float32 refined and
# float64 stay flat](accuracy_dtypes.png)
#
# Plain float32 stays below the line $\kappa \cdot 6 \cdot 10^{-8}$, which is what can be promised,
# and rises with it. It is not silent: the status comes from the true residual, so a solve that
# stalls above its tolerance says `MAX_STEPS`.
#
# **`refine=True`** is iterative refinement (Wilkinson, 1963): the residual $b - Hv$ is evaluated in
# float64, the correction is solved for in float32, and the sum kept in float64. It costs a few
# products in float64, and does nothing for a problem that is in float64. What it mends is the
# adjoint, not the inner point: if $z$ was found in float32, then $z$ is off by what float32 left
# there, and only float64 (or `correct=True`) helps.
#
# A rule: float32 up to $\kappa = 10^4$, `refine=True` above, float64 wherever something is compared
# (checks, tests, figures). `diagnostics.linear.ritz` holds a lower bound on $\kappa$ at no cost.
#
# ## A residual is not an error
#
# Solvers stop by residuals, because residuals can be computed. With $r = b - Hv$ the error is
# $v - v^\star = -H^{-1} r$: each part of the residual is divided by the curvature in its direction.
# So
#
# $$
# \frac{\|v - v^\star\|}{\|v^\star\|} \le \kappa\, \frac{\|r\|}{\|b\|} ,
# $$
#
# and anything in between may happen. Two vectors with one and the same residual, at
# $\kappa = 1000$:

# %%
matrix, z, target = (one.double() for one in system(1000.0))
eigenvalues, basis = torch.linalg.eigh(matrix)
b = z - target
v = torch.linalg.solve(matrix, b)
for name, where in (("stiff", -1), ("soft", 0)):
    direction, curvature = basis[:, where], eigenvalues[where]
    other = v + 1e-3 * b.norm() * direction / curvature
    residual = (b - matrix @ other).norm() / b.norm()
    error = (other - v).norm() / v.norm()
    print(f"off along the {name:5} direction: residual {residual:.1e}, error {error:.1e}")

# %% [markdown]
# The second error is a thousand times the first. `error_estimate=True` closes the gap: it solves
# for the error, and reports that.
#
# ## Tolerances
#
# | Setting | Of | Relative to | Judged by |
# |---|---|---|---|
# | `tol` | inner solver | nothing: absolute | $\Vert\partial_z G\Vert$ at the returned point |
# | `rtol` | linear solver | $\Vert\partial_z f\Vert$ of each task | the true, undamped residual |
# | `accuracy` | `compare` | the hypergradient's norm | the error itself |
#
# An absolute tolerance has the units of the objective. Multiply the objective by a thousandth,
# which changes neither the solution nor the hypergradient, and the same `tol` is a thousand times
# looser:

# %%
import warnings

from bilevel import solve_inner
from bilevel.solvers import GradientDescent

curvatures = torch.tensor([1.0, 0.1], dtype=torch.float64)
x = torch.ones(2, dtype=torch.float64)
for unit in (1.0, 1e-3):
    scaled = problem_from(
        inner_objective=lambda z, x, batch, unit=unit: unit * (curvatures * (z - x) ** 2).sum() / 2,
        outer_objective=lambda z, x, batch: (z**2).sum(),
        initial_inner=lambda x, batch: torch.zeros_like(x),
    )
    descent = GradientDescent(lr=0.5 / unit, max_steps=1000, tol=1e-3)
    found = solve_inner(scaled, x, inner_solver=descent)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hypergradient(scaled, x, inner_solver=descent, method=ImplicitCG())
    error = (found.inner - 1).norm() / 2**0.5
    told = "warned" if caught else "no warning"
    print(f"objective × {unit:<5g}  {found.status[0].name}  inner error {error:.0e}  {told}")

# %% [markdown]
# The library notices where it can: the adjoint solve has met the curvature, and residual over
# curvature is a distance. So `hypergradient` warns.
#
# Some rules for choosing tolerances:
#
# - The error is *linear* in the inner error, and adds the linear one ([derived
#   here](first_principles.md#how-wrong-at-a-point-that-is-not-the-solution)). Spend on the larger
#   part; `diagnostics.inner_error` and `linear_error` say which it is.
# - With `correct=True` the inner error enters squared: half the digits of the inner solve are
#   enough.
# - For training, 1 to 10 % is plenty. For line searches and second derivatives, see
#   [`minimize`](../concepts/training.md#minimize-a-deterministic-problem), which chooses as it
#   goes.
# - `GradientDescent` and its kind look at `tol` every 10 steps, `LBFGS` and `HessianFree` at every
#   step: "converged after 30 steps" may mean 21.
# - A tolerance below rounding is never met. In float32 do not ask for a `tol` below about $10^{-7}$
#   times the size of the terms that cancel in $\partial_z G$.
#
# ## Finite differences
#
# The check that everybody knows, $(F(x+h) - F(x-h)) / 2h$, has two errors that pull in opposite
# directions. The formula is off by a multiple of $h^2$; the values are off by a noise
# $\varepsilon$, which is divided by $h$:
#
# $$
# \text{error} \approx c\,h^2 + \frac{\varepsilon}{h}, \qquad \text{least at}\quad
# h \approx \left(\frac{\varepsilon}{2c}\right)^{1/3} .
# $$
#
# On logarithmic axes that is a V. The spring of [the first page](first_principles.md#a-valley):


# %%
def spring(x, tolerance):
    """F(x) = f(x, z*(x)), by gradient descent to a tolerance."""
    z = torch.zeros_like(x)
    for _ in range(150):
        slope = z**3 + z - x
        if slope.abs() <= tolerance:
            break
        z = z - 0.3 * slope
    return (z - 1) ** 2 / 2 + x**2 / 40


z = torch.tensor(1.0, dtype=torch.float64)
for _ in range(30):
    z = z - (z**3 + z - 1) / (3 * z**2 + 1)
slope = (1 / 20 + (z - 1) / (3 * z**2 + 1)).item()


def difference_error(step, tolerance=0.0, dtype=torch.float64, forward=False):
    at = torch.tensor(1.0, dtype=dtype)
    ahead = spring(at + step, tolerance)
    behind = spring(at if forward else at - step, tolerance)
    return abs((ahead - behind).item() / (step if forward else 2 * step) / slope - 1)


print("step   forward  central")
for step in (1e-1, 1e-2, 1e-3):
    print(f"{step:.0e}  {difference_error(step, forward=True):.1e}  {difference_error(step):.1e}")
print(f"inner tolerance 1e-4, step 1e-5: {difference_error(1e-5, tolerance=1e-4):.1e}")

# %% [markdown]
# Each decade of $h$ brings one digit by forward differences, two by central ones, until rounding
# takes over:
#
# ![Error of finite differences against the step, both logarithmic. Central differences with a tight
# inner solve form a V with its lowest point at ten digits, for a step near 1e-5; forward ones a V
# at eight digits; central ones in float32 a V at four. With an inner tolerance of 1e-4 there is a
# plateau at two digits, and a jump above it](accuracy_differences.png)
#
# In a bilevel problem the *inner solver* is in the way, too. Look at the curve for an inner
# tolerance of 1e-4. For a small $h$ both solves stop after the same number of steps. Then the
# differences converge nicely: to the derivative of the *procedure*, which is what unrolling
# computes, and which is off by 0.2 % here. For a larger $h$ one solve takes a step more than the
# other, $F$ jumps, and the jump is divided by $h$. So a loose inner solve can make differences
# agree with a wrong hypergradient, or disagree with a right one.
# [`check_hypergradient`](../concepts/checking.md) solves the inner problem anew by Newton's method
# in float64, and takes central differences at $h = 10^{-5}$.
#
# ## Damping
#
# `damping` adds $\delta I$ to the matrix of the adjoint system. Conjugate gradients then need fewer
# steps, since the condition number is $(L + \delta)/(\mu + \delta)$. But it is another system:
# along a direction of curvature $c$ the adjoint is multiplied by $c / (c + \delta)$, and soft
# directions are all but deleted. At $\kappa = 1000$, with curvatures from 0.001 to 1:

# %%
print("damping  steps  error  cosine  status")
for damping in (0.0, 1e-4, 1e-3, 1e-2, 1e-1):
    result, error = solved(1000.0, torch.float64, damping=damping)
    exact = solved(1000.0, torch.float64)[0].gradient
    cosine = (result.gradient @ exact) / (result.gradient.norm() * exact.norm())
    error = "none" if error < 1e-5 else f"{error:.0%}"
    steps = result.diagnostics.linear.steps.item()
    name = result.diagnostics.linear.status[0].name
    print(f"{damping:<7g}  {steps:5}  {error:>5}  {cosine:6.3f}  {name}")

# %% [markdown]
# Fewer steps, and a bias: a damping as small as the smallest curvature already costs 39 %. The
# residual that is reported is that of the *undamped* system, so that the status tells. The
# [proximal regularizer](../concepts/regularizer.md) conditions the system just as well, and belongs
# to the problem: its hypergradient is exact. That is the difference between the two. Damping is for
# directions in which curvature is noise.
#
# ## Low precision on purpose
#
# The inner solve needs many gradients, and most of them are far from the solution, where digits do
# not matter. `Kernels(precision="bf16")` (or `"tf32"`, on CUDA) rounds the inner solver's steps,
# and nothing else: residuals, Hessian products and the adjoint solve keep their precision, so that
# statuses and error estimates see what rounding did. `correct=True` then takes one Newton step in
# full precision.

# %%
from bilevel import Kernels
from bilevel.problems import Logistic
from bilevel.solvers import LBFGS

example = Logistic.generated(features=40, spread=3.0, dtype=torch.float32)
tight = Logistic.generated(features=40, spread=3.0)
exact = hypergradient(
    tight.problem,
    tight.outer,
    tight.task,
    inner_solver=LBFGS(tol=1e-10),
    method=ImplicitCG(rtol=1e-10),
).gradient

for precision, correct in (("full", False), ("bf16", False), ("bf16", True)):
    found = hypergradient(
        example.problem,
        example.outer,
        example.task,
        inner_solver=GradientDescent(lr=1 / example.lipschitz, max_steps=100),
        method=ImplicitCG(rtol=1e-6, correct=correct),
        kernels=Kernels(precision=precision),
    ).gradient
    error = ((found.double() - exact).norm() / exact.norm()).item()
    digits = "below 1e-5" if error < 1e-5 else "between 1e-4 and 1e-2"
    assert error < 1e-5 or 1e-4 < error < 1e-2
    print(f"{precision}{', corrected' if correct else '':12} error {digits}")

# %% [markdown]
# Three digits come from the rounded steps, and one solve brings the others back. Solvers that
# compare values of the objective (`LBFGS`, `BacktrackingDescent`, `HessianFree`) refuse low
# precision, as does `Unrolled`, which would differentiate the rounding.
#
# Outside `Kernels`, TF32 is switched off inside Hessian products and restored afterwards, whatever
# the global setting; inner products of vectors accumulate in float64.
#
# ## The same twice
#
# On one machine, the same call gives the same bits. Stacking, chunks, thread counts and other cards
# change the order of sums, and so the last digits:

# %%
task = Logistic.generated(features=20, tasks=4, dtype=torch.float32)
both = [
    hypergradient(
        task.problem,
        task.outer,
        task.task,
        inner_solver=GradientDescent(lr=1 / task.lipschitz, max_steps=50),
        method=ImplicitCG(),
        engine=engine,
    ).gradient
    for engine in ("batched", "batched", "loop")
]
gap = (both[0] - both[2]).norm() / both[0].norm()
print("the same call again: the same bits:", torch.equal(both[0], both[1]))
print("another engine: within 1e-5:", bool(gap < 1e-5))

# %% [markdown]
# What is equal to the bit and what is not: [reproducibility](reproducibility.md).
#
# ## The code of the pictures

# %%
from matplotlib.figure import Figure

COLORS = ("#d97706", "#15803d", "#2563eb", "#be123c")


def new_axes(x, y):
    figure = Figure(figsize=(7, 3.5), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel(x, color="#1e293b")
    axes.set_ylabel(y, color="#1e293b")
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#94a3b8")
    axes.tick_params(colors="#475569")
    return figure, axes


figure, axes = new_axes("condition number κ", "relative error of the hypergradient")
axes.plot(conditions, [6e-8 * c for c in conditions], ":", color="#64748b", label="κ · 6e-8")
for (name, pairs), color, marker in zip(curves.items(), COLORS, "os^", strict=False):
    errors = [max(error, 1e-9) for _, error in pairs]
    axes.plot(conditions, errors, marker=marker, color=color, lw=2, label=name)
axes.set_ylim(5e-10, 3e-2)
axes.legend(frameon=False, fontsize=10)
figure.savefig("accuracy_dtypes.png", dpi=120)

figure, axes = new_axes("step h", "relative error")
steps = [10 ** (-k / 3) for k in range(1, 37)]
for (name, options), color in zip(
    {
        "central, inner tolerance 1e-4": {"tolerance": 1e-4},
        "central, tight": {},
        "forward, tight": {"forward": True},
        "central, float32": {"dtype": torch.float32},
    }.items(),
    COLORS,
    strict=True,
):
    errors = [max(difference_error(step, **options), 1e-12) for step in steps]
    axes.plot(steps, errors, color=color, lw=1.8, label=name)
axes.set_ylim(1e-12, 1e4)
axes.legend(frameon=False, fontsize=9, loc="upper center", ncols=2)
figure.savefig("accuracy_differences.png", dpi=120)
