"""Conjugate gradients of other libraries: the error of one hypergradient, step by step.

    python benchmarks/peer_cg.py [--peer NAME[=FOLDER] ...] [--out benchmarks/results]

A quadratic inner problem of 20 unknowns and condition number 50 in float64, its solution given
exactly, so that the error is that of conjugate gradients alone; and one whose eigenvalues are all
equal, on which one step is exact. Each peer runs in a process of its own, as its documentation
does it, with FOLDER first on its path: two of them share an import name, and hypertorch is no
package. Without ``--peer``, all that are installed. Writes a table and JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel import hypergradient, problem_from
from bilevel.experiments.results import Row, write_results
from bilevel.solvers import ImplicitCG

N, CONDITION, STEPS = 20, 50.0, (5, 20, 40)
FLOOR = 1e-12
"""What is smaller is rounding."""

Objective = Callable[[Tensor, Tensor], Tensor]
generator = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    """Normal numbers; the same in every process."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


basis, _ = torch.linalg.qr(drawn(N, N))
eigenvalues = torch.linspace(0.0, math.log(CONDITION), N, dtype=torch.float64).exp()
x, target = drawn(N), drawn(N)
HESSIANS = {
    "spread": (basis * eigenvalues) @ basis.T,
    "equal": 2.0 * torch.eye(N, dtype=torch.float64),
}


def outer(w: Tensor, x: Tensor) -> Tensor:
    """The outer objective, which ignores x."""
    return 0.5 * (w - target).square().sum()


def bilevel(inner: Objective, w: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """This library."""
    problem = problem_from(
        lambda w, x, batch: inner(w, x),
        lambda w, x, batch: outer(w, x),
        initial_inner=lambda x, batch: torch.zeros_like(x),
    )
    method = ImplicitCG(max_steps=steps, rtol=0.0)
    return hypergradient(problem, x, inner_solver=None, inner=w, method=method).gradient


def torchopt(
    inner: Objective, w: Tensor, hessian: Tensor, steps: int, solver: str = "solve_cg"
) -> Tensor:
    """TorchOpt's `custom_root`."""
    import torchopt

    solve = getattr(torchopt.linear_solve, solver)(maxiter=steps, rtol=0.0)

    @torchopt.diff.implicit.custom_root(torch.func.grad(inner), argnums=1, solve=solve)
    def solution(start: Tensor, x: Tensor) -> Tensor:
        return w.clone()

    leaf = x.clone().requires_grad_()
    outer(solution(w, leaf), leaf).backward()
    return leaf.grad


def torchopt_normal(inner: Objective, w: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """TorchOpt's default, on the normal equations."""
    return torchopt(inner, w, hessian, steps, "solve_normal_cg")


def jaxopt(inner: Objective, w: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """Jaxopt's `root_vjp`."""
    import jax
    from jaxopt import implicit_diff, linear_solve

    jax.config.update("jax_enable_x64", True)
    matrix, point, at, right = (
        jax.numpy.asarray(t.numpy()) for t in (hessian, w, x, outer_slope(w))
    )
    stationarity = jax.grad(lambda w, x: 0.5 * (w @ matrix @ w) - w @ x)

    def solve(matvec: Any, b: Any) -> Any:
        return linear_solve.solve_cg(matvec, b, maxiter=steps, tol=0.0)

    found = implicit_diff.root_vjp(stationarity, point, (at,), right, solve=solve)[0]
    return torch.from_numpy(found.__array__().copy())


def hypertorch(inner: Objective, w: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """Hypertorch's `CG`, with one step of gradient descent as the fixed-point map."""
    from hypergrad import hypergradients

    rate = 1.0 / torch.linalg.eigvalsh(hessian)[-1]

    def step(params: list[Tensor], hparams: list[Tensor]) -> list[Tensor]:
        (slope,) = torch.autograd.grad(inner(params[0], hparams[0]), params, create_graph=True)
        return [params[0] - rate * slope]

    leaf = x.clone().requires_grad_()
    return hypergradients.CG(
        [w], [leaf], steps, step, lambda p, h: outer(p[0], h[0]), set_grad=False
    )[0]


def boat(inner: Objective, w: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """BOAT's `conjugate_gradient`, with one step of gradient descent as the fixed-point map."""
    from boat_torch.utils.op_utils import conjugate_gradient

    rate = 1.0 / torch.linalg.eigvalsh(hessian)[-1]

    def step(params: list[Tensor], value: Tensor) -> list[Tensor]:
        (slope,) = torch.autograd.grad(value, params[0], create_graph=True)
        return [params[0] - rate * slope]

    point, leaf = w.clone().requires_grad_(), x.clone().requires_grad_()
    value = inner(point, leaf)
    return conjugate_gradient([point], [leaf], outer(point, leaf), value, steps, step)[0]


def hypergrad(inner: Objective, w: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """Hypergrad's `conjugate_gradient`."""
    from hypergrad.approx_hypergrad import conjugate_gradient

    def of_first(objective: Objective) -> Callable[[Any, Any], Tensor]:
        return lambda i, o: objective(i[0], o[0])

    return conjugate_gradient(of_first(inner), of_first(outer), (w,), (x,), steps, 1.0)[0]


def betty(inner: Objective, w: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """Betty's ``Config(type="cg")``, in one step of its engine."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    class Value(torch.nn.Module):
        def __init__(self, value: Tensor) -> None:
            super().__init__()
            self.value = torch.nn.Parameter(value.clone())

        def forward(self) -> Tensor:
            return self.value

    found = []

    class Outer(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return outer(self.inner(), self())

        def grad_callback(self) -> None:
            found.append(self.module.value.grad.clone())

    class Inner(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return inner(self(), self.outer())

    modules = Value(x), Value(w)
    optimizers = [
        torch.optim.SGD(module.parameters(), lr=rate)
        for module, rate in zip(modules, (0.1, 1e-12), strict=True)
    ]
    above = Outer("outer", Config(), modules[0], optimizers[0], train_data_loader=[(x,)])
    config = Config(type="cg", cg_iterations=steps, unroll_steps=1)
    below = Inner("inner", config, modules[1], optimizers[1], train_data_loader=[(x,)])
    edges = {"u2l": {above: [below]}, "l2u": {below: [above]}}
    Engine([above, below], EngineConfig(train_iters=1), edges).run()
    return found[0]


# Which package has it, where it is one.
PEERS: dict[str, tuple[Callable[..., Tensor], str | None]] = {
    "bilevel": (bilevel, "bilevel"),
    "torchopt": (torchopt, "torchopt"),
    "torchopt-normal": (torchopt_normal, "torchopt"),
    "jaxopt": (jaxopt, "jaxopt"),
    "hypertorch": (hypertorch, None),
    "boat": (boat, "boat-torch"),
    "hypergrad": (hypergrad, "hypergrad"),
    "betty": (betty, "betty-ml"),
    "betty-fixed": (betty, None),
}


def outer_slope(w: Tensor) -> Tensor:
    """The derivative of the outer objective in w."""
    return w - target


def errors(peer: str) -> dict[str, float]:
    """The relative error of a peer for each problem and number of steps; NaN is one, too."""
    warnings.simplefilter("ignore")
    out = {}
    for name, hessian in HESSIANS.items():
        w = torch.linalg.solve(hessian, x)
        exact = torch.linalg.solve(hessian, outer_slope(w))

        def inner(w: Tensor, x: Tensor, hessian: Tensor = hessian) -> Tensor:
            return 0.5 * (w @ hessian @ w) - w @ x

        for steps in STEPS:
            found = PEERS[peer][0](inner, w, hessian, steps)
            error = ((found - exact).norm() / exact.norm()).item()
            out[f"{name} {steps}"] = error if math.isnan(error) else max(error, FLOOR)
    return out


def installed(peer: str) -> bool:
    """Whether its package is here."""
    package = PEERS[peer][1]
    return package is not None and any(importlib.metadata.distributions(name=package))


def main() -> None:
    """Run each peer, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", action="append", metavar="NAME[=FOLDER]")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--one", choices=PEERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(errors(args.one)))
        return
    rows = []
    for given in args.peer or filter(installed, PEERS):
        peer, _, folder = given.partition("=")
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, __file__, "--one", peer],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"{peer:<18}" + "".join(f"{error:>10.1e}" for error in found.values()))
        package = PEERS[peer][1]
        version = importlib.metadata.version(package) if package else "from a folder"
        for key, error in found.items():
            problem, steps = key.split()
            setting = {"peer": peer, "version": version, "eigenvalues": problem, "steps": steps}
            nan = math.isnan(error)
            row = Row(setting, "not_a_number", 1) if nan else Row(setting, "error", error)
            rows.append(row)
    # Where a folder lies is nobody else's concern.
    words = [f"--peer {given.partition('=')[0]}" for given in args.peer or ()]
    command = " ".join(["python benchmarks/peer_cg.py", *words])
    path = write_results(args.out, "peer-cg", sys.argv, rows, seeds=[0], command=command)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
