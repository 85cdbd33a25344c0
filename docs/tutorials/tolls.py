# %% [markdown]
# # Tolls on a city network
#
# Every driver takes the road that is quickest for *them*. What comes out is an equilibrium in which
# nobody gains by another route, and it is not the best that the city could have: each driver also
# slows down everybody behind. A toll can change that. But which toll, on which road? Whoever sets
# it has the drivers' equilibrium inside their own problem:
#
# $$
# \min_{\tau \ge 0}\; \sum_a t_a(v_a)\, v_a \qquad\text{with}\qquad
# v = \text{the equilibrium of drivers who see } t_a(v_a) + \tau_a .
# $$
#
# The outer variable is the tolls $\tau$, in units of time, the inner variable the flows $v$. The
# outer objective is the time that all drivers spend together; the tolls themselves are no loss,
# since somebody gets them. This page begins with a network of five links on which everything is
# known exactly, and ends on one with 76.
#
# ## Braess' paradox
#
# Six travellers go from 1 to 2. Two links get slower by 10 with each traveller who takes them; two
# take 50 and get slower by 1. Then somebody builds the shortcut from 3 to 4
# (Braess, 1968; the numbers are those of *Transportation Networks for Research*).

# %%
from bilevel.problems import RoadNetwork, user_equilibrium

network = RoadNetwork.braess()
without = network.without_links([(3, 4)])
for name, one in (("without the shortcut", without), ("with it", network)):
    found = user_equilibrium(one)
    print(f"{name:21} total time {found.total_time:.3f}, each {found.total_time / 6:.3f}")

# %% [markdown]
# The new road costs everyone 9, and nobody is to blame. While all are still on the old routes, the
# way through the shortcut takes 70 instead of 83, so one after the other goes there, until all
# three routes take 92.
#
# A city need not tear the road up. With a toll $\tau$ on it, fewer take it. On five links the
# flows can be worked out by hand: the total time is $552 - \frac{80}{13}\tau + \frac{2}{13}\tau^2$
# until $\tau = 13$, where the shortcut is empty, and 498 from there on. That makes the slope at
# $\tau = 5$ equal to $-\frac{60}{13} = -4.6154$, and
# [`exact_hypergradient`][bilevel.problems.exact_hypergradient] finds it by differentiating the
# equilibrium:

# %%
import torch

from bilevel.problems import TollDecision, exact_hypergradient

toll = torch.tensor([5.0], dtype=torch.float64)
value, slope, _ = exact_hypergradient(TollDecision(network, [(3, 4)]), toll)
print(f"total time {value:.4f}, slope {slope.item():.4f}")

# %% [markdown]
# ## Smooth travellers
#
# At $\tau = 13$ the curve has a kink, because a route goes out of use. On a city network there are
# hundreds of routes and hundreds of kinks, and descent comes to rest on one of them early. So we
# differentiate a smoother equilibrium. In the *stochastic* one
# ([more](../concepts/roads.md#two-equilibria)) travellers see times with some error: a route that
# takes one unit longer than another is taken $e^{-\theta}$ times as often. The
# *dispersion* $\theta$ says how sharp their eyes are.
#
# [`RoadTolls`][bilevel.problems.RoadTolls] is this as a
# [bilevel problem](../concepts/problems.md) like any other, with a task (the demand) and an inner
# solver of its own, so that [`hypergradient`][bilevel.hypergradient.hypergradient] does the rest.

# %%
from bilevel import hypergradient
from bilevel.problems import RoadTolls
from bilevel.solvers import ImplicitCG


def slope_at(problem, toll):
    return hypergradient(
        problem,
        toll,
        problem.task(),
        inner_solver=problem.solver(),
        method=ImplicitCG(max_steps=2000, rtol=1e-10),
    )


for dispersion in (0.25, 1.0, 4.0):
    smooth = RoadTolls(network, [(3, 4)], dispersion)
    print(f"dispersion {dispersion:<4g}: slope {slope_at(smooth, toll).gradient.item():.4f}")

# %% [markdown]
# As the dispersion grows, the exact slope comes back, and the kink with it:
#
# ![Left: the network of Braess with its travel times, the shortcut dashed. Right: total time
# against the toll on the shortcut; the exact curve falls from 552 to 498 and has a kink at 13;
# three smooth curves approach it as the dispersion grows; a tangent touches the exact curve at a
# toll of 5.](tolls_braess.png)

# %%
import matplotlib.pyplot as plt

INK, MUTED = "#1e293b", "#64748b"
COLORS = ["#d97706", "#15803d", "#2563eb"]
figure, (left, right) = plt.subplots(
    1, 2, figsize=(8, 3.5), layout="constrained", width_ratios=[1, 1.35]
)
times = {(1, 3): "10 v", (1, 4): "50 + v", (3, 2): "50 + v", (3, 4): "10 + v", (4, 2): "10 v"}
for (tail, head), time in times.items():
    (x0, y0), (x1, y1) = network.coordinates[tail], network.coordinates[head]
    new = (tail, head) == (3, 4)
    left.annotate(
        "",
        (x1, y1),
        (x0, y0),
        arrowprops={
            "arrowstyle": "-|>",
            "color": "#be123c" if new else MUTED,
            "lw": 1.8,
            "ls": "--" if new else "-",
            "shrinkA": 13,
            "shrinkB": 13,
        },
    )
    side = {(1, 3): (-0.22, 0.14), (1, 4): (-0.24, -0.16), (3, 2): (0.24, 0.14)}
    dx, dy = side.get((tail, head), (0.27, 0.0) if new else (0.22, -0.16))
    left.text((x0 + x1) / 2 + dx, (y0 + y1) / 2 + dy, time, ha="center", va="center", color=INK)
for node, (x, y) in network.coordinates.items():
    left.plot(x, y, "o", ms=22, color="white", mec=MUTED)
    left.text(x, y, str(node), ha="center", va="center", color=INK)
left.set(xlim=(-0.25, 2.25), ylim=(-1.35, 1.35), aspect="equal")
left.set_title("travel times at a flow v", fontsize=10, color=INK)
left.set_axis_off()

tolls = torch.linspace(0, 24, 17, dtype=torch.float64)
finely = torch.linspace(0, 24, 97, dtype=torch.float64)
below = finely.clamp(max=13)  # from there on nothing changes
for dispersion, color in zip((0.25, 1.0, 4.0), COLORS, strict=True):
    smooth = RoadTolls(network, [(3, 4)], dispersion)
    totals = [slope_at(smooth, one).outer_value.item() for one in tolls.split(1)]
    right.plot(tolls, totals, color=color, label=f"θ = {dispersion:g}")
right.plot(finely, 552 - 80 * below / 13 + 2 * below**2 / 13, color=INK, label="exact")
right.plot([1, 9], [value - 4 * slope.item(), value + 4 * slope.item()], "--", color=MUTED)
right.plot(5, value, "o", color=MUTED)
right.set_xlabel("toll on the shortcut", color=INK)
right.set_ylabel("total time", color=INK)
right.legend(frameon=False)
right.grid(color="#e2e8f0", linewidth=0.8)
right.spines[["top", "right"]].set_visible(False)
right.spines[["left", "bottom"]].set_color("#94a3b8")
right.tick_params(colors="#475569")
figure.savefig("tolls_braess.png", dpi=110)
plt.close(figure)

# %% [markdown]
# [`dispersion_homotopy`][bilevel.problems.dispersion_homotopy] uses just that: it minimises under a
# small dispersion, then under larger ones, each from the solution before. What it found is judged
# by the exact equilibrium:

# %%
from bilevel.problems import dispersion_homotopy, equilibrium_under

problem = RoadTolls(network, [(3, 4)])
stages = dispersion_homotopy(problem, [1.0, 4.0], problem.decision.zeros(), bounds=(0.0, None))
after = equilibrium_under(problem.decision, stages[-1].outer)
print(f"total time {after.total_time:.3f}")

# %% [markdown]
# This toll is as good as tearing the shortcut up, and can be taken back.
#
# ## Sioux Falls
#
# Now 24 nodes, 76 links and 528 pairs of origins and destinations: the network of LeBlanc, Morlok
# and Pierskalla (1975), on which half a century of methods has been tried. It is no model of the
# city as it is: the roads are few and stylised, and the places of the nodes are those of the
# paper's diagram. [`tntp`][bilevel.problems.data.tntp.tntp] reads the files of
# [Transportation Networks for Research](https://github.com/bstabler/TransportationNetworks).

# %%
import os

from bilevel.problems import system_optimum, tntp

city = tntp("SiouxFalls", root=os.environ["BILEVEL_DATA"])
before = user_equilibrium(city)
best, first_best = system_optimum(city)
trips = float(city.demand.sum())
mean = before.total_time / trips
print(city)
print(f"selfish   {before.total_time:12,.0f}")
print(f"at best   {best.total_time:12,.0f}")
print(f"mean trip {mean:.2f}")

# %% [markdown]
# Times are in hundredths of an hour, so that the mean trip is 12 minutes. Selfishness costs 3.8 %.
#
# All of that can be had back, by tolls that are known (Pigou, 1920): on each link what a driver
# costs the others, $v_a\, t_a'(v_a)$, here `first_best`. But then *every* link has to be tolled.
# What if there can be toll gates on six roads only?
#
# ## Which six?
#
# The hypergradient at $\tau = 0$ tells for all 76 links at once what a first small toll would
# save. We choose $\theta$ so that its product with the mean trip is 40. Then the smooth flows
# differ from the exact ones by a few percent:

# %%
everywhere = RoadTolls(city, dispersion=40 / mean)
zero = everywhere.decision.zeros()
found = slope_at(everywhere, zero)
flow = everywhere.flows(found.inner, zero, everywhere.task().inner_batch)
print(f"solved: {found.ok}")
print(f"flows differ by {100 * (flow - before.flow).abs().sum() / before.flow.sum():.1f} %")

# %% [markdown]
# One number of the 76, against finite differences: solve the equilibrium anew with a little more
# and a little less toll on the link from 5 to 6.

# %%
from bilevel import solve_inner


def total_time(problem, toll):
    found = solve_inner(problem, toll, problem.task(), inner_solver=problem.solver(tol=1e-12))
    return problem.outer_objective(found.inner, toll, problem.task().outer_batch).item()


link, h = city.link(5, 6), 0.005
step = torch.zeros_like(zero)
step[link] = h
slope = (total_time(everywhere, step) - total_time(everywhere, -step)) / (2 * h)
error = abs(slope - found.gradient[link].item()) / abs(slope)
print(f"hypergradient {found.gradient[link].item():,.1f}, differences {slope:,.1f}")
print("relative difference", "below 1e-6" if error < 1e-6 else f"{error:.0e}")

# %% [markdown]
# Two solves for one number; the hypergradient is all 76 for one solve and one linear system. Now
# add up the two directions of each road, and take the six with the steepest slope. Beside them, the
# six that a look at the traffic would suggest: those with the most flow for their capacity.

# %%
roads = [(i, j) for i, j in city.ends if i < j]


def both(values, road):
    """The sum of the two directions."""
    i, j = road
    return float(values[city.link(i, j)] + values[city.link(j, i)])


steepest = sorted(roads, key=lambda road: both(found.gradient, road))[:6]
fullest = sorted(roads, key=lambda road: -both(before.flow / before.capacity, road))[:6]
print("steepest", *(f"{i}–{j}" for i, j in sorted(steepest)))
print("fullest ", *(f"{i}–{j}" for i, j in sorted(fullest)))

# %% [markdown]
# ## Set the tolls
#
# Twelve tolls at or above 0, for either choice of roads, by at most 20 steps of L-BFGS-B
# ([`minimize_bounded`][bilevel.minimize_bounded]). What is found is judged by the exact
# equilibrium, not by the smooth one in which it was found.


# %%
def gates(roads):
    """The tolls of six roads, as a problem."""
    links = [link for i, j in roads for link in ((i, j), (j, i))]
    return RoadTolls(city, links, dispersion=everywhere.dispersion)


def search(problem):
    found = dispersion_homotopy(
        problem,
        [problem.dispersion],
        problem.decision.zeros(),
        bounds=(0.0, None),
        max_steps=20,
        tol=1e-2,
    )
    return found[-1].outer


def report(name, total, revenue):
    share = 100 * (before.total_time - total) / (before.total_time - best.total_time)
    print(f"{name:40}{total:12,.0f}{share:9.0f} %{revenue / trips:9.2f}")


problem, other = gates(steepest), gates(fullest)
tolls = search(problem)
after = equilibrium_under(problem.decision, tolls)
elsewhere = equilibrium_under(other.decision, search(other))
some = first_best[list(problem.decision.links)]
partial = equilibrium_under(problem.decision, some)

print(f"{'':40}{'total time':>12}{'saved':>11}{'paid':>9}")
report("no tolls", before.total_time, 0.0)
report("first-best tolls, on these six only", partial.total_time, partial.revenue)
report("six fullest roads", elsewhere.total_time, elsewhere.revenue)
report("six steepest roads", after.total_time, after.revenue)
report("first-best tolls, on all 38", best.total_time, best.revenue)

# %% [markdown]
# **The slope knew.** Six roads out of 38 get back two thirds of what is to be had, with tolls of
# one to four minutes. The six fullest roads, searched in the same way, get 42 %: where a jam is,
# and where a toll pays, are two questions.
#
# **First-best is all or nothing.** The tolls that are optimal on all roads, raised on six of them
# alone, make total time 15 % worse than no toll at all: they are large, and everybody evades them.
#
# **Who pays?** The last column is what a mean trip pays, in the same unit as its time. Trips on the
# six-road network got quicker by 0.5 and pay 1.2, so drivers are worse off unless they get the
# revenue back, in another way. First-best tolls of this kind take twice as much as the trip itself
# (other tolls with the same flows exist; Hearn and Ramana, 1998).
#
# ## On the map
#
# ![Two maps of the network. Left, before: flow over capacity, above 2 in the center and on the
# south-western approach, low on the western and northern ring. Right, after: flow falls on the six
# tolled roads and beside them, and rises on the ring around the city; the tolls stand beside their
# roads.](tolls_map.png)
#
# The tolls send traffic round the outside, where there is room: by 1–2–3 in the north-west, and by
# 16–18–20 in the east. The fullest road of all, 6–8, is left as it was.

# %%
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize

place = {node: np.array(where) for node, where in city.coordinates.items()}
size = np.ptp(list(place.values()), axis=0).max()


def line(tail, head):
    """A link, drawn on the right of its road."""
    along = place[head] - place[tail]
    aside = 0.008 * size * np.array([along[1], -along[0]]) / np.linalg.norm(along)
    return [place[tail] + aside, place[head] + aside]


def colors(*names):
    return LinearSegmentedColormap.from_list("", names)


maps = [
    (
        "before: flow over capacity",
        before.flow / before.capacity,
        Normalize(0, 2.5),
        colors("#bfdbfe", "#fde68a", "#f59e0b", "#be123c", "#4c0519"),
    ),
    (
        "after: change of flow, in 1,000 vehicles",
        (after.flow - before.flow) / 1000,
        Normalize(-3, 3),
        colors("#1d4ed8", "#93c5fd", "#e2e8f0", "#fdba74", "#c2410c"),
    ),
]
figure, panels = plt.subplots(1, 2, figsize=(8, 5), layout="constrained")
for axes, (title, values, scale, cmap) in zip(panels, maps, strict=True):
    drawn = LineCollection([line(i, j) for i, j in city.ends], cmap=cmap, norm=scale, lw=3)
    drawn.set(array=values.numpy(), capstyle="round")
    axes.add_collection(drawn)
    axes.plot(*zip(*place.values(), strict=True), "o", ms=11, color="white", mec=MUTED, zorder=3)
    for node, (x, y) in place.items():
        axes.text(x, y, str(node), ha="center", va="center", fontsize=6.5, color=INK, zorder=4)
    axes.margins(0.03)
    axes.set_aspect("equal")
    axes.set_axis_off()
    bar = figure.colorbar(drawn, ax=axes, orientation="horizontal", shrink=0.85, pad=0.01)
    bar.set_label(title, color=INK)
    bar.outline.set_visible(False)

# The tolls, beside their roads.
beside = {(5, 6): (-5, 3), (11, 12): (0, 4), (13, 24): (0, -5)}
beside |= {(15, 22): (6, 1), (17, 19): (-6, 0), (21, 22): (-6, -1)}
for road, (dx, dy) in beside.items():
    x, y = (place[road[0]] + place[road[1]]) / 2 + 0.01 * size * np.array([dx, dy])
    toll = tolls[problem.decision.links.index(city.link(*road))]
    label = {"boxstyle": "round,pad=0.2", "fc": INK, "ec": "none"}
    panels[1].text(
        x, y, f"{toll:.1f}", ha="center", va="center", fontsize=8, color="white", bbox=label
    )
figure.savefig("tolls_map.png", dpi=90)
plt.close(figure)

# %% [markdown]
# ## What is approximate
#
# - **The equilibrium that is differentiated** is the smooth one. What is reported is the exact one.
#   More stages, such as `[40 / mean, 160 / mean]`, bring the two together, at the cost of another
#   search each.
# - **The minimum** is a local one: total time as a function of tolls is not convex. The search
#   stopped at a hundredth of its first slope, or after 20 steps.
# - **The six roads** are those with the steepest slope at no toll. Whether six others would do
#   better together is a combinatorial question, which no gradient answers.
# - **The travellers** go whatever it costs: the demand is fixed, and all value time alike.
#
# ## Where to go from here
#
# - The same from the command line, with more stages, a table of all links and maps:
#
#     ```console
#     $ bilevel train tolls --network sioux-falls --links 5-6,6-5,17-19,19-17 --root DIR
#     $ bilevel train network-design --variant A --root DIR
#     ```
#
# - What stands behind it, Anaheim with its 914 links, and values beside published optima:
#   [Roads and tolls](../concepts/roads.md).
# - Your own network: [`RoadNetwork.from_links`][bilevel.problems.RoadNetwork], or your own TNTP
#   files. Your own decision, such as which lights to change: subclass
#   [`Decision`][bilevel.problems.Decision].
# - Markets, where each firm is selfish in its own way: [`Cournot`][bilevel.problems.Cournot].
