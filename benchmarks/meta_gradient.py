"""Time of one iMAML hypergradient, beside its bare kernels and a loop by hand.

    python benchmarks/meta_gradient.py [--full] [--device cpu] [--threads 1] [--out ...]

5-way 1-shot with 15 query images, 64 channels, 16 steps of gradient descent and 5 of conjugate
gradients, on the strided and the pooling network and for 1, 8 and 32 tasks; without ``--full`` the
strided network and up to 8 tasks. Every variant is checked in float64 for computing the same
hypergradient before it is timed in float32, where ReLU amplifies what rounding differs. *Bare
kernels* are the gradients, the kept graph, the products with the Hessian and the outer gradient,
each timed alone in the same run and added up: no way to run these kernels can be faster. TorchOpt
runs beside them where it is installed. Writes a table and JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from arguments import arguments
from by_hand import conjugate_gradients
from peers import installed, torchopt_implicit
from timing import Times, alternate
from torch import Tensor

from bilevel import hypergradient, stateless
from bilevel.engine import Engine
from bilevel.experiments.results import Row, write_results
from bilevel.problems import EpisodeSampler, FewShot, conv_pool, conv_strided, glyphs
from bilevel.solvers import GradientDescent, ImplicitCG
from bilevel.task import TaskBatch

NETWORKS = {"strided": conv_strided, "pool": conv_pool}
# At the published initial values and λ every H + λI is definite along these steps.
INIT, STRENGTH, RATE, STEPS, PRODUCTS = "imaml", 2.0, 0.02, 16, 5
WAYS, QUERIES, CHANNELS = 5, 15, 64
SAME = 1e-8
Params = dict[str, Tensor]


class Setting:
    """A network and a stack of tasks, with every way to the hypergradient of their mean loss."""

    def __init__(
        self, network: str, tasks: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        module = NETWORKS[network](WAYS, CHANNELS, init=INIT, seed=0).to(device, dtype)
        self.params, self.net = stateless(module)
        self.params = {name: p.detach() for name, p in self.params.items()}
        self.problem = FewShot(self.net, STRENGTH)
        pool = glyphs(classes=40, seed=0).to(device)
        sampler = EpisodeSampler(pool, WAYS, 1, QUERIES, tasks=tasks, rotations=True)
        self.batch: TaskBatch = sampler(0).to(device, dtype)
        self.tasks = self.batch.unstack()

    def variants(self) -> dict[str, Callable[[], Params]]:
        """All that compute the hypergradient."""
        ours = {f"bilevel-{one}": self.ours(one) for one in get_args(Engine)}
        peers = {"torchopt": self.by_torchopt()} if installed("torchopt") else {}
        return {"hand": self.by_hand, **ours, **peers}

    def ours(self, engine: Engine) -> Callable[[], Params]:
        """The library, by one of its engines."""
        solver = GradientDescent(lr=RATE, max_steps=STEPS)
        method = ImplicitCG(max_steps=PRODUCTS, rtol=0.0)

        def run() -> Params:
            found = hypergradient(
                self.problem,
                self.params,
                self.batch,
                inner_solver=solver,
                method=method,
                engine=engine,
            )
            gradient: Params = found.gradient
            return gradient

        return run

    def loss(self, params: Params, batch: tuple[Tensor, ...]) -> Tensor:
        """Of one task."""
        return F.cross_entropy(self.net(params, batch[0]), batch[1])

    def adapted(self, theta: Sequence[Tensor], support: tuple[Tensor, ...]) -> list[Tensor]:
        """The steps of gradient descent, as one would write them without a library."""
        names, phi = list(self.params), list(theta)
        for _ in range(STEPS):
            phi = [p.detach().requires_grad_() for p in phi]
            with torch.enable_grad():
                value = self.loss(dict(zip(names, phi, strict=True)), support)
                slope = torch.autograd.grad(value, phi)
            with torch.no_grad():
                phi = [
                    p - RATE * (g + STRENGTH * (p - t))
                    for p, g, t in zip(phi, slope, theta, strict=True)
                ]
        return [p.detach().requires_grad_() for p in phi]

    def by_hand(self) -> Params:
        """What one would write without a library: a loop over tasks, nothing checked."""
        names, theta = list(self.params), list(self.params.values())
        total = [torch.zeros_like(t) for t in theta]
        for task in self.tasks:
            phi = self.adapted(theta, task.inner_batch)
            tree = dict(zip(names, phi, strict=True))
            rhs = torch.autograd.grad(self.loss(tree, task.outer_batch), phi)
            slope = torch.autograd.grad(self.loss(tree, task.inner_batch), phi, create_graph=True)
            adjoint = next(conjugate_gradients(slope, phi, rhs, STRENGTH, (PRODUCTS,)))
            total = [a + STRENGTH * v for a, v in zip(total, adjoint, strict=True)]
        return {name: t / len(self.tasks) for name, t in zip(names, total, strict=True)}

    def by_torchopt(self) -> Callable[[], Params]:
        """TorchOpt's implicit gradient, around the same steps."""
        names, tasks = list(self.params), [(t.inner_batch, t.outer_batch) for t in self.tasks]

        def outer(z: tuple[Tensor, ...], x: tuple[Tensor, ...], *data: Tensor) -> Tensor:
            return self.loss(dict(zip(names, z, strict=True)), data)

        def inner(z: tuple[Tensor, ...], x: tuple[Tensor, ...], *data: Tensor) -> Tensor:
            pull = sum(((a - b) ** 2).sum() for a, b in zip(z, x, strict=True))
            return outer(z, x, *data) + 0.5 * STRENGTH * pull

        def solve(x: tuple[Tensor, ...], *data: Tensor) -> tuple[Tensor, ...]:
            return tuple(one.detach() for one in self.adapted([t.detach() for t in x], data))

        gradient = torchopt_implicit(inner, outer, solve, PRODUCTS)

        def run() -> Params:
            found = gradient(list(self.params.values()), tasks)
            return dict(zip(names, found, strict=True))

        return run

    # Bare kernels: nothing but what PyTorch must be asked for

    def bare(self, stacked: bool) -> dict[str, Callable[[], object]]:
        """The four kernels, on one task or on all of them stacked."""
        names = list(self.params)
        if stacked:
            count = len(self.tasks)
            point = [
                p.expand(count, *p.shape).clone().requires_grad_() for p in self.params.values()
            ]
            inner, outer = self.batch.inner_batch, self.batch.outer_batch

            def value(data: tuple[Tensor, ...]) -> Tensor:
                def one(*leaves: Tensor) -> Tensor:
                    params = dict(zip(names, leaves[:-2], strict=True))
                    return self.loss(params, leaves[-2:])

                return torch.vmap(one)(*point, *data[:2]).sum()
        else:
            point = [p.clone().requires_grad_() for p in self.params.values()]
            inner, outer = self.tasks[0].inner_batch, self.tasks[0].outer_batch

            def value(data: tuple[Tensor, ...]) -> Tensor:
                return self.loss(dict(zip(names, point, strict=True)), data)

        graph = torch.autograd.grad(value(inner), point, create_graph=True)
        ones = [torch.ones_like(p) for p in point]
        return {
            "gradient": lambda: torch.autograd.grad(value(inner), point),
            "graph": lambda: torch.autograd.grad(value(inner), point, create_graph=True),
            "product": lambda: torch.autograd.grad(graph, point, ones, retain_graph=True),
            "outer": lambda: torch.autograd.grad(value(outer), point),
        }


KERNELS = {"gradient": STEPS, "graph": 1, "product": PRODUCTS, "outer": 1}


def bare_seconds(times: dict[str, Times], prefix: str, tasks: int) -> list[float]:
    """The sum of the kernels, round by round."""
    rounds = zip(*(times[f"{prefix} {name}"].seconds for name in KERNELS), strict=True)
    counts = list(KERNELS.values())
    return [tasks * sum(c * s for c, s in zip(counts, seconds, strict=True)) for seconds in rounds]


def measure(network: str, tasks: int, rounds: int, device: torch.device) -> dict[str, Times]:
    """All variants of one setting, with the bare kernels' sums as two of them."""
    _check(Setting(network, min(tasks, 4), device, torch.float64))
    setting = Setting(network, tasks, device)
    variants = setting.variants()
    kernels = {f"loop {name}": run for name, run in setting.bare(stacked=False).items()}
    kernels |= {f"batched {name}": run for name, run in setting.bare(stacked=True).items()}
    times = alternate({**variants, **kernels}, rounds, device)
    for prefix, repeat in (("loop", tasks), ("batched", 1)):
        times[f"kernels-{prefix}"] = Times(tuple(bare_seconds(times, prefix, repeat)))
    return {name: one for name, one in times.items() if name not in kernels}


def _check(setting: Setting) -> None:
    """Stop unless all variants compute the same."""
    variants = setting.variants()
    wanted = variants["hand"]()
    for name, run in variants.items():
        gap = _distance(run(), wanted)
        if not gap <= SAME:
            raise SystemExit(f"{name} is {gap:.1e} away from the loop by hand, in float64")


def _distance(found: Params, wanted: Params) -> float:
    gap = sum((found[name] - wanted[name]).double().square().sum() for name in wanted)
    size = sum(one.double().square().sum() for one in wanted.values())
    return float((gap / size) ** 0.5)


def main() -> None:
    """Measure, print, write."""
    args = arguments(__doc__, "both networks, and 32 tasks too", rounds=9, device=True)
    device = torch.device(args.device)
    rows = []
    for network in NETWORKS if args.full else ("strided",):
        for tasks in (1, 8, 32) if args.full else (1, 8):
            times = measure(network, tasks, args.rounds, device)
            bare = min(
                (one for name, one in times.items() if name.startswith("kernels")),
                key=lambda one: one.median,
            )
            print(f"\n{network}, {tasks} tasks: ms, over the bare kernels, over the loop by hand")
            for name, one in times.items():
                over_bare, over_hand = one.over(bare), one.over(times["hand"])
                print(
                    f"  {name:24}{1e3 * one.median:9.1f} ± {1e3 * one.spread * one.median:<7.1f}"
                    f"{over_bare:6.2f}{over_hand:6.2f}"
                )
                where = {"network": network, "tasks": tasks, "variant": name}
                rows.append(Row(where, "seconds", one.median))
                rows.append(Row(where, "spread", one.spread))
                rows.append(Row(where, "over_bare_kernels", over_bare))
                rows.append(Row(where, "over_loop_by_hand", over_hand))
    path = write_results(args.out, "meta-gradient", sys.argv, rows, seeds=[0], device=args.device)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
