# %% [markdown]
# # iMAML on your own data
#
# You have pictures of many kinds of things, a few of each, and tomorrow somebody brings five new
# kinds with *one* picture of each. [iMAML](../concepts/imaml.md) (Rajeswaran et al., 2019,
# [arXiv:1909.04630](https://arxiv.org/abs/1909.04630)) learns where training should *start*, so
# that a few steps on those five pictures are enough:
#
# $$
# \min_\theta\; \frac1M \sum_i L_i(\phi_i^\star(\theta))
# \qquad\text{with}\qquad
# \phi_i^\star(\theta) = \arg\min_\phi\; \hat L_i(\phi) + \tfrac{\lambda}{2} \|\phi - \theta\|^2 .
# $$
#
# The outer variable is $\theta$, the initialisation of your network. Task $i$ adapts it to its
# *support* pictures (the loss $\hat L_i$, the inner batch), is held near $\theta$ by a [proximal
# regularizer](../concepts/regularizer.md), and is judged on its *query* pictures ($L_i$, the outer
# batch). This page goes from arrays to a trained $\theta$, to a number with an interval, and to one
# new task. Replace the first cell by your data and the network by yours; the rest stays.
#
# ## Your data
#
# Pretend that these are yours: a hundred kinds of marks, each a stack of small grey pictures, not
# equally many of each, and no two taken in the same light.

# %%
import numpy as np

rng = np.random.default_rng(0)


def photograph(mark):
    """One 16×16 picture of a mark: off center by a pixel, in some light, with noise."""
    top, left = rng.integers(0, 3, size=2)
    ink = np.pad(mark, 2)[top + 1 : top + 17, left + 1 : left + 17]
    light = rng.uniform(0.0, 0.4) + rng.uniform(0.3, 0.6) * ink
    return (255 * np.clip(light + 0.08 * rng.normal(size=(16, 16)), 0, 1)).astype(np.uint8)


pictures = {}
for number in range(100):
    half = rng.random((5, 3)) < 0.5  # a mark is 5×5 cells, and symmetric
    mark = np.hstack([half, half[:, 1::-1]]).repeat(3, 0).repeat(3, 1)
    count = rng.integers(12, 20)
    pictures[f"mark {number:02}"] = np.stack([photograph(mark) for _ in range(count)])

print(len(pictures), "kinds; the first:", pictures["mark 00"].shape, pictures["mark 00"].dtype)

# %% [markdown]
# The library wants one tensor `[kinds, pictures, channels, height, width]`, uint8 from 0 to 255 or
# floating point, with equally many pictures of each kind:
# [`ImageClasses`][bilevel.problems.ImageClasses]. So bring your pictures to one size, and cut each
# kind to the smallest number.

# %%
import torch

from bilevel.problems import ImageClasses

fewest = min(len(stack) for stack in pictures.values())
images = np.stack([stack[:fewest] for stack in pictures.values()])
pool = ImageClasses(torch.from_numpy(images).unsqueeze(2), names=tuple(pictures))
print(pool)

# %% [markdown]
# From files it is a loop: `np.asarray(Image.open(path).convert("L").resize((16, 16)))` with Pillow,
# stacked by folder; for color, `"RGB"` and the channels moved to the front.
#
# Then split *by kind*. Test kinds are those that training has never seen, in any picture;
# validation kinds are for choosing settings, so that the test is made once.

# %%
train_pool, validation_pool, test_pool = pool.split([60, 15, 25], seed=0)

# %% [markdown]
# ## Tasks
#
# An [`EpisodeSampler`][bilevel.problems.EpisodeSampler] draws tasks: five kinds (*ways*), one
# support picture of each (*shots*), five query pictures of each. It is a function of the step, and
# so any step can be repeated, on any device.
#
# Where up and down mean nothing, `rotations=True` turns each kind by a random multiple of 90°: it is
# customary for Omniglot, and makes four kinds of one.

# %%
from bilevel.problems import EpisodeSampler


def sampler(pool, tasks, seed):
    return EpisodeSampler(pool, ways=5, shots=1, queries=5, tasks=tasks, seed=seed)


train = sampler(train_pool, tasks=4, seed=1)
validation = sampler(validation_pool, tasks=100, seed=2)
test = sampler(test_pool, tasks=200, seed=3)

batch = train(0)
print("support", list(batch.inner_batch[0].shape), list(batch.inner_batch[1].shape))
print("query  ", list(batch.outer_batch[0].shape), list(batch.outer_batch[1].shape))

# %% [markdown]
# ## Your network
#
# Any `torch.nn.Module` from a batch of pictures to five scores.
# [`stateless`][bilevel.stateless.stateless] makes it a function of its parameters. It refuses what
# is none: active dropout, and norm layers that keep running statistics.

# %%
from torch import nn

from bilevel import stateless


class Net(nn.Module):
    def __init__(self, ways):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.GroupNorm(4, 16),
            nn.Tanh(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1),
            nn.GroupNorm(4, 16),
            nn.Tanh(),
            nn.Flatten(),
        )
        self.head = nn.Linear(256, ways)

    def forward(self, images):
        light = images.mean((1, 2, 3), keepdim=True)
        contrast = images.std((1, 2, 3), keepdim=True) + 1e-3
        return self.head(self.body((images - light) / contrast))


torch.manual_seed(0)
module = Net(ways=5)
theta, net = stateless(module)  # a dict of tensors, and net(params, images)
print(sum(value.numel() for value in theta.values()), "parameters")

# %% [markdown]
# Two choices in it make the mathematics honest. `Tanh` is smooth: implicit differentiation asks for
# second derivatives, and for a point that a few steps can get near to. And `GroupNorm` looks at one
# picture at a time. `BatchNorm2d(16, track_running_stats=False)` works and often learns a little
# more, but a prediction then depends on what else is in the query batch; see [the
# details](../concepts/imaml.md#details-that-change-the-numbers).
#
# ## The problem, and how it is solved

# %%
from bilevel import Trainer
from bilevel.problems import FewShot
from bilevel.solvers import BacktrackingDescent, ImplicitCG

problem = FewShot(net, strength=1.0)
solver = BacktrackingDescent(lr=0.1, max_steps=5)
trainer = Trainer(
    problem,
    inner_solver=solver,
    method=ImplicitCG(max_steps=3, rtol=0.0),
    optimizer=lambda params: torch.optim.Adam(params, lr=3e-3),
    clip=2.0,
    on_failure="mean",
)

# %% [markdown]
# - [`FewShot`][bilevel.problems.FewShot]: cross entropy on either batch; `strength` is $\lambda$.
# - **Inner solver**: five gradient steps, each halved where it would not descend. No tolerance, so
#   that a solve ends with status `BUDGET`, which is all that was asked.
# - **Method**: three steps of conjugate gradients, `rtol=0.0` for the same reason.
# - **`clip` and `on_failure`**: one odd task should not throw the whole run. A task that met
#   negative curvature still counts; one that diverged is left out.
#
# Where these numbers come from: [below](#choosing-the-settings).
#
# ## Before: how good is no learning?
#
# Accuracy on a task is that of its adapted parameters on its query pictures:
# [`evaluate`][bilevel.evaluate] adapts to each task, and returns what the problem calls its metrics.
# The interval is 1.96 standard errors over tasks; it says how well *this* $\theta$ is known to do,
# and nothing of how another run would have ended.

# %%
from bilevel import evaluate


def accuracies(problem, theta, batch):
    """Of each task, after adapting to its support pictures, [tasks]."""
    return 100 * evaluate(problem, theta, batch, inner_solver=solver).metrics["accuracy"]


def interval(values):
    return f"{values.mean():.0f} ± {1.96 * values.std() / len(values) ** 0.5:.0f} %"


from bilevel.problems import pixel_nearest_neighbour

nearest = 100 * pixel_nearest_neighbour(validation(0))
untrained = accuracies(problem, theta, validation(0))
print("nearest picture    ", interval(nearest))
print("untrained, adapted ", interval(untrained))

# %% [markdown]
# ## Train
#
# `trainer.fit(theta, train, steps=80)` would do. With [`begin`][bilevel.Trainer] and `advance` the
# loop is yours, and there is room to look and to save:

# %%
training = trainer.begin(theta)
records, curve = [], [(0, untrained)]
for step in range(40):
    record, result = training.advance(train(step))
    records.append(record)
    if training.steps in (5, 10, 20, 40):
        curve.append((training.steps, accuracies(problem, theta, validation(0))))

torch.save(training.state_dict(), "checkpoint.pt")

# %% [markdown]
# A [`Record`][bilevel.Record] is one step in numbers. Read more than the loss:

# %%
print("step  loss  accuracy  inner residual    curvature  status")
for record in (records[0], records[9], records[39]):
    low, high = record.curvature
    print(
        f"{record.step:4}{record.outer_value:6.1f}{100 * record.metrics['accuracy']:8.0f} %"
        f"{record.inner_residual:16.1f}{low:8.1f} –{high:4.1f}  {record.status}"
    )

# %% [markdown]
# - **Accuracy** on four tasks is a noisy thing; look at its mean over many steps.
# - **Inner residual**, the gradient of the regularized support loss where the inner solver stopped.
#   It should not grow as training goes on. Where it does, training has made the inner problem
#   sharper than the inner steps can follow, and accuracy falls soon after
#   ([a run that did](../reproductions/imaml.md#why-the-steps-backtrack)).
# - **Curvature** that conjugate gradients met: the eigenvalues of the inner Hessian, $\lambda$
#   included, reach at least from the first number to the second. A first number at or
#   below 0 is negative curvature, and such a point is no minimum of anything.
# - **Status** by task. `INDEFINITE` says just that; `DIVERGED` and `NON_FINITE` tasks are left out
#   and counted in `failed`. See [what each means](../concepts/results.md#status).
#
# ## Stop and resume
#
# The checkpoint holds the outer variable, the optimizer, and the step. Suppose that the machine
# went down; a new process builds the same trainer and goes on where the old one stopped, with the
# same bits:

# %%
fresh, _ = stateless(Net(ways=5))
resumed = trainer.begin(fresh)
resumed.load_state_dict(torch.load("checkpoint.pt"))
same = all(fresh[name].equal(theta[name]) for name in theta)
print(f"resumed after {resumed.steps} steps, same parameters: {same}")

for step in range(40, 80):
    record, _ = resumed.advance(train(step))
    records.append(record)
curve.append((resumed.steps, accuracies(problem, fresh, validation(0))))
theta = resumed.outer
torch.save(theta, "theta.pt")  # what you keep

statuses = sum(record.status.get("BUDGET", 0) for record in records)
print(f"{statuses} of {4 * len(records)} tasks ended as asked")

# %% [markdown]
# Tasks are a function of the step, so there is no state of a data loader to save.
#
# ## Unseen kinds
#
# All settings are fixed; now the test kinds, once:

# %%
print("untrained, adapted ", interval(accuracies(problem, stateless(module)[0], test(0))))
print("trained, adapted   ", interval(accuracies(problem, theta, test(0))))

# %% [markdown]
# ![Above, ten kinds of marks, three pictures of each, in different light. Below, accuracy against
# meta-steps: dots of the training tasks, and the curve on validation kinds, which rises from 65 %
# to 90 % within forty steps; a dashed line for the nearest picture at 54 %.](imaml_your_data.png)

# %%
import matplotlib.pyplot as plt

INK, BLUE, ORANGE = "#1e293b", "#2563eb", "#d97706"
figure, (above, below) = plt.subplots(
    2, 1, figsize=(7.6, 5.6), layout="constrained", height_ratios=[1, 1.9]
)
tiles = np.pad(images[:10, :3], ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=255)
above.imshow(tiles.transpose(1, 2, 0, 3).reshape(3 * 18, 10 * 18), cmap="gray", vmin=0, vmax=255)
above.set_title("ten kinds of marks, three pictures of each", fontsize=10, color=INK)
above.set_axis_off()

shares = [100 * record.metrics["accuracy"] for record in records]
below.plot(range(80), shares, ".", ms=5, color="#94a3b8", label="four training tasks")
steps = [step for step, _ in curve]
means = np.array([float(values.mean()) for _, values in curve])
halves = np.array([1.96 * float(values.std()) / 10 for _, values in curve])
below.fill_between(steps, means - halves, means + halves, color=BLUE, alpha=0.2, lw=0)
below.plot(steps, means, "o-", color=BLUE, label="100 tasks of unseen kinds, with interval")
below.axhline(float(nearest.mean()), color=ORANGE, ls="--", lw=1.2, label="nearest picture")
below.set_xlabel("meta-steps", color=INK)
below.set_ylabel("accuracy after adapting, %", color=INK)
below.set_ylim(45, 100)
below.legend(frameon=False, loc=(0.5, 0.2))
below.grid(color="#e2e8f0", linewidth=0.8)
below.set_axisbelow(True)
below.spines[["top", "right"]].set_visible(False)
below.spines[["left", "bottom"]].set_color("#94a3b8")
below.tick_params(colors="#475569")
figure.savefig("imaml_your_data.png", dpi=100)
plt.close(figure)

# %% [markdown]
# ## One new task
#
# Somebody brings five kinds that you have never seen, one picture of each. Adapt, and put the
# result back into the module, which is an ordinary module again:

# %%
from bilevel import Task, solve_inner

names = test_pool.names[:5]
brought = (test_pool.images[:5, 0].float() / 255, torch.arange(5))  # scaled as by the sampler
new_task = Task(inner_batch=brought)  # there is nothing to judge it by, and no need to
found = solve_inner(problem, theta, new_task, inner_solver=solver)
module.load_state_dict(found.inner)

unknown = test_pool.images[3, 7:8].float() / 255
with torch.no_grad():
    score = module(unknown).softmax(-1)[0]
print(f"it is {names[int(score.argmax())]}, and was {names[3]}")

# %% [markdown]
# $\theta$ is not changed by it; the next task starts from $\theta$ again.
#
# ## Choosing the settings
#
# **How many inner steps, how many CG steps?** iMAML solves neither problem to the end, and so its
# hypergradient is off. By how much, and for want of what, is not a matter of taste:
# `error_estimate=True` [estimates it](../concepts/trust.md#the-error-estimated) and tells the two
# parts apart.

# %%
from bilevel import hypergradient


def errors(strength, inner_steps, cg_steps):
    return hypergradient(
        FewShot(net, strength),
        theta,
        train(1000),
        inner_solver=BacktrackingDescent(lr=0.1, max_steps=inner_steps),
        method=ImplicitCG(max_steps=cg_steps, rtol=0.0, error_estimate=True),
    )


print("inner steps  CG steps  error, %  of inner  of CG")
for inner_steps, cg_steps in ((5, 3), (15, 3), (5, 9), (15, 9)):
    found = errors(1.0, inner_steps, cg_steps).diagnostics
    parts = (found.error_estimate, found.inner_error, found.linear_error)
    total, inner, linear = (100 * part.median().item() for part in parts)
    print(f"{inner_steps:11}{cg_steps:10}{total:10.0f}{inner:10.0f}{linear:7.0f}")
print("with a strength of 0.1:", errors(0.1, 15, 9).diagnostics.error_estimate.median().item())

# %% [markdown]
# More inner steps alone, or more CG steps alone, help until the other part is what remains;
# together they help more. Spend where the larger part is, and stop where it no longer shows in
# accuracy: the first row trained to the result above, at a third of the last row's gradients and
# products. At a $\lambda$ of 0.1 the estimate is `inf`: there is negative curvature, or no
# minimum that one Newton step would come nearer to, and no number to be had.
#
# **How strong a pull?** $\lambda$ is part of the problem, not of its solution, and no
# estimate chooses it. Short runs do, judged on validation kinds:

# %%
for strength in (0.1, 1.0, 10.0):
    trial = FewShot(net, strength)
    torch.manual_seed(0)
    start, _ = stateless(Net(ways=5))
    short = Trainer(
        trial,
        inner_solver=solver,
        method=ImplicitCG(max_steps=3, rtol=0.0),
        optimizer=lambda params: torch.optim.Adam(params, lr=3e-3),
        clip=2.0,
        on_failure="mean",
    ).fit(start, train, steps=15)
    bent = any("INDEFINITE" in record.status for record in short)
    print(
        f"strength {strength:<4g} {interval(accuracies(trial, start, validation(0)))}, "
        f"{'some tasks' if bent else 'no task'} INDEFINITE"
    )

# %% [markdown]
# Too strong, and the support pictures have little to say. Too weak, and five steps end where the
# regularized loss curves downwards in some direction: conjugate gradients stop there, and the
# hypergradient is a correction of the first-order one rather than what the theorem promises. It may
# train all the same. One seed and 15 steps tell 10 from the others, and no more than that.
#
# In practice:
#
# 1. Start at a $\lambda$ of 1 or 2 for a smooth network, 0.2 for ReLU with batch norm
#    ([measured](../reproductions/imaml.md#does-the-implicit-gradient-help)), with 5 to 16 inner
#    steps and 3 to 5 CG steps.
# 2. Read the status. Where many tasks are `INDEFINITE`, raise $\lambda$, or take more inner steps.
# 3. Read the inner residual over training. Where it grows, lower Adam's learning rate, or raise
#    $\lambda$.
# 4. Compare with `FirstOrder()` in place of `ImplicitCG`, which costs no CG steps. If it does as
#    well on validation kinds, take it.
# 5. Only then: more steps, more tasks per step, a `schedule`, and `average=0.99`, all arguments of
#    [`Trainer`][bilevel.Trainer].
#
# [`doctor`](../concepts/doctor.md) goes through such a list by itself, on one batch of your tasks.
#
# ## On a GPU
#
# Nothing changes but where the tensors begin. Everything else follows them, episodes are drawn on
# the device itself, and what you make by hand, such as the labels of a new task, goes there too:
#
# ```python
# pool = pool.to("cuda")
# theta, net = stateless(Net(ways=5).to("cuda"))
# ```
#
# A GPU is idle with four small tasks: raise `tasks` first. What does not fit is taken in parts by
# `Trainer(..., task_chunk=8)`. Inner steps in TF32 or bfloat16 are
# `kernels=Kernels(precision="tf32")`, with [`GradientDescent`][bilevel.solvers.GradientDescent] as
# inner solver, since backtracking compares values; see [speed and memory](../concepts/speed.md). On
# a CPU, `engine="auto"` measures whether tasks run faster together or one by one.
#
# ## Other data
#
# Not pictures? Whatever your network takes will do: rows of a table, series, tokens. Write the
# function of the step yourself; [`Task.stack`][bilevel.Task] takes tasks of one shape.

# %%
series = torch.randn(40, 12, 64, generator=torch.Generator().manual_seed(0))  # kinds, examples


def draw(step):
    random = torch.Generator().manual_seed(step)
    tasks = []
    for _ in range(4):
        kinds = series[torch.randperm(40, generator=random)[:5]]
        rows = kinds[:, torch.randperm(12, generator=random)[:6]]
        support = (rows[:, :1].flatten(0, 1), torch.arange(5))
        query = (rows[:, 1:].flatten(0, 1), torch.arange(5).repeat_interleave(5))
        tasks.append(Task(support, query))
    return Task.stack(tasks)


start, perceptron = stateless(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 5)))
result = hypergradient(
    FewShot(perceptron, strength=1.0),
    start,
    draw(0),
    inner_solver=solver,
    method=ImplicitCG(max_steps=3, rtol=0.0),
)
print({name: list(value.shape) for name, value in result.gradient.items()})

# %% [markdown]
# A number to predict instead of a kind, or a loss of your own: subclass
# [`Adaptation`][bilevel.problems.Adaptation], which is `FewShot` without the cross entropy. Both
# adapt the last layer alone with `adapted=["head.weight", "head.bias"]`, and learn $\lambda$ with
# `learn_strength`, which [needs care](../reproductions/imaml.md#learning-the-strength).
#
# ## Where to go from here
#
# - The same on Omniglot, with tables and a learning curve, in one command: `bilevel train imaml`
#   ([iMAML](../concepts/imaml.md#train-it)).
# - Which claims of the paper held when we ran them again: [iMAML,
#   reproduced](../reproductions/imaml.md).
# - Schedules, projections, warm starts: [Training](../concepts/training.md).
