"""The host is not asked per inner or CG step: read-backs of a whole meta-step, counted.

On a CPU asking is free, so that the library asks at every CG step there; told that asking is dear,
it runs the code that an accelerator runs. `HessianFree`, `LBFGS`, `TorchOptimizer` and the policy
"damp" look at numbers at every step, and are not held to this.
"""

import importlib
from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel import Record, hypergradient, stateless
from bilevel.problems import EpisodeSampler, FewShot, ImageClasses, conv_strided
from bilevel.solvers import (
    BacktrackingDescent,
    FirstOrder,
    GradientDescent,
    ImplicitCG,
    NeumannSeries,
    ProximalGradient,
    Unrolled,
)

SCALARS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique"}
WHOLE = {"tolist", "cpu", "numpy"}


class Scalars(TorchDispatchMode):
    """Counts operations whose result, or its shape, the host waits for."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool
            for one in torch.utils._pytree.tree_leaves(args[1:2])
        )
        if name in SCALARS or masks:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


class Tensors(TorchFunctionMode):
    """Counts copies of whole tensors to the host, which the dispatcher does not see on a CPU."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in WHOLE:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def dear(monkeypatch):
    """Asking is dear, as on an accelerator."""
    for name in ("bilevel.rows", "bilevel.status", "bilevel.solvers.linear.cycles"):
        monkeypatch.setattr(importlib.import_module(name), "check_interval", lambda device: 8)


@pytest.fixture(scope="module")
def world():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 6, 1, 28, 28, generator=generator)
    pool = ImageClasses(images, tuple(map(str, range(12))))
    params, net = stateless(conv_strided(3, channels=4))
    return FewShot(net, 0.5), params, EpisodeSampler(pool, 3, 1, 2, tasks=3)


def read_backs(world, inner_steps, method, step=1, solver=GradientDescent):
    problem, params, sampler = world
    solver = solver(0.05, inner_steps)
    settings = {"inner_solver": solver, "method": method}
    hypergradient(problem, params, sampler(0), **settings)  # the first call looks it over
    found = Counter()
    with Tensors(found), Scalars(found):
        result = hypergradient(problem, params, sampler(step), **settings)
        Record.of(step, result, 0.0)
    return found


@pytest.mark.usefixtures("dear")
@pytest.mark.parametrize("solver", [GradientDescent, BacktrackingDescent, ProximalGradient])
def test_a_meta_step_asks_a_few_times_however_many_steps_it_takes(world, solver):
    few = read_backs(world, 2, ImplicitCG(max_steps=1, rtol=0.0), solver=solver)
    many = read_backs(world, 40, ImplicitCG(max_steps=7, rtol=0.0), solver=solver)
    assert few == many
    assert few.total() <= 7


@pytest.mark.usefixtures("dear")
@pytest.mark.parametrize(
    "method", [FirstOrder(), Unrolled(), NeumannSeries(terms=5)], ids=lambda m: type(m).__name__
)
def test_other_methods_ask_no_oftener(world, method):
    assert read_backs(world, 3, method) == read_backs(world, 12, method)
    assert read_backs(world, 3, method).total() <= 7


@pytest.mark.usefixtures("dear")
def test_drawing_tasks_asks_nothing(world):
    sampler, found = world[2], Counter()
    with Tensors(found), Scalars(found):
        sampler(5)
    assert not found


def test_the_counters_count(world):
    found = Counter()
    with Tensors(found), Scalars(found):
        x = torch.ones(3)
        assert bool((x > 0).all())
        x.tolist()
        x[x > 0.5]
        x.sum().item()
    assert found == {"tolist": 1, "_local_scalar_dense": 2, "index": 1}
    # Where asking is free, negative curvature and convergence are noticed at once.
    on_cpu = read_backs(world, 2, ImplicitCG(max_steps=7, rtol=0.0))
    assert on_cpu.total() > read_backs(world, 2, ImplicitCG(max_steps=1, rtol=0.0)).total()
