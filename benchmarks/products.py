"""Ways to a product with the inner Hessian, at equal answers: time, and the memory held for them.

    python benchmarks/products.py [--full] [--device cpu] [--threads 1] [--out benchmarks/results]

The network of iMAML (5-way 1-shot, 64 channels) and logistic regression (2,000 rows, 500 features),
for 1 and 8 tasks, stacked; with ``--full`` also the pooling network, the first network with norms
that are exact to any order, and 32 tasks. Each way is checked in float64 to 1e-8, against the dense
Hessian where there is a formula for it and against the library's product elsewhere, before it is
timed in float32. Differences of gradients are approximate: their error is reported, by the usual
step and by the best one of many. *Held* are the bytes that stay between two products, *peak* those
of one product on top of them. Writes a table, JSON and a picture.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from arguments import arguments
from timing import Times, alternate
from torch import Tensor, nn
from torch.func import grad, jvp, vjp

from bilevel import BilevelProblem, exact_norms, stateless
from bilevel.experiments.pictures import COLORS, INK, new_figure, tidy
from bilevel.experiments.results import Row, write_results
from bilevel.flat import FlatProblem, Outer
from bilevel.linearised import linearise
from bilevel.memory import held_bytes, peak_bytes
from bilevel.problems import EpisodeSampler, FewShot, Logistic, conv_pool, conv_strided, glyphs
from bilevel.pytree import PyTree, tree_leaves
from bilevel.task import TaskBatch

Product: TypeAlias = Callable[[Tensor], Tensor]
Stated: TypeAlias = tuple[BilevelProblem, PyTree, TaskBatch]

INIT, STRENGTH, WAYS, QUERIES, CHANNELS = "imaml", 2.0, 5, 15, 64
ROWS, FEATURES = 2000, 500
SAME = 1e-8
REPEATS = 2
# Of difference steps, in units of ‖z‖ for a direction of norm 1.
STEPS = tuple(10.0**-k for k in range(10))


# Problems


def few_shot(make: Callable[..., nn.Module], tasks: int, *, exact: bool = False) -> Stated:
    """The network of iMAML, as in the benchmark of the hypergradient."""
    module = make(WAYS, CHANNELS, init=INIT, seed=0)
    params, net = stateless(exact_norms(module) if exact else module)
    sampler = EpisodeSampler(
        glyphs(classes=40, seed=0), WAYS, 1, QUERIES, tasks=tasks, rotations=True
    )
    return FewShot(net, STRENGTH), {name: p.detach() for name, p in params.items()}, sampler(0)


def logistic(tasks: int) -> Stated:
    """Logistic regression; the Hessian has a formula."""
    found = Logistic.generated(
        FEATURES, FEATURES // 10, ROWS, ROWS, tasks=tasks, log_weight=math.log(0.2)
    )
    assert isinstance(found.task, TaskBatch)
    return found.problem, found.outer, found.task


PROBLEMS: dict[str, Callable[[int], Stated]] = {
    "strided": partial(few_shot, conv_strided),
    "pool": partial(few_shot, conv_pool),
    "strided-exact": partial(few_shot, conv_strided, exact=True),
    "logistic": logistic,
}


@dataclass(frozen=True)
class Setting:
    """A problem at a point, with a direction for each task.

    Attributes:
        name: Name of the problem.
        count: Number of tasks.
        device: Where everything lies.
        dtype: Of everything; the values are those of float32.
    """

    name: str
    count: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    flat: FlatProblem = field(init=False)
    z: Tensor = field(init=False)
    v: Tensor = field(init=False)

    def __post_init__(self) -> None:
        problem, outer, batch = PROBLEMS[self.name](self.count)
        leaves = Outer.of(outer)
        leaves = leaves.with_leaves([self._here(leaf) for leaf in leaves.leaves])
        # Through float32, so that both precisions see the same numbers.
        tasks = batch.to(self.device, torch.float32).to(self.device, self.dtype)
        flat = FlatProblem.of(problem, leaves, tasks)
        random = torch.Generator().manual_seed(0)
        # Off the common start, so that tasks differ.
        noise, v = (torch.randn(flat.start.shape, generator=random) for _ in range(2))
        z = flat.start.float().cpu() + 0.01 * noise
        object.__setattr__(self, "flat", flat)
        object.__setattr__(self, "z", self._here(z))
        object.__setattr__(self, "v", self._here(v / v.norm(dim=1, keepdim=True)))

    def _here(self, x: Tensor) -> Tensor:
        return x.to(torch.float32).to(self.device, self.dtype)

    # What one would write without the library: leaves, their objective, and its gradient

    def tree(self, v: Tensor) -> Any:
        """The leaves of z, or of a direction, as views."""
        return self.flat.vector.tree(self.flat.parts(v))

    def total(self, tree: Any) -> Tensor:
        """The inner objective without the regularizer, summed over tasks.

        Differentiated from outside, where `vmap` of a gradient would be wrong for native norms.
        """
        problem, outer, batch = self.flat.problem, self.flat.outer.tree, self.flat.tasks.inner_batch
        if self.count == 1:
            return problem.inner_objective(tree, outer, tuple(x[0] for x in batch))

        def one(leaves: Any, *data: Tensor) -> Tensor:
            return problem.inner_objective(leaves, outer, data)

        values: Tensor = torch.vmap(one)(tree, *batch)
        return values.sum()

    def leaves(self, z: Tensor) -> tuple[Any, list[Tensor]]:
        """The leaves of z, which require grad."""
        leaves = [part.requires_grad_() for part in self.flat.parts(z.detach())]
        return self.flat.vector.tree(leaves), leaves

    def slopes(self, z: Tensor, *, graph: bool) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The gradient without the regularizer, leaf by leaf, and the leaves."""
        tree, leaves = self.leaves(z)
        return torch.autograd.grad(self.total(tree), leaves, create_graph=graph), leaves

    def gradient(self, z: Tensor) -> Tensor:
        """The gradient without the regularizer, ``[tasks, n]``."""
        return self.flat.joined(self.slopes(z, graph=False)[0])

    def regularized(self, parts: Any, v: Tensor) -> Tensor:
        """A product from its leaves, with the regularizer's part by its formula."""
        joined = self.flat.joined([part.detach() for part in tree_leaves(parts)])
        strength = self.flat.strength
        return joined if strength is None else torch.addcmul(joined, strength, v)

    def dense(self) -> Tensor | None:
        """The Hessian of each task by its formula, where there is one."""
        if not isinstance(self.flat.problem, Logistic):
            return None
        features, labels = self.flat.tasks.inner_batch
        odds = (labels * (features @ self.z.unsqueeze(-1)).squeeze(-1)).sigmoid()
        bent = features * (odds * (1 - odds)).unsqueeze(-1) / features.shape[1]
        hessian: Tensor = features.mT @ bent + torch.diag(self.flat.outer.leaves[0].exp())
        return hessian


# Ways to a product: each prepares what it holds between products


def kept(s: Setting) -> Product:
    """The library: one graph of the gradient, and a pull through it for each product."""
    return linearise(s.flat, s.z).pull


def kept_by_hand(s: Setting) -> Product:
    """The same without the library."""
    slopes, leaves = s.slopes(s.z, graph=True)

    def product(v: Tensor) -> Tensor:
        return s.regularized(
            torch.autograd.grad(slopes, leaves, s.flat.parts(v), retain_graph=True), v
        )

    return product


def kept_one_by_one(s: Setting) -> Product:
    """The library, a graph for each task: nothing is stacked."""
    pulls = []
    for i, z in enumerate(s.z.split(1)):
        flat = FlatProblem.of(s.flat.problem, s.flat.outer, s.flat.tasks.part(i, i + 1))
        pulls.append(linearise(flat, z).pull)
    return lambda v: torch.cat([pull(one) for pull, one in zip(pulls, v.split(1), strict=True)])


def rebuilt(s: Setting) -> Product:
    """Reverse over reverse, nothing kept: the graph is built for each product."""

    def product(v: Tensor) -> Tensor:
        slopes, leaves = s.slopes(s.z, graph=True)
        return s.regularized(torch.autograd.grad(slopes, leaves, s.flat.parts(v)), v)

    return product


def vjp_of_grad_kept(s: Setting) -> Product:
    """`torch.func.vjp` of `torch.func.grad`, called once."""
    pull = vjp(grad(s.total), s.tree(s.z))[1]
    return lambda v: s.regularized(pull(s.tree(v))[0], v)


def vjp_of_grad(s: Setting) -> Product:
    """`torch.func.vjp` of `torch.func.grad`, called for each product."""
    return lambda v: s.regularized(vjp(grad(s.total), s.tree(s.z))[1](s.tree(v))[0], v)


def jvp_of_grad(s: Setting) -> Product:
    """Forward over reverse."""
    return lambda v: s.regularized(jvp(grad(s.total), (s.tree(s.z),), (s.tree(v),))[1], v)


def grad_of_jvp(s: Setting) -> Product:
    """Reverse over forward: the gradient of the slope along the direction."""

    def product(v: Tensor) -> Tensor:
        direction = s.tree(v)

        def slope(tree: Any) -> Tensor:
            along: Tensor = jvp(s.total, (tree,), (direction,))[1]
            return along

        return s.regularized(grad(slope)(s.tree(s.z)), v)

    return product


def difference(s: Setting, *, central: bool, step: float | None = None) -> Product:
    """Two gradients apart, or one and that at the point, which is known.

    Args:
        s: The setting.
        central: On both sides of the point.
        step: In units of ‖z‖ for a direction of norm 1; None: the usual one for the precision.
    """
    step = torch.finfo(s.dtype).eps ** (1 / 3 if central else 1 / 2) if step is None else step
    here = None if central else s.gradient(s.z)

    def product(v: Tensor) -> Tensor:
        h = step * s.z.norm(dim=1, keepdim=True) / v.norm(dim=1, keepdim=True)
        behind, apart = (s.gradient(s.z - h * v), 2 * h) if here is None else (here, h)
        slope = (s.gradient(s.z + h * v) - behind) / apart
        strength = s.flat.strength
        return slope if strength is None else torch.addcmul(slope, strength, v)

    return product


EXACT: dict[str, Callable[[Setting], Product]] = {
    "kept": kept,
    "kept-by-hand": kept_by_hand,
    "kept-one-by-one": kept_one_by_one,
    "rebuilt": rebuilt,
    "vjp-of-grad-kept": vjp_of_grad_kept,
    "vjp-of-grad": vjp_of_grad,
    "jvp-of-grad": jvp_of_grad,
    "grad-of-jvp": grad_of_jvp,
}
DIFFERENCES = {
    "difference-central": partial(difference, central=True),
    "difference-forward": partial(difference, central=False),
}
VARIANTS: dict[str, Callable[[Setting], Product]] = {**EXACT, **DIFFERENCES}
# The forward formula of PyTorch's native norms takes the statistics for constants when it is
# differentiated in turn, without a word (pytorch/pytorch issues 196699 and 196700).
WRONG = {("strided", "grad-of-jvp"), ("pool", "grad-of-jvp")}


def variants_of(count: int) -> dict[str, Callable[[Setting], Product]]:
    """All that differ for so many tasks."""
    return {name: one for name, one in VARIANTS.items() if count > 1 or name != "kept-one-by-one"}


# Measuring


@dataclass(frozen=True)
class Found:
    """What was measured of one setting.

    Attributes:
        times: By variant, and of ``gradient`` and ``graph``, the gradient with its graph kept.
        held: Bytes between two products.
        peak: Bytes of one product, on top of those.
        errors: Relative to the float64 answer, by variant and precision.
        best_errors: Likewise, by the difference step that turned out best.
    """

    times: dict[str, Times]
    held: dict[str, int]
    peak: dict[str, int]
    errors: dict[tuple[str, str], float]
    best_errors: dict[tuple[str, str], float]


def measure(name: str, count: int, rounds: int, device: torch.device) -> Found:
    """Check all variants, then time those that are right.

    Raises:
        SystemExit: A variant computes something else, and is not known to.
    """
    wide, narrow = Setting(name, count, device, torch.float64), Setting(name, count, device)
    dense = wide.dense()
    if dense is None:
        wanted, truth = kept(wide)(wide.v), "the library's product"
    else:
        wanted, truth = (dense @ wide.v.unsqueeze(-1)).squeeze(-1), "the dense Hessian's"
    variants = variants_of(count)
    errors, best, wrong = {}, {}, set()
    for setting in (wide, narrow):
        precision = str(setting.dtype).removeprefix("torch.")
        for variant, prepare in variants.items():
            gap = _distance(prepare(setting)(setting.v), wanted)
            errors[variant, precision] = gap
            if variant in DIFFERENCES:
                make = DIFFERENCES[variant]
                tries = (make(setting, step=step)(setting.v) for step in STEPS)
                best[variant, precision] = min(_distance(one, wanted) for one in tries)
            elif setting is wide and not gap <= SAME:
                if (name, variant) not in WRONG:
                    raise SystemExit(f"{name}: {variant} is {gap:.1e} away from {truth}")
                wrong.add(variant)
    products = {one: make(narrow) for one, make in variants.items() if one not in wrong}
    runs: dict[str, Callable[[], object]] = {
        "gradient": partial(narrow.gradient, narrow.z),
        "graph": partial(narrow.slopes, narrow.z, graph=True),
        **{one: partial(product, narrow.v) for one, product in products.items()},
    }
    times = alternate({one: _repeated(run) for one, run in runs.items()}, rounds, device)
    return Found(
        {one: Times(tuple(s / REPEATS for s in t.seconds)) for one, t in times.items()},
        {one: held_bytes(partial(variants[one], narrow), device) for one in products},
        {one: peak_bytes(runs[one], device) for one in products},
        errors,
        best,
    )


def _repeated(run: Callable[[], object]) -> Callable[[], None]:
    def some() -> None:
        for _ in range(REPEATS):
            run()

    return some


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def rows_of(name: str, count: int, found: Found) -> list[Row]:
    """As they stand in the file."""
    rows = []
    for variant, one in found.times.items():
        where = {"problem": name, "tasks": count, "variant": variant}
        rows.append(Row(where, "seconds", one.median))
        rows.append(Row(where, "spread", one.spread))
        rows.append(Row(where, "over_gradient", one.over(found.times["gradient"])))
        if variant in found.held:
            rows.append(Row(where, "held_mib", found.held[variant] / 2**20))
            rows.append(Row(where, "peak_mib", found.peak[variant] / 2**20))
    for metric, errors in (("error", found.errors), ("best_error", found.best_errors)):
        for (variant, precision), error in errors.items():
            where = {"problem": name, "tasks": count, "variant": variant, "precision": precision}
            rows.append(Row(where, metric, error))
    return rows


def table(found: Found) -> Iterable[str]:
    """Lines to print."""
    head = ("ms", "", "gradients", "held MiB", "peak MiB", "error f64", "f32", "best f64", "f32")
    yield f"  {'':20}{head[0]:>9}{head[1]:10}" + "".join(f"{one:>11}" for one in head[2:])
    for variant in [*found.times, *(one for one in VARIANTS if one not in found.times)]:
        line = f"  {variant:20}"
        if variant in found.times:
            one = found.times[variant]
            line += f"{1e3 * one.median:9.3f} ± {1e3 * one.spread * one.median:<7.3f}"
            line += f"{one.over(found.times['gradient']):11.2f}"
        elif (variant, "float64") not in found.errors:
            continue
        else:
            line += f"{'wrong here':>30}"
        if variant in found.held:
            cells = (found.held[variant], found.peak[variant])
            line += "".join(f"{cell / 2**20:11.2f}" for cell in cells)
        elif variant in VARIANTS:
            line += " " * 22
        for errors in (found.errors, found.best_errors):
            for precision in ("float64", "float32"):
                if (variant, precision) in errors:
                    line += f"{errors[variant, precision]:11.1e}"
        yield line


def draw(everything: Mapping[tuple[str, int], Found], path: Path) -> None:
    """Above: seconds in gradients; below: memory of the largest stack, for each task."""
    names = list(dict.fromkeys(name for name, _ in everything))
    counts = sorted({count for _, count in everything})
    shown = list(variants_of(max(counts)))
    heights = {variant: -place for place, variant in enumerate(shown)}
    figure = new_figure(3.0 + 2.5 * len(names), 6.4)
    panels = figure.subplots(2, len(names), sharey=True, squeeze=False)
    for column, name in enumerate(names):
        above, below = panels[:, column]
        for count, color in zip(counts, COLORS, strict=False):
            found = everything[name, count]
            gradient = found.times["gradient"]
            points = {one: found.times[one].over(gradient) for one in shown if one in found.times}
            above.plot(
                list(points.values()),
                [heights[one] for one in points],
                "o",
                ms=6,
                color=color,
                alpha=0.85,
                label=f"{count} task{'s' * (count > 1)}",
            )
        found = everything[name, max(counts)]
        above.axvline(1.0, color=COLORS[5], lw=1, ls="--")
        above.set_xlim(left=0.0)
        for row, sizes in ((0, found.held), (1, found.peak)):
            below.barh(
                [heights[one] + (0.18 if row == 0 else -0.18) for one in sizes],
                [size / 2**20 / max(counts) for size in sizes.values()],
                height=0.34,
                color=COLORS[0] if row == 0 else COLORS[6],
                label=("held between products", "one product on top")[row],
            )
        for axes in (above, below):
            for variant in shown:
                if variant not in found.times:
                    axes.text(
                        0.03,
                        heights[variant],
                        "wrong, in silence",
                        transform=axes.get_yaxis_transform(),
                        va="center",
                        fontsize=8,
                        color=COLORS[4],
                    )
            labels = [f"≈ {one}" if one in DIFFERENCES else one for one in shown]
            axes.set_yticks(list(heights.values()), labels, fontsize=9)
            tidy(axes)
        above.set_title(name, fontsize=10, color=INK)
        above.set_xlabel("seconds of a product, in gradients", fontsize=9, color=INK)
        below.set_xlabel("MiB a task", fontsize=9, color=INK)
    for row, columns in ((0, len(counts)), (1, 2)):
        handles, labels = panels[row, 0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc=("outside upper center", "outside lower center")[row],
            ncols=columns,
            frameon=False,
            fontsize=9,
        )
    figure.savefig(path)


def main() -> None:
    """Measure, print, write."""
    args = arguments(__doc__, "all problems, and 32 tasks too", rounds=7, device=True)
    device = torch.device(args.device)
    everything, rows = {}, []
    for name in PROBLEMS if args.full else ("strided", "logistic"):
        for count in (1, 8, 32) if args.full else (1, 8):
            found = measure(name, count, args.rounds, device)
            print(f"\n{name}, {count} task{'s' * (count > 1)}")
            for line in table(found):
                print(line)
            everything[name, count] = found
            rows += rows_of(name, count, found)
    path = write_results(args.out, "products", sys.argv, rows, seeds=[0], device=args.device)
    draw(everything, path.with_suffix(".png"))
    print(f"written: {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
