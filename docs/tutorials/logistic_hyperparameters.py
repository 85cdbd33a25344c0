# %% [markdown]
# # Hyperparameters on real data
#
# A regularized model usually has *one* weight of decay, found by trying a dozen values on
# validation data. That one number has to suit every input. Give each group of inputs its own, and
# the model can ignore what is noise and trust what is not; but a dozen values for each of 21
# groups are $12^{21}$ fits. [Hypergradients](../concepts/hypergradients.md) give the slope in all
# 21 at once, for the price of one fit and one linear system.
#
# This page does that on a real data set, compares with the grid on rows that neither has seen,
# reads what the decays say about the inputs, and ends with what it does not show.
#
# ## The data
#
# The [mushroom set](https://archive.ics.uci.edu/dataset/73/mushroom) of UCI (Schlimmer, 1987) holds
# 8,124 descriptions of gilled mushrooms, drawn from a field guide, each marked as edible or
# poisonous. In the version of
# [LIBSVM](https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/) (Chang and Lin, 2011) they
# have 21 properties, and one 0/1 column for each value of each property, 112 in all.
# [`libsvm`][bilevel.problems.data.libsvm.libsvm] reads the file, compressed or not.

# %%
import os

import torch

from bilevel.problems import libsvm

features, kind = libsvm("mushrooms", root=os.environ["BILEVEL_DATA"])
labels = torch.where(kind == 1, 1.0, -1.0).double()  # +1: poisonous

columns = {
    "cap shape": 6,
    "cap surface": 4,
    "cap color": 10,
    "bruises": 2,
    "odor": 9,
    "gill attachment": 2,
    "gill spacing": 2,
    "gill size": 2,
    "gill color": 12,
    "stalk shape": 2,
    "surface above ring": 4,
    "surface below ring": 4,
    "color above ring": 9,
    "color below ring": 9,
    "veil type": 1,
    "veil color": 4,
    "number of rings": 3,
    "ring type": 5,
    "spore print": 9,
    "population": 6,
    "habitat": 7,
}
properties = list(columns)
group = torch.arange(21).repeat_interleave(torch.tensor(list(columns.values())))

# In every row, every property has exactly one value.
values = torch.zeros(len(features), 21).double().index_add(1, group, features)
assert (values == 1).all()
print(f"rows {len(features)}, columns {len(group)}, properties {len(properties)}")

# %% [markdown]
# With all labels the problem is easy. Suppose that labels are dear: 200 rows to fit the model, 200
# to choose its hyperparameters, and the other 7,724 only to judge the choice. A
# [`Task`](../concepts/tasks.md) holds the first two.

# %%
from bilevel import Task


def split(seed):
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rows = order.split([200, 200, len(order) - 400])
    train, validation, test = [(features[i], labels[i]) for i in rows]
    return Task(inner_batch=train, outer_batch=validation), test


task, test = split(0)

# %% [markdown]
# ## The problem
#
# The inner variable is the weight $w_j$ of each column, the outer variable $x_k$ the logarithm of
# the decay of each property. Both objectives are the mean logistic loss $\ell$, one on the rows to
# fit, one on the rows to choose by:
#
# $$
# w^\star(x) = \arg\min_w\; \ell_{200}(w)
#   + \tfrac12 \sum_j \left(10^{-4} + e^{x_{k(j)}}\right) w_j^2,
# \qquad
# F(x) = \ell'_{200}(w^\star(x)) .
# $$
#
# The penalty is a [proximal regularizer](../concepts/regularizer.md) with its center at zero and a
# strength that depends on the outer variable. The floor of $10^{-4}$ keeps the inner problem well
# posed where a decay goes to nothing.

# %%
import torch.nn.functional as F

from bilevel import Proximal, Structure, problem_from

FLOOR = 1e-4


def loss(weights, x, batch):
    rows, label = batch
    return F.softplus(-label * (rows @ weights)).mean()


def decay_by(group):
    """The problem whose column j has the decay number `group[j]`."""
    return problem_from(
        inner_objective=loss,
        outer_objective=loss,
        regularizer=Proximal(
            strength=lambda x: FLOOR + x.exp()[group],
            center=lambda x: x.new_zeros(len(group)),
        ),
        structure=Structure.POSITIVE_DEFINITE,  # a convex loss plus a penalty
    )


# %% [markdown]
# ## The usual way: a grid over one decay
#
# Fifteen values of one decay for all columns, from the floor up to 1, each a fit of its own. The
# validation rows choose. [`HessianFree`][bilevel.solvers.HessianFree] is Newton's method with
# conjugate gradients. Later, decays of $10^{-4}$ and of 1 will stand side by side, which makes the
# inner problem badly scaled, and that is what this solver is for
# ([how to choose](../explanations/choosing.md#solved-tightly)).

# %%
from bilevel import solve_inner
from bilevel.solvers import HessianFree

shared = decay_by(torch.zeros(112, dtype=torch.int64))
grid = torch.linspace(-14, 0, 15, dtype=torch.float64)  # logarithms; the floor is log(1e-4) = -9.2


def search_grid(task):
    """The best decay by validation, its validation loss, and its weights."""
    found = []
    for x in grid.split(1):
        weights = solve_inner(shared, x, task, inner_solver=HessianFree(tol=1e-7)).inner
        found.append((loss(weights, x, task.outer_batch).item(), x, weights))
    value, x, weights = min(found, key=lambda one: one[0])
    return FLOOR + x.exp().item(), value, weights


def judge(weights, test):
    """The loss on rows that nothing was chosen by, and the share that is told wrong, in %."""
    rows, label = test
    wrong = (label * (rows @ weights) <= 0).double().mean()
    return loss(weights, None, test).item(), 100 * wrong.item()


best, value, weights = search_grid(task)
test_loss, wrong = judge(weights, test)
print(f"best shared decay  {best:.4f}")
print(f"validation loss    {value:.3f}")
print(f"test loss          {test_loss:.3f}, wrong on {wrong:.1f} % of the test rows")

# %% [markdown]
# ## Twenty-one decays
#
# The same problem with another `group`, and 0.01 for all properties to begin with. Before a number
# is built on, it is [checked](../concepts/checking.md), here against dense algebra and against
# finite differences of the solved problem:

# %%
from bilevel import check_hypergradient
from bilevel.solvers import ImplicitCG

problem = decay_by(group)
start = torch.full((21,), 0.01, dtype=torch.float64).log()
check = check_hypergradient(
    problem,
    start,
    task,
    inner_solver=HessianFree(tol=1e-10),
    method=ImplicitCG(max_steps=1000, rtol=1e-10),
)
print("right:", check.ok)

# %% [markdown]
# [`minimize`][bilevel.minimize.minimize] walks down from there. It needs no learning rate, and the
# tolerances of both solves are its own affair: each hypergradient is made just accurate enough for
# the next step to be a good one ([how](../concepts/trust.md#accuracy-that-follows-the-need)). `tol`
# says when to stop: at a hundredth of the first slope.

# %%
from bilevel import minimize


def search(start, task):
    return minimize(problem, start, task, inner_solver=HessianFree(), method=ImplicitCG(), tol=1e-2)


found = search(start, task)
weights = found.result.inner
test_loss, wrong = judge(weights, test)
print(found.status.name)
print(f"validation loss    {found.value:.3f}")
print(f"test loss          {test_loss:.3f}, wrong on {wrong:.1f} % of the test rows")

# %% [markdown]
# On rows that played no part in the choice, the loss is less than half of what the best shared
# decay reaches. The validation loss fell further than that, as it had to: it is what was minimised,
# over 21 numbers, on 200 rows. It is no estimate of anything any more; the test loss is.
#
# ## What the decays say
#
# A decay alone is no measure of importance. Where a property says nothing, its weights stay small
# under any decay, there is no slope, and the decay stays near 0.01. So beside it stands how far
# the property can move the log-odds of *poisonous*, its *reach*: the largest weight of its columns
# minus the smallest. Where that is below 0.15, we call the property switched off.


# %%
def reach_of(weights):
    return torch.stack([weights[group == k].max() - weights[group == k].min() for k in range(21)])


decay, reach = FLOOR + found.outer.exp(), reach_of(weights)
for k in reach.argsort(descending=True).tolist()[:4]:
    print(f"{properties[k]:16} decay {decay[k]:.4f}  reach {reach[k]:4.1f}")
off = [name for name, one in zip(properties, reach, strict=True) if one < 0.15]
print(f"\n{len(off)} are switched off:\n{', '.join(off[:7])},\n{', '.join(off[7:])}")

# %% [markdown]
# Two thirds of the properties are switched off, and none of them by hand. The decay of odor went
# down to the floor, and odor says most.
#
# ## Is it luck?
#
# One split is one draw. Seven more, each searched in both ways:

# %%
one_decay, many_decays, reaches = [judge(search_grid(task)[2], test)[0]], [test_loss], [reach]
for seed in range(1, 8):
    task, test = split(seed)
    one_decay.append(judge(search_grid(task)[2], test)[0])
    weights = search(start, task).result.inner
    many_decays.append(judge(weights, test)[0])
    reaches.append(reach_of(weights))

before, after, reaches = torch.tensor(one_decay), torch.tensor(many_decays), torch.stack(reaches)
print(f"better in {int((after < before).sum())} of 8 splits")
print(f"test loss, mean: one decay {before.mean():.2f}, 21 decays {after.mean():.2f}")
order = reaches.mean(0).argsort(descending=True).tolist()
print("largest mean reach:", ", then ".join(properties[k] for k in order[:2]))

# %% [markdown]
# ![Left: mean log-odds reach of the 21 properties as bars, with a dot for each split: odor is the
# longest, spore print the second, and the last few have next to none. Right: the test loss of each
# of eight splits with one decay and with 21, joined by lines, all of which
# fall.](logistic_hyperparameters_reach.png)
#
# The two that come first are no surprise to those who know the set. Of the rules that UCI's notes
# on it quote (Duch, Adamczak and Grabczewski, 1996), the first uses odor alone and is right on
# 98.52 % of all rows; the second adds the spore print, for 99.41 %. Behind these two, properties
# that go together stand in for each other, and which of them is used changes from split to split.

# %%
import matplotlib.pyplot as plt

INK, BLUE, ORANGE = "#1e293b", "#2563eb", "#d97706"
figure, (left, right) = plt.subplots(
    1, 2, figsize=(7.6, 4.6), layout="constrained", width_ratios=[1.7, 1]
)
places = list(range(21))[::-1]
left.barh(places, reaches.mean(0)[order].tolist(), color="#bfdbfe", height=0.72)
for one in reaches:
    left.plot(one[order].tolist(), places, ".", ms=4, color=BLUE)
left.set_yticks(places, [properties[k] for k in order])
left.set_ylim(-0.7, 20.7)
left.set_xlabel("reach in log-odds: bars the mean, dots the splits", color=INK)
left.set_title("What each property may say", color=INK)
for pair in zip(one_decay, many_decays, strict=True):
    right.plot([0, 1], pair, color="#94a3b8", lw=1.2, zorder=1)
right.scatter([0] * 8, one_decay, color=ORANGE, zorder=2)
right.scatter([1] * 8, many_decays, color=BLUE, zorder=2)
right.set_xticks([0, 1], ["one decay\n(grid)", "21 decays\n(hypergradients)"])
right.set_xlim(-0.4, 1.4)
right.set_ylim(0, None)
right.set_title("Test loss, eight splits", color=INK)
for axes in (left, right):
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#94a3b8")
    axes.tick_params(colors="#475569")
left.grid(visible=False, axis="y")
figure.savefig("logistic_hyperparameters_reach.png", dpi=96)
plt.close(figure)

# %% [markdown]
# ## What it does not show
#
# **That the minimum was found.** The outer problem is not convex. Here is one of the splits again,
# from two starts:

# %%
task, test = split(3)
for decay in (0.01, 0.0025):
    found = search(torch.full((21,), decay, dtype=torch.float64).log(), task)
    test_loss, _ = judge(found.result.inner, test)
    print(f"from {decay:<6}  validation {found.value:.4f}  test {test_loss:.3f}")
print(f"one decay    validation {search_grid(task)[1]:.4f}  test {one_decay[3]:.3f}")

# %% [markdown]
# The two searches end in different places. By the validation rows the second is a little better;
# by the test rows it is worse than the first, and worse than the plain grid. The hypergradients are
# not to blame: they are gradients of a validation loss, and 200 rows are few to choose 21 numbers
# by. What helps:
#
# - **more rows to choose by**: folds of a cross-validation are
#   [tasks](../concepts/tasks.md) with one outer variable, solved together, and the outer objective
#   is their mean;
# - **fewer numbers**: `decay_by` takes any grouping;
# - **several starts**, judged on rows that no search has seen.
#
# **That decays are causes.** A property that is switched off says nothing *beside the others*.
#
# ## Where to go from here
#
# - Bounds on the outer variable: [`minimize_bounded`][bilevel.minimize_bounded].
# - A decay that is itself chosen by a level above it: [Three levels](three_levels.md).
# - 22 decays on 50,000 rows, and what adaptive accuracy saves there:
#   [Can I trust this number?](../concepts/trust.md#accuracy-that-follows-the-need)
# - Where this comes from: Bengio (2000), *Gradient-Based Optimization of Hyperparameters*; with
#   inexact solves, Pedregosa (2016, [arXiv:1602.02355](https://arxiv.org/abs/1602.02355)). Learning
#   a decay for each input from the evidence, without validation rows, is automatic relevance
#   determination (MacKay, 1994; Neal, 1996).
