# %% [markdown]
# # Hypergradients from first principles
#
# A hypergradient is the derivative of *what training gives* in *how training was set up*. This page
# derives it, first in one dimension, where everything can be drawn, then in many. You need the
# chain rule, and to know what a Hessian is. After each derivation a few lines of code confirm it,
# in plain PyTorch and with the library.
#
# ## A valley
#
# Think of a landscape $g(x, z)$: $x$ says where you stand along a valley, $z$ where you stand
# across it. You choose $x$. Then a ball is let go, and rolls across the valley to its floor:
#
# $$z^\star(x) = \arg\min_z\; g(x, z) .$$
#
# That is the *inner* problem, and $g$ the *inner objective*. What you care about is another
# function, the *outer objective* $f(x, z)$, at the place where the ball lies. So what you minimise
# is
#
# $$F(x) = f(x, z^\star(x)) ,$$
#
# a function of $x$ alone. Its derivative $dF/dx$ is the **hypergradient** ([other
# names](glossary.md#hypergradient)).
#
# With $x$ a weight decay, $z$ the weights of a model, $g$ the training loss and $f$ the validation
# loss, this is hyperparameter optimization. [Other readings](../concepts/problems.md) are data
# weights, a learned initialisation, a tax. For the pictures,
#
# $$
# g(x, z) = \tfrac14 z^4 + \tfrac12 z^2 - xz, \qquad
# f(x, z) = \tfrac12 (z - 1)^2 + \tfrac1{40} x^2 :
# $$
#
# a spring that stiffens as it is stretched, under a load $x$; $f$ wants it stretched to 1, and
# loads cost something.
#
# ![Left: contour lines of g form a curved valley in the plane of x and z, its floor drawn as a
# line. Middle: three slices of g across the valley, each with its lowest point marked. Right: F,
# the value of f along the floor, with its tangent at x = 1, which
# falls](first_principles_valley.png)
#
# ## Direct plus indirect
#
# Move $x$ a little. $f$ changes for two reasons: it contains $x$, and the floor has moved under the
# ball. By the chain rule,
#
# $$
# \frac{dF}{dx} = \underbrace{\frac{\partial f}{\partial x}}_{\text{direct}} +
#   \underbrace{\frac{\partial f}{\partial z} \, \frac{dz^\star}{dx}}_{\text{indirect}} .
# $$
#
# Only $dz^\star/dx$ is not at hand: $z^\star$ is found by an algorithm, and has no formula. But we
# know what it *satisfies*. On the floor the slope across the valley is zero, $\partial_z g = 0$.
# That holds for every $x$, so it stays true while $x$ moves: what the move of $x$ adds to the
# slope, the move of $z$ must take away again,
#
# $$
# \frac{\partial^2 g}{\partial z \partial x}\, dx + \frac{\partial^2 g}{\partial z^2}\, dz = 0
# \qquad\Longrightarrow\qquad
# \frac{dz^\star}{dx} = - \frac{\partial^2 g / \partial z \partial x}{\partial^2 g / \partial z^2} .
# $$
#
# Read it aloud: the floor moves by *how hard $x$ pushes the slope*, divided by *how stiff the
# valley is*. In the left picture, the curve is the slope $\partial_z g$ along one slice. A step of
# $x$ lowers it, and the zero moves to the right until the curve has climbed back. A steep curve (a
# stiff valley) needs a short way, a flat one a long way, and for a level one no way is long enough.
# Remember that last one for [the end](#what-breaks).
#
# ![Left: the slope of g across the valley at x = 1 and at x = 1.5, two rising curves; an arrow down
# is the push of x, an arrow to the right is how far the zero moves. Right: three curves through one
# point, F falling, f with z held fixed rising, f with x held fixed falling more
# steeply](first_principles_slopes.png)
#
# The right picture is a warning. The direct slope is positive, the indirect one negative and
# larger: who leaves out the indirect part walks the wrong way.
#
# In code. The floor is found by Newton's method, and autograd gives every derivative in the
# formula:

# %%
import torch
from torch.autograd import grad

torch.set_default_dtype(torch.float64)


def g(x, z):
    return z**4 / 4 + z**2 / 2 - x * z


def f(x, z):
    return (z - 1) ** 2 / 2 + x**2 / 40


def floor(x):
    """The z with z³ + z = x."""
    z = torch.zeros_like(x)
    for _ in range(30):
        z = z - (z**3 + z - x) / (3 * z**2 + 1)
    return z


x = torch.tensor(1.0, requires_grad=True)
z = floor(x.detach()).requires_grad_()

(slope,) = grad(g(x, z), z, create_graph=True)  # zero on the floor
stiffness, push = grad(slope, (z, x))
direct, pull = grad(f(x, z), (x, z))

dz_dx = -push / stiffness
indirect = pull * dz_dx
print(f"dz*/dx = {dz_dx:.4f}")
print(f"dF/dx  = {direct:.4f} + ({pull:.4f} · {dz_dx:.4f}) = {direct + indirect:.4f}")

# %% [markdown]
# No derivative of `floor` was taken. Is it right? Solve the inner problem at two neighbouring $x$
# and take the difference:

# %%
with torch.no_grad():
    step = 1e-4
    F = [f(x + s, floor(x + s)) for s in (step, -step)]
print(f"dF/dx  = {(F[0] - F[1]) / (2 * step):.4f}, by differences")

# %% [markdown]
# The library does the same for any problem, however the inner solution is found. Here 200 steps of
# gradient descent find it, and [`ImplicitCG`][bilevel.solvers.ImplicitCG] applies the formula:

# %%
from bilevel import hypergradient, problem_from
from bilevel.solvers import GradientDescent, ImplicitCG

spring = problem_from(
    inner_objective=lambda z, x, batch: g(x, z),
    outer_objective=lambda z, x, batch: f(x, z),
    initial_inner=lambda x, batch: torch.zeros_like(x),
)
result = hypergradient(
    spring,
    torch.tensor(1.0),
    inner_solver=GradientDescent(lr=0.3, max_steps=200, tol=1e-10),
    method=ImplicitCG(),
)
print(f"dF/dx  = {result.gradient:.4f}, {result.status[0].name}")

# %% [markdown]
# ## Many dimensions
#
# Now $x$ has $d$ entries and $z$ has $n$. The argument is the same, with matrices. Let
#
# $$
# H = \partial^2_{zz} g \in \mathbb R^{n \times n}, \qquad
# C = \partial_x \partial_z g \in \mathbb R^{n \times d}, \qquad
# b = \partial_z f \in \mathbb R^n,
# $$
#
# all at $(x, z^\star(x))$: the *inner Hessian*, the *mixed derivative*, and the slope of $f$ in the
# inner variable.
#
# !!! abstract "Implicit function theorem"
#     Let $g$ be twice continuously differentiable, $\partial_z g(x_0, z_0) = 0$, and $H$ invertible
#     at $(x_0, z_0)$. Then near $x_0$ there is exactly one function $z^\star$ with
#     $z^\star(x_0) = z_0$ and $\partial_z g(x, z^\star(x)) = 0$. It is differentiable, with
#     $dz^\star/dx = -H^{-1} C$.
#
# The existence takes a page (any book on analysis has it); the formula takes a line. Differentiate
# the identity $\partial_z g(x, z^\star(x)) = 0$ in $x$:
#
# $$
# C + H \frac{dz^\star}{dx} = 0
# \qquad\Longrightarrow\qquad \frac{dz^\star}{dx} = -H^{-1} C ,
# $$
#
# and put it into the chain rule:
#
# $$
# \frac{dF}{dx} = \partial_x f + \left(\frac{dz^\star}{dx}\right)^{\!\top} b
#   = \partial_x f - C^\top H^{-1} b .
# $$
#
# Three things to notice. The theorem speaks of a *stationary point*; that it is a minimum we know
# only if $H$ is positive definite. It speaks of $z^\star$ *near* $x_0$: other minima elsewhere do
# not disturb it. And how $z^\star$ was found appears nowhere.
#
# An example with more to choose than to train: logistic regression on 30 rows with 6 features, and
# $x$ holds one weight for each training row. What is the derivative of the validation loss in the
# weight of row $i$?

# %%
random = torch.Generator().manual_seed(0)
rows, features = 30, 6
data = torch.randn(2 * rows, features, generator=random)
data = data * torch.tensor([2.0, 1.5, 1.0, 1.0, 0.7, 0.5])
labels = (data.sum(1) + torch.randn(2 * rows, generator=random)).sign()
train, held_out = (data[:rows], labels[:rows]), (data[rows:], labels[rows:])


def losses(z, batch):
    features, labels = batch
    return -torch.nn.functional.logsigmoid(labels * (features @ z))


def g(x, z):
    return (x * losses(z, train)).mean() + 0.05 * (z**2).sum()


def f(x, z):
    return losses(z, held_out).mean()


def derivatives(x, z):
    """∂_z g, H, C and b by autograd, one row at a time."""
    x, z = x.detach().requires_grad_(), z.detach().requires_grad_()
    (slope,) = grad(g(x, z), z, create_graph=True)
    pairs = [grad(entry, (z, x), retain_graph=True) for entry in slope]
    (b,) = grad(f(x, z), z)
    return slope.detach(), torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs]), b


x = torch.ones(rows)
z_star = torch.zeros(features)
for _ in range(20):  # Newton's method
    slope, H, C, b = derivatives(x, z_star)
    z_star = z_star - torch.linalg.solve(H, slope)
_, H, C, b = derivatives(x, z_star)
solution = z_star

dz_dx = -torch.linalg.solve(H, C)  # 30 right-hand sides
exact = dz_dx.T @ b  # f has no x in it: there is no direct part
print("dz*/dx is", " × ".join(map(str, dz_dx.shape)))
print(
    f"dF/dx is {exact.min():.4f} for row {exact.argmin()}, {exact.max():.4f} for {exact.argmax()}"
)

# %% [markdown]
# The first of the two rows helps most (more of its weight lowers the validation loss), the other
# does most harm. Column $i$ of $C$ is the gradient of the loss of row $i$ (over 30), so that entry
# $i$ of the result is $-\nabla \ell_i^\top H^{-1} \nabla f / 30$: the *influence function* of
# robust statistics (Koh and Liang, [2017](https://arxiv.org/abs/1703.04730)) is a hypergradient.
#
# ## The adjoint: one solve, not many
#
# `torch.linalg.solve(H, C)` solved thirty linear systems, one for each outer variable, and made a
# matrix that was then multiplied by one vector. With a million outer variables that is hopeless.
# But a product of three factors may be bracketed in two ways:
#
# $$
# \underbrace{\left(H^{-1} C\right)^\top}_{d \text{ solves}} b \;=\; C^\top
#   \underbrace{\left(H^{-\top} b\right)}_{\text{one solve}} .
# $$
#
# On the right, solve one system for one vector, the **adjoint** $v$, and pull it through $C$:
#
# $$
# H v = \partial_z f, \qquad \frac{dF}{dx} = \partial_x f - C^\top v
# $$
#
# (for a Hessian, $H^\top = H$). This is the same trade as between forward and reverse mode in
# automatic differentiation: one output, many inputs, so work from the output backwards. $C^\top v$
# needs no matrix either: it is the gradient in $x$ of the number $v^\top \partial_z g$, with $v$
# held fixed.

# %%
v = torch.linalg.solve(H, b)  # one right-hand side
leaf, z = x.clone().requires_grad_(), z_star.clone().requires_grad_()
(slope,) = grad(g(leaf, z), z, create_graph=True)
(pulled,) = grad(slope, leaf, v)

gap = (-pulled - exact).norm() / exact.norm()
print("relative difference", "below 1e-6" if gap < 1e-6 else f"{gap:.1e}")

# %% [markdown]
# **What the adjoint means.** Push the inner problem with a small force $\varepsilon$, so that it
# settles where $\partial_z g = \varepsilon$. The solution moves by $H^{-1} \varepsilon$, and $f$ by
# $b^\top H^{-1} \varepsilon = v^\top \varepsilon$. So $v$ is a price list: what a unit of each
# entry of $\partial_z g$ is worth in units of $f$. In constrained optimization such prices are
# Lagrange multipliers, and that is what it is: $v$ makes $f - v^\top \partial_z g$ stationary in
# $z$. In control and weather forecasting the same vector is called the adjoint state.
#
# ## Products, not matrices
#
# $H$ need not be built. A product $Hp$ is the gradient of the number $p^\top \partial_z g$, and
# costs about as much as two gradients (Pearlmutter, 1994). Conjugate gradients (Hestenes and
# Stiefel, 1952) solve $Hv = b$ from such products alone. The whole implicit method fits on a
# screen:


# %%
def implicit(x, z, steps):
    """The hypergradient at (x, z) by conjugate gradients, and the number of products."""
    x, z = x.detach().requires_grad_(), z.detach().requires_grad_()
    (slope,) = grad(g(x, z), z, create_graph=True)  # one graph for all products
    outer = f(x, z)
    (b,) = grad(outer, z, retain_graph=True)
    v, r, products = torch.zeros_like(b), b, 0
    p = r
    for _ in range(steps):
        if r.norm() <= 1e-10 * b.norm():
            break
        (Hp,) = grad(slope, z, p, retain_graph=True)
        alpha = (r @ r) / (p @ Hp)
        v, new = v + alpha * p, r - alpha * Hp
        p, r, products = new + (new @ new) / (r @ r) * p, new, products + 1
    (direct,) = grad(outer, x, materialize_grads=True, allow_unused=True)
    (pulled,) = grad(slope, x, v)
    return direct - pulled, products


def relative_error(found):
    return ((found - exact).norm() / exact.norm()).item()


def small(number):
    return "below 1e-6" if number < 1e-6 else f"{number:.1e}"


by_hand, products = implicit(x, z_star, steps=20)
print(f"by hand: error {small(relative_error(by_hand))}, {products} products, 30 entries")

# %% [markdown]
# Six products for thirty derivatives. The loop above has no answer to negative curvature, rounding,
# or many problems at once; [linear solvers](../concepts/linear-solvers.md) explains what the
# library adds. It finds the inner solution too:

# %%
from bilevel.solvers import LBFGS

weighted = problem_from(
    inner_objective=lambda z, x, batch: g(x, z),
    outer_objective=lambda z, x, batch: f(x, z),
    initial_inner=lambda x, batch: torch.zeros(features),
)
result = hypergradient(weighted, x, inner_solver=LBFGS(tol=1e-10), method=ImplicitCG(rtol=1e-10))
print(f"library: error {small(relative_error(result.gradient))}, status {result.status[0].name}")

# %% [markdown]
# ## The other route: unrolling
#
# There is another way to differentiate the ball's resting place: differentiate its way there.
# Gradient descent is a program,
#
# $$z_t = z_{t-1} - a\, \partial_z g(x, z_{t-1}), \qquad t = 1, \ldots, T,$$
#
# and automatic differentiation differentiates programs. Write $Z_t = dz_t / dx$. By the chain rule
#
# $$
# Z_t = (I - a H_{t-1})\, Z_{t-1} - a\, C_{t-1} ,
# $$
#
# with $H_{t-1}$ and $C_{t-1}$ taken at $z_{t-1}$. Forward mode runs this recursion beside the
# steps, with a matrix of $n \times d$ numbers. Reverse mode runs it backwards on one vector: start
# with $w_T = \partial_z f(z_T)$, and for $t = T, \ldots, 1$
#
# $$
# \frac{dF_T}{dx} \;\mathrel{+}=\; - a\, C_{t-1}^\top w_t, \qquad w_{t-1} = (I - a H_{t-1})\, w_t .
# $$
#
# The sum begins with $\partial_x f$; and if the start $z_0$ depends on $x$, what arrives at $w_0$
# is pulled through it, too, which is all of MAML (Finn, Abbeel and Levine,
# [2017](https://arxiv.org/abs/1703.03400)). The recursion needs the points $z_0, \ldots, z_{T-1}$
# in reverse order, so that memory grows with $T$: that is what unrolling costs ([how
# much](memory.md)). What it has for it: nothing was assumed. $dF_T/dx$ is the exact derivative of
# $F_T(x) = f(x, z_T(x))$, converged or not.
#
# **Both routes meet.** Suppose that $\|z_t - z^\star\| \le \rho^t e_0$ and
# $\|I - a H_t\| \le \rho < 1$ on the way, and that $H$ and $C$, as functions of $z$, have Lipschitz
# constants $M_H$ and $M_C$. The implicit derivative $Z^\star = -H^{-1} C$ is a fixed point of the
# recursion at the solution, $Z^\star = (I - aH) Z^\star - aC$. Subtract that from the recursion.
# The error $E_t = Z_t - Z^\star$ obeys
#
# $$
# E_t = (I - a H_{t-1})\, E_{t-1} - a \left[ (H_{t-1} - H)\, Z^\star + (C_{t-1} - C) \right] ,
# $$
#
# where the bracket is at most $M \rho^{t-1} e_0$ with $M = M_H \|Z^\star\| + M_C$. Hence
#
# $$
# \|E_t\| \le \rho^t \|E_0\| + t\, \rho^{t-1} a M e_0 .
# $$
#
# The derivative converges as fast as the iterates do, but for a factor $t$ (Gilbert, 1992; for many
# solvers Grazzi et al., [2020](https://arxiv.org/abs/2006.16218)): derivatives lag behind values.
# For a quadratic $g$ the bracket vanishes, and the factor $t$ with it. The spring shows the lag, in
# one dimension, by forward mode:

# %%
x, rate = torch.tensor(1.0), 0.1
z_star = floor(x)
Z_star = 1 / (3 * z_star**2 + 1)
z, Z = torch.tensor(0.0), torch.tensor(0.0)
lag = {}
for t in range(1, 61):
    z, Z = z - rate * (z**3 + z - x), (1 - rate * (3 * z**2 + 1)) * Z + rate
    there = 1 / (3 * z**2 + 1)  # the implicit formula at z_t
    lag[t] = [(abs(one) / Z_star).item() for one in (there - Z_star, Z - Z_star)]
print("steps  implicit  unrolled  ratio")
for t in (10, 20, 30, 40):
    implicit_error, unrolled_error = lag[t]
    ratio = unrolled_error / implicit_error
    print(f"{t:5}  {implicit_error:8.1e}  {unrolled_error:8.1e}  {ratio:5.1f}")

# %% [markdown]
# ![Left: relative errors of dz/dx against steps, on a logarithmic scale: the unrolled one falls in
# the same way as the implicit one, but above it and with a growing gap. Right: the ratio of the
# two, which grows along a straight line](first_principles_unrolled.png)
#
# And the logistic regression, by reverse mode. Both errors fall with the inner error:


# %%
def unrolled(x, steps, rate):
    """dF_T/dx by reverse mode through gradient descent, and z_T."""
    x = x.detach().requires_grad_()
    z = torch.zeros(features, requires_grad=True)
    for _ in range(steps):
        (slope,) = grad(g(x, z), z, create_graph=True)
        z = z - rate * slope
    return grad(f(x, z), x)[0], z.detach()


x, z_star = torch.ones(rows), solution
rate = 1 / torch.linalg.eigvalsh(H)[-1].item()
print("steps  inner error  implicit there  unrolled")
for steps in (1, 5, 10, 20, 30):
    through, z_t = unrolled(x, steps, rate)
    at, _ = implicit(x, z_t, steps=20)
    inner = ((z_t - z_star).norm() / z_star.norm()).item()
    print(f"{steps:5}  {inner:11.1e}  {relative_error(at):14.1e}  {relative_error(through):8.1e}")

# %% [markdown]
# The library's [`Unrolled`][bilevel.solvers.Unrolled] is the same program, with truncation,
# checkpoints and a status:

# %%
from bilevel.solvers import Unrolled

result = hypergradient(
    weighted, x, inner_solver=GradientDescent(lr=rate, max_steps=20), method=Unrolled()
)
by_hand, _ = unrolled(x, 20, rate)
print("same as by hand:", torch.allclose(result.gradient, by_hand, rtol=1e-10))

# %% [markdown]
# ## The Neumann series is unrolling, backwards, at the solution
#
# Now start the steps *at* the solution. They stay there, so all $H_t = H$ and $C_t = C$. The
# reverse recursion through $K$ steps is then $w_{T-j} = (I - aH)^j b$, and what it accumulates is
#
# $$
# - C^\top \underbrace{a \sum_{j=0}^{K-1} (I - aH)^j\, b}_{v_K} .
# $$
#
# That sum is the truncated Neumann series for $H^{-1} b$ (the geometric series of matrices:
# $\sum_j q^j = 1/(1-q)$ with $q = I - aH$). So three things that carry three names are one
# computation:
#
# - $K$ terms of a Neumann series at $z^\star$ (Lorraine, Vicol and Duvenaud,
#   [2020](https://arxiv.org/abs/1911.02590)),
# - unrolling $K$ steps of gradient descent from $z^\star$,
# - truncated unrolling: run to convergence, differentiate the last $K$ steps only (Shaban et al.,
#   [2019](https://arxiv.org/abs/1810.10667)).
#
# What is left out is $(I - aH)^K H^{-1} b$, hence an error of $(1 - a\mu)^K$ in the direction of
# the smallest curvature $\mu$, for $a \le 1/L$ with $L$ the largest one. One term, $v_1 = a\,b$, is
# T1–T2 (Luketina et al., [2016](https://arxiv.org/abs/1511.06727)); no term at all is the
# first-order method.

# %%
from bilevel.solvers import NeumannSeries

smallest = torch.linalg.eigvalsh(H)[0].item()


def at_solution(method, **options):
    return hypergradient(weighted, x, inner=z_star, method=method, **options).gradient


print("  K  error    bound    from a truncated unrolling   from unrolling at z*")
for K in (1, 4, 16):
    series = at_solution(NeumannSeries(terms=K, scale=rate), inner_solver=None)
    staying = at_solution(Unrolled(), inner_solver=GradientDescent(lr=rate, max_steps=K))
    last = hypergradient(
        weighted,
        x,
        inner_solver=GradientDescent(lr=rate, max_steps=200),
        method=Unrolled(truncate=K),
    ).gradient
    gaps = [small((other - series).norm() / series.norm()) for other in (last, staying)]
    bound = (1 - rate * smallest) ** K
    print(
        f"{K:3}  {relative_error(series):.1e}  {bound:.1e}  differs {gaps[0]:20} differs {gaps[1]}"
    )

# %% [markdown]
# Conjugate gradients choose the best polynomial in $H$ of their degree, instead of this fixed one:
# six products were exact above, sixteen terms of the series leave half a percent. That is why
# `ImplicitCG` is the library's first recommendation, and the series its choice only where
# [something speaks against CG](choosing.md).
#
# ## How wrong at a point that is not the solution?
#
# In practice $z$ is near $z^\star$, not on it. Let $e = \|z - z^\star\|$, and let $u(z)$ be the
# formula $\partial_x f - C^\top H^{-1} b$ evaluated at $z$. It is a smooth function of $z$, so
#
# $$u(z) - u(z^\star) = u'(z^\star)\,(z - z^\star) + O(e^2) :$$
#
# the error is *linear* in the inner error. One Newton step $z_+ = z - H^{-1} \partial_z g$ squares
# the inner error at the price of one more solve, and the error of $u(z_+)$ is quadratic in $e$.
# (The unrolled derivative's is linear, too, but for the factor $t$.) And for *values* the adjoint's prices do it for free:
# $\partial_z g(z)$ is the force that holds the ball at $z$, so
#
# $$F(x) = f(x, z) - v^\top \partial_z g(x, z) + O(e^2) .$$

# %%
direction = torch.randn(features, generator=random)
direction = direction / direction.norm() * z_star.norm()
F_exact = f(x, z_star)
sizes = [10 ** (-k / 2) for k in range(9)]
table = {"value": [], "value, corrected": [], "plain": [], "corrected": []}
for size in sizes:
    z = z_star + size * direction
    slope, H_z, C_z, b_z = derivatives(x, z)
    v_z = torch.linalg.solve(H_z, b_z)
    table["value"].append(abs(f(x, z) - F_exact).item() / F_exact.item())
    table["value, corrected"].append(abs(f(x, z) - v_z @ slope - F_exact).item() / F_exact.item())
    for name, correct in (("plain", False), ("corrected", True)):
        found = hypergradient(
            weighted, x, inner_solver=None, inner=z, method=ImplicitCG(rtol=1e-13, correct=correct)
        )
        table[name].append(relative_error(found.gradient))
print("inner error  " + "  ".join(table))
for i in range(5):
    cells = (f"{column[i]:.1e}".ljust(len(name)) for name, column in table.items())
    print(f"{sizes[i]:11.2f}  " + "  ".join(cells))

# %% [markdown]
# ![Relative error against inner error, both logarithmic: the plain hypergradient along slope one,
# the corrected one along slope two, meeting at large errors and apart by four decades at an inner
# error of one in ten thousand](first_principles_errors.png)
#
# `correct=True` is that Newton step, and `error_estimate=True` measures it to tell you how wrong
# the plain hypergradient is: [Can I trust this number?](../concepts/trust.md)
#
# ## With a proximal regularizer: iMAML
#
# Let the inner objective be a loss and a spring that pulls $z$ towards $x$:
#
# $$G(x, z) = g(z) + \tfrac\lambda2 \|z - x\|^2 .$$
#
# $x$ enters through the spring alone, so the mixed derivative is $C = -\lambda I$, and the general
# formula shrinks to
#
# $$
# (\nabla^2 g + \lambda I)\, v = \nabla f, \qquad \frac{dF}{dx} = \lambda\, v
#   = \left(I + \tfrac1\lambda \nabla^2 g\right)^{-1} \nabla f .
# $$
#
# This is iMAML (Rajeswaran et al., [2019](https://arxiv.org/abs/1909.04630)), with $x$ the
# initialisation $\theta$ that is meta-learned and $z$ a task's weights $\phi$. Two limits tell what
# it does. As $\lambda \to \infty$, $dF/dx \to \nabla f$: the ball sits on $x$, and moves with it.
# Along a direction of curvature $c$ the factor is $\lambda/(\lambda + c)$: the gradient passes
# where the task's data have nothing to say, and is muted where they decide. And the condition
# number of the system is $(L + \lambda)/(\mu + \lambda)$, which a larger $\lambda$ tames. If
# $\lambda$ is an outer variable too, $\partial_\lambda \partial_z G = z - x$, and the same adjoint
# gives $dF/d\lambda = -v^\top (z^\star - x)$.

# %%
from bilevel import Proximal

imaml = problem_from(
    inner_objective=lambda z, outer, batch: losses(z, train).mean(),
    outer_objective=lambda z, outer, batch: losses(z, held_out).mean(),
    regularizer=Proximal(lambda outer: outer["strength"], center=lambda outer: outer["start"]),
)
outer = {"start": torch.full((features,), 0.5), "strength": torch.tensor(0.1)}
result = hypergradient(imaml, outer, inner_solver=LBFGS(tol=1e-11), method=ImplicitCG(rtol=1e-12))

# By the formulas, in plain PyTorch.
z, start, strength = result.inner, outer["start"], outer["strength"]
hessian = torch.autograd.functional.hessian(lambda z: losses(z, train).mean(), z)
z = z.requires_grad_()
(b,) = grad(losses(z, held_out).mean(), z)
v = torch.linalg.solve(hessian + strength * torch.eye(features), b)
print("dF/dx = λ v:           ", torch.allclose(result.gradient["start"], strength * v, rtol=1e-6))
slope_in_strength = -v @ (z - start)
print(
    "dF/dλ = −v·(z − x):    ",
    torch.allclose(result.gradient["strength"], slope_in_strength, rtol=1e-6),
)

# %% [markdown]
# More: [iMAML](../concepts/imaml.md), [the regularizer](../concepts/regularizer.md).
#
# ## Equilibria
#
# Nothing in the derivation needed a minimum. It needed an equation that holds for every $x$. If
# $z^\star$ solves $R(x, z) = 0$ for any $R$ (a fixed point $z = \Phi(x, z)$, where $R = z - \Phi$;
# the first-order conditions of a game; a discretised differential equation), then with
# $J = \partial_z R$
#
# $$
# J^\top v = \partial_z f, \qquad \frac{dF}{dx} = \partial_x f - (\partial_x R)^\top v .
# $$
#
# One thing changes: $J$ is no Hessian, so it need not be symmetric, and the transpose that could be
# forgotten so far now matters. Conjugate gradients, which assume symmetry, are out; GMRES and its
# relatives are in. This is how deep equilibrium models are trained (Bai et al.,
# [2019](https://arxiv.org/abs/1909.01377)).

# %%
from bilevel.solvers import GMRES, Implicit

W = 0.5 * torch.randn(4, 4, generator=random)
W = 0.7 * W / torch.linalg.matrix_norm(W, 2)  # a contraction: one fixed point
target = torch.tensor([0.3, -0.2, 0.1, 0.4])

layer = problem_from(
    inner_objective=None,
    outer_objective=lambda z, x, batch: ((z - target) ** 2).sum(),
    initial_inner=lambda x, batch: torch.zeros_like(x),
    stationarity=lambda z, x, batch: z - torch.tanh(W @ z + x),
)
x_layer = torch.tensor([0.5, -1.0, 0.2, 0.8])
result = hypergradient(
    layer,
    x_layer,
    inner_solver=GradientDescent(lr=1.0, max_steps=200, tol=1e-12),  # z ← Φ(x, z)
    method=Implicit(GMRES(rtol=1e-10)),
)

z = result.inner
D = torch.diag(1 - z**2)  # the derivative of tanh
J = torch.eye(4) - D @ W
right = D @ torch.linalg.solve(J.T, 2 * (z - target))  # −∂ₓR = D
wrong = D @ torch.linalg.solve(J, 2 * (z - target))


def far(one):
    return ((one - result.gradient).norm() / result.gradient.norm()).item()


print(f"with the transpose: differs from the library by {small(far(right))}")
print(f"without it: by {far(wrong):.0%}")

# %% [markdown]
# ## What breaks
#
# The theorem has hypotheses. Here is what happens without each.
#
# ![Left: a valley that ends: the floor runs to a fold, where it becomes vertical, and the ball
# falls to another branch. Middle: contour lines of a function of two inner variables with a line of
# minima; two descents from different starts end at different points of it. Right: a solution with
# kinks, flat between them](first_principles_breaks.png)
#
# **The floor ends, or there are several (left).** With $g = \tfrac14 z^4 - \tfrac12 z^2 - xz$ there
# are two minima, until one of them meets a maximum, and both vanish. On each branch the
# hypergradient is right; as the fold comes near, $\partial^2_{zz} g \to 0$ and it goes to infinity;
# at the jump $F$ is discontinuous, and no derivative says so. Stay on a branch by starting the
# inner solver at the last solution, and look at the smallest curvature that the
# [diagnostics](../concepts/trust.md#curvature) show.
#
# **The valley is flat (middle).** More weights than data: a whole set of minima, $H$ is singular.
# Which minimum is found depends on where the solver starts, and so does its derivative. Unrolling
# differentiates the one that is found. The implicit formula asks for $H^{-1}$, which does not
# exist; worse, rounding makes it exist. Ask for the status:

# %%
flat = problem_from(
    inner_objective=lambda z, x, batch: 0.5 * (z[0] + z[1] - x) ** 2,
    outer_objective=lambda z, x, batch: z[0] ** 2 + 0.5 * z[1],
    initial_inner=lambda x, batch: torch.zeros(2),
)
one = torch.tensor(1.0)
descent = GradientDescent(lr=0.3, max_steps=100)
through = hypergradient(flat, one, inner_solver=descent, method=Unrolled())
formula = hypergradient(flat, one, inner_solver=descent, method=ImplicitCG())
print(f"z = {[round(entry, 4) for entry in through.inner.tolist()]}, from z = 0")
print(f"unrolled {through.gradient:.4f}, which is d/dx of (x/2)² + x/4")
print(f"implicit: {formula.status[0].name}")

# %% [markdown]
# A proximal regularizer, however weak, makes the minimum unique, and picks the one next to its
# center; see also Vicol et al., [2022](https://arxiv.org/abs/2212.14032).
#
# **The point is no minimum.** Short of the solution, a network's inner Hessian may have negative
# eigenvalues. The formula can still be evaluated, and describes how a *saddle* moves, to which no
# descent goes. Conjugate gradients notice, since they compute $p^\top H p$ on the way; status
# `INDEFINITE` says so, and [a policy](../concepts/linear-solvers.md#negative-curvature) decides
# what to return.
#
# **The objective has kinks (right).** With $g = \tfrac12 (z - x)^2 + |z|$ the solution is soft
# thresholding: zero for $|x| \le 1$, with slope one outside. At $z^\star = 0$ autograd takes the
# derivative of $|z|$ to be 0, so that second derivatives see nothing of it, and the formula says
# slope one where the truth is zero. No error is raised:

# %%
lasso = problem_from(
    inner_objective=lambda z, x, batch: (0.5 * (z - x) ** 2 + torch.relu(z) + torch.relu(-z)).sum(),
    outer_objective=lambda z, x, batch: z.sum(),
    initial_inner=lambda x, batch: torch.zeros_like(x),
)
points = torch.tensor([0.5, 2.0])
thresholded = torch.sign(points) * (points.abs() - 1).clamp_min(0)
found = hypergradient(lasso, points, inner_solver=None, inner=thresholded, method=ImplicitCG())
print("dz*/dx is (0, 1), the formula says", tuple(found.gradient.tolist()))
print(f"but ‖∂_z G‖ = {found.diagnostics.inner.residual.item():.1f}: it is no stationary point")

# %% [markdown]
# Away from its kinks such a solution is differentiable *on the entries that are not zero*, and
# there the formula holds (Bertrand et al., [2020](https://arxiv.org/abs/2002.08943); in general
# Bolte et al., [2021](https://arxiv.org/abs/2106.04350)). ReLU networks have kinks everywhere one
# looks; [`doctor`](../concepts/doctor.md) measures how much of the change of the gradient the
# Hessian does not know of.
#
# ## In one table
#
# | | Implicit | Unrolled |
# |---|---|---|
# | Differentiates | the equation $\partial_z g = 0$ | the steps |
# | Is exact for | the solution $z^\star(x)$ | the point $z_T(x)$ that was reached |
# | Needs | $H$ invertible, a small residual, a linear solve | differentiable steps |
# | Memory | one graph of the gradient | one for each step |
# | Fails at | flat or indefinite $H$, kinks | unstable steps, many steps |
#
# - [How to choose a method](choosing.md), with a chart.
# - [Hypergradient methods](../concepts/hypergradients.md): what the library has, and its options.
# - [Numerical accuracy](accuracy.md) and [memory](memory.md).
# - [Glossary](glossary.md): what others call all this.
#
# ## The code of the pictures

# %%
from matplotlib.figure import Figure

BLUE, AMBER, GREEN, RED, GREY, INK = (
    "#2563eb",
    "#d97706",
    "#15803d",
    "#be123c",
    "#64748b",
    "#1e293b",
)


def panels(count, width, height, **options):
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots(1, count, **options)
    for one in [axes] if count == 1 else axes:
        one.grid(color="#e2e8f0", linewidth=0.8)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
        one.spines[["left", "bottom"]].set_color("#94a3b8")
        one.tick_params(colors="#475569")
    return figure, axes


def label(axes, x, y, title):
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.set_title(title, fontsize=11, color=INK)


def g(x, z):
    return z**4 / 4 + z**2 / 2 - x * z


def f(x, z):
    return (z - 1) ** 2 / 2 + x**2 / 40


xs = torch.linspace(-1.2, 3.2, 221)
zs = torch.linspace(-1.3, 1.7, 151)
floors = floor(xs)
at, here = torch.tensor(1.0), floor(torch.tensor(1.0))
slope = direct + indirect

figure, (valley, slices, along) = panels(3, 9.6, 3.2)
height = g(xs[None], zs[:, None]) - g(xs, floors)
levels = [0, 0.03, 0.12, 0.3, 0.6, 1.1, 2, 3.5, 8]
valley.contourf(xs, zs, height, levels, cmap="Blues", vmax=9)
valley.plot(xs, floors, color=RED, lw=2.2)
valley.text(2.06, 0.8, "floor z*(x)", color=RED, fontsize=9.5)
valley.grid(visible=False)
label(valley, "x", "z", "height of g above its floor")
for where, color in ((0.0, GREEN), (1.0, AMBER), (2.0, BLUE)):
    where = torch.tensor(where)
    valley.axvline(where, color=color, lw=1.4, ls=(0, (4, 3)))
    slices.plot(zs, g(where, zs), color=color, lw=1.8, label=f"x = {where:.0f}")
    slices.plot(floor(where), g(where, floor(where)), "o", color=color, ms=7, mec="white")
slices.set_ylim(-1.5, 1.2)
slices.legend(frameon=False, fontsize=9)
label(slices, "z", "g(x, z)", "three slices across it")
along.plot(xs, f(xs, floors), color=INK, lw=2)
touch = torch.tensor([0.1, 1.9])
along.plot(touch, f(at, here) + slope * (touch - at), color=RED, lw=2)
along.plot(at, f(at, here), "o", color=RED, ms=7, mec="white")
along.annotate(
    "slope dF/dx",
    (0.45, 0.122),
    (0.55, 0.4),
    color=RED,
    fontsize=9.5,
    arrowprops={"arrowstyle": "-", "color": RED},
)
along.set(xlim=(-0.5, 3), ylim=(0, 0.7))
label(along, "x", "F(x)", "f along the floor")
figure.savefig("first_principles_valley.png", dpi=110)

figure, (across, both) = panels(2, 8.4, 3.4)
span = torch.linspace(0.3, 1.2, 91)
for where, color in ((1.0, AMBER), (1.5, BLUE)):
    across.plot(span, span**3 + span - where, color=color, lw=2, label=f"at x = {where}")
    across.plot(floor(torch.tensor(where)), 0, "o", color=color, ms=8, mec="white", zorder=3)
across.axhline(0, color=GREY, lw=1)
moved = floor(torch.tensor(1.5))
for end, color in (((here, -0.5), RED), ((moved, 0), GREEN)):
    arrow = {"arrowstyle": "->", "color": color, "lw": 2, "shrinkA": 6, "shrinkB": 4}
    across.annotate("", end, (here, 0), arrowprops=arrow)
across.text(0.76, -0.55, "push: ∂²g/∂z∂x · dx", color=RED, fontsize=10)
across.text(0.765, 0.06, "dz", color=GREEN, fontsize=10)
across.text(1.01, 0.25, "steepness:\n∂²g/∂z²", color=BLUE, fontsize=10)
across.set(xlim=(0.3, 1.3), ylim=(-0.9, 1.4))
across.legend(frameon=False, fontsize=9, loc="upper left")
label(across, "z", "∂g/∂z", "how the floor moves")
near = torch.linspace(0.2, 1.8, 81)
for curve, color, text in (
    (f(near, here.expand(81)), AMBER, f"z held: direct slope, {direct:+.2f}"),
    (f(near, floor(near)), RED, f"F: both, {slope:+.2f}"),
    (f(at.expand(81), floor(near)), BLUE, f"x held, z*(x): indirect slope, {indirect:+.2f}"),
):
    both.plot(near, curve, color=color, lw=2, label=text)
both.plot(at, f(at, here), "o", color=INK, ms=7, mec="white", zorder=3)
both.set_ylim(0, 0.5)
both.legend(frameon=False, fontsize=9, loc="upper right")
label(both, "x", "f", "direct + indirect")
figure.savefig("first_principles_slopes.png", dpi=110)

figure, (fall, gap) = panels(2, 8.4, 3.2, width_ratios=(1.5, 1))
counts = list(lag)
for column, color, text in (
    (1, BLUE, "unrolled through T steps"),
    (0, AMBER, "implicit, at z_T"),
):
    fall.plot(counts, [lag[t][column] for t in counts], color=color, lw=2, label=text)
fall.set_yscale("log")
fall.legend(frameon=False, fontsize=10)
label(
    fall, "steps of gradient descent, T", "relative error of dz/dx", "two routes to one derivative"
)
gap.plot(counts[9:], [lag[t][1] / lag[t][0] for t in counts[9:]], color=INK, lw=2)
gap.set(xlim=(0, 62), ylim=(0, 20))
label(gap, "T", "unrolled / implicit", "the factor T")
figure.savefig("first_principles_unrolled.png", dpi=110)

figure, axes = panels(1, 7, 3.4)
for name, color, marker in (("plain", AMBER, "o"), ("corrected", GREEN, "s")):
    axes.plot(sizes, table[name], marker=marker, color=color, lw=2, label=f"hypergradient, {name}")
for power, start in ((1, table["plain"][4]), (2, table["corrected"][4])):
    line = [start * (size / sizes[4]) ** power for size in sizes]
    axes.plot(sizes, line, ":", color=GREY, lw=1.2, zorder=0)
    axes.text(sizes[-1] * 0.8, line[-1], f"slope {power}", color=GREY, ha="right", va="center")
axes.set(xscale="log", yscale="log", ylim=(1e-10, 10), xlim=(2e-5, 2))
axes.legend(frameon=False, fontsize=10)
label(axes, "relative inner error", "relative error", "one Newton step squares the error")
figure.savefig("first_principles_errors.png", dpi=120)

figure, (fold, level, kink) = panels(3, 9.6, 3.2)
line = torch.linspace(-1.45, 1.45, 400)
load = line**3 - line
for part, style in ((line < -(3**-0.5), "-"), (line.abs() <= 3**-0.5, ":"), (line > 3**-0.5, "-")):
    fold.plot(load[part], line[part], style, color=BLUE if style == "-" else GREY, lw=2)
edge = 2 / 3**1.5
jump = {"arrowstyle": "->", "color": RED, "lw": 2}
fold.annotate("", (edge, 1.12), (edge, -0.5), arrowprops=jump)
fold.text(edge + 0.06, 0.1, "F jumps", color=RED, fontsize=10)
fold.plot(edge, -(3**-0.5), "o", color=RED, ms=7, mec="white")
fold.set(xlim=(-1.2, 1.2), ylim=(-1.5, 1.5))
label(fold, "x", "z*(x)", "the floor ends")
plane = torch.linspace(-0.6, 1.6, 60)
bowl = (plane[None] + plane[:, None] - 1) ** 2 / 2
level.contourf(plane, plane, bowl, [0, 0.005, 0.05, 0.15, 0.4, 0.8, 1.5, 2.5], cmap="Blues", vmax=3)
level.plot([-0.6, 1.6], [1.6, -0.6], color=RED, lw=2.2)
level.text(0.93, 0.27, "all minima", color=RED, fontsize=10, rotation=-45, ha="center", va="center")
for start, color in (((0.0, 0.0), GREEN), ((-0.5, 0.4), AMBER)):
    path = [torch.tensor(start)]
    for _ in range(12):
        path.append(path[-1] - 0.2 * (path[-1].sum() - 1))
    path = torch.stack(path)
    level.plot(path[:, 0], path[:, 1], "o-", color=color, ms=4, lw=1.5)
level.set(xlim=(-0.6, 1.6), ylim=(-0.6, 1.6), aspect="equal")
level.set_xticks([-0.5, 0, 0.5, 1, 1.5])
level.set_yticks([-0.5, 0, 0.5, 1, 1.5])
level.grid(visible=False)
label(level, "z₁", "z₂", "the valley is flat")
soft = torch.linspace(-2.5, 2.5, 101)
kink.plot(soft, torch.sign(soft) * (soft.abs() - 1).clamp_min(0), color=BLUE, lw=2.2)
kink.plot([-1, 1], [0, 0], "o", color=RED, ms=7, mec="white")
kink.plot([0.1, 0.9], [-0.4, 0.4], "--", color=AMBER, lw=2)
kink.text(0.25, 0.55, "the formula's\nslope", color=AMBER, fontsize=10, ha="right")
kink.set_ylim(-1.6, 1.6)
label(kink, "x", "z*(x)", "kinks")
figure.savefig("first_principles_breaks.png", dpi=110)

torch.set_default_dtype(torch.float32)  # as it was
