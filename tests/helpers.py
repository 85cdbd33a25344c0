"""Small problems with known answers, and derivatives found without the library.

The references share no code with what they judge: the inner problem is solved again by a dense
Newton method, and derivatives are central differences of the solved problem, of fourth order.
"""

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from bilevel import Proximal, Task, problem_from


def spd(n, condition=10.0, seed=0, largest=None):
    """A random symmetric positive definite matrix of that condition number, float64."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    top = condition**0.5 if largest is None else largest
    values = torch.logspace(0, -1, n, base=condition, dtype=torch.float64) * top
    return basis @ torch.diag(values) @ basis.mT


def randn(*shape, seed=0, dtype=torch.float64):
    """Normal numbers from their own generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def product(A):
    """``v -> A v`` for one matrix per task, ``[tasks, n, n]``."""
    return lambda v: (A @ v.unsqueeze(-1)).squeeze(-1)


def quadratic(strength=0.0):
    """g = ½ zᵀAz − zᵀBx, f = ½ ‖z − target‖² + ½ ‖x‖²/7, data in the batches."""

    def inner(z, x, batch):
        return 0.5 * z @ batch["A"] @ z - z @ batch["B"] @ x

    def outer(z, x, batch):
        return 0.5 * ((z - batch["target"]) ** 2).sum() + (x**2).sum() / 14

    return problem_from(
        inner,
        outer,
        Proximal(strength) if strength else None,
        initial_inner=lambda x, batch: torch.zeros_like(batch["b"]),
    )


def quadratic_task(n, m=None, condition=10.0, seed=0, largest=1.0, **kwargs):
    """Data for `quadratic`: Hessian of that condition number and largest eigenvalue."""
    m = n if m is None else m
    A = spd(n, condition, seed, largest)
    inner = {"A": A, "B": randn(n, m, seed=seed + 100), "b": torch.zeros(n, dtype=torch.float64)}
    return Task(inner, {"target": randn(n, seed=seed + 200)}, **kwargs)


def quadratic_answer(task, x):
    """The exact hypergradient of `quadratic` (no regularizer), by dense algebra."""
    A, B = task.inner_batch["A"], task.inner_batch["B"]
    z = torch.linalg.solve(A, B @ x)
    return x / 7 + B.mT @ torch.linalg.solve(A, z - task.outer_batch["target"])


# Finite differences


def along(tree, direction, t):
    """``tree + t · direction``."""
    return tree_map(lambda a, d: a.detach() + t * d, tree, direction)


def direction_like(tree, seed):
    """A random unit direction, a pytree like ``tree``."""
    leaves, spec = tree_flatten(tree)
    out = [randn(*leaf.shape, seed=seed + 31 * i) for i, leaf in enumerate(leaves)]
    size = sum((d**2).sum() for d in out).sqrt()
    return tree_unflatten([(d / size).to(x.dtype) for d, x in zip(out, leaves, strict=True)], spec)


def inner_product(a, b):
    """⟨a, b⟩ of two pytrees."""
    pairs = zip(tree_flatten(a)[0], tree_flatten(b)[0], strict=True)
    return sum((x * y).sum() for x, y in pairs)


def five_point(function, h=1e-3):
    """dφ/dt at 0 of ``function(t)``, error of order h⁴."""
    return (8 * (function(h) - function(-h)) - (function(2 * h) - function(-2 * h))) / (12 * h)


def slopes(value, outer, *, h=1e-3, directions=2):
    """The derivatives of ``value`` at ``outer`` along a few random directions."""
    found = []
    for seed in range(directions):
        d = direction_like(outer, seed)
        found.append((d, five_point(lambda t, d=d: value(along(outer, d, t)), h)))
    return found


def assert_directional(gradient, value, outer, *, rtol=1e-6, h=1e-3, directions=2):
    """``gradient`` is that of ``value(outer)``, along a few random directions."""
    assert_slopes(gradient, slopes(value, outer, h=h, directions=directions), rtol=rtol)


def assert_slopes(gradient, found, *, rtol=1e-6):
    """``gradient`` has these `slopes`."""
    scale = inner_product(gradient, gradient).sqrt().item()
    for d, want in found:
        got = inner_product(gradient, d)
        # A direction may lie almost across the gradient: errors are relative to its length.
        assert abs(got - want) <= rtol * max(scale, 1e-12), (got.item(), want.item(), scale)


# Memory


def peak_saved(function):
    """The most numbers that autograd graphs hold at one time while ``function()`` runs."""
    live = peak = 0

    class Saved:
        def __init__(self, tensor):
            nonlocal live, peak
            self.tensor = tensor
            live += tensor.numel()
            peak = max(peak, live)

        def __del__(self):
            nonlocal live
            live -= self.tensor.numel()

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        function()
    return peak


# The solved problem, without the library


class Solved:
    """F(outer), the weighted mean over tasks, the inner problem solved by Newton's method.

    The first solve factorises the Hessian; nearby ones reuse it (the chord method), down to
    ‖∂_z G‖ ≤ ``tol``.
    """

    def __init__(self, problem, outer, tasks, *, tol=1e-12):
        self.problem, self.tasks, self.tol = problem, tasks, tol
        self.base = [self._newton(outer, task) for task in tasks]

    def __call__(self, outer):
        total = sum(task.weight for task in self.tasks)
        value = 0.0
        for task, (z, factor, spec, shapes) in zip(self.tasks, self.base, strict=True):
            z = self._chord(outer, task, z, factor, spec, shapes)
            inner = _unflatten(z, spec, shapes)
            value += task.weight * self.problem.outer_objective(inner, outer, task.outer_batch)
        return value / total

    def inner(self, outer, which=0):
        """The inner solution of one task."""
        z, factor, spec, shapes = self.base[which]
        z = self._chord(outer, self.tasks[which], z, factor, spec, shapes)
        return _unflatten(z, spec, shapes)

    def _regularised(self, z, outer, task, spec, shapes):
        inner = _unflatten(z, spec, shapes)
        value = self.problem.inner_objective(inner, outer, task.inner_batch)
        regularizer = self.problem.regularizer
        if regularizer is None:
            return value
        strength = regularizer.strength
        strength = strength(outer) if callable(strength) else strength
        center = outer if regularizer.center is None else regularizer.center(outer)
        gap = zip(tree_flatten(inner)[0], tree_flatten(center)[0], strict=True)
        return value + 0.5 * strength * sum(((a - b) ** 2).sum() for a, b in gap)

    def _gradient(self, z, outer, task, spec, shapes):
        z = z.detach().requires_grad_()
        value = self._regularised(z, outer, task, spec, shapes)
        return z, torch.autograd.grad(value, z, create_graph=True)[0]

    def _newton(self, outer, task):
        leaves, spec = tree_flatten(self.problem.initial_inner(outer, task.inner_batch))
        shapes = [leaf.shape for leaf in leaves]
        z = torch.cat([leaf.detach().reshape(-1) for leaf in leaves])
        for _ in range(50):
            point, gradient = self._gradient(z, outer, task, spec, shapes)
            rows = [torch.autograd.grad(entry, point, retain_graph=True)[0] for entry in gradient]
            hessian = torch.stack(rows)
            factor = torch.linalg.cholesky((hessian + hessian.mT) / 2)
            if gradient.norm() <= self.tol:
                return z, factor, spec, shapes
            z = z - torch.cholesky_solve(gradient.detach().unsqueeze(-1), factor).squeeze(-1)
        raise AssertionError("Newton's method did not converge; choose an easier problem")

    def _chord(self, outer, task, z, factor, spec, shapes):
        for _ in range(50):
            _, gradient = self._gradient(z, outer, task, spec, shapes)
            if gradient.norm() <= self.tol:
                return z
            z = z - torch.cholesky_solve(gradient.detach().unsqueeze(-1), factor).squeeze(-1)
        raise AssertionError("the chord method did not converge; take a smaller step h")


def _unflatten(z, spec, shapes):
    parts = torch.split(z, [shape.numel() for shape in shapes])
    return tree_unflatten([p.reshape(s) for p, s in zip(parts, shapes, strict=True)], spec)
