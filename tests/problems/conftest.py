"""References that share nothing with the library's own differentiation."""

import pytest
import torch

from bilevel import Task
from bilevel.pytree import VectorSpec, tree_flatten, tree_leaves, tree_unflatten


def _flat(tree):
    return torch.cat([leaf.detach().double().flatten() for leaf in tree_leaves(tree)])


def _objective(problem, task, vector):
    """G, the regularised inner objective, as a function of a flat inner point and outer."""

    def value(z, outer):
        inner = problem.inner_objective(vector.unflatten(z), outer, task.inner_batch)
        proximal = problem.regularizer
        if proximal is None:
            return inner
        strength = proximal.strength_vector(outer, vector)
        return inner + 0.5 * (strength * (z - proximal.center_vector(outer, vector)) ** 2).sum()

    return value


def _hessian(problem, outer, task, inner):
    vector = VectorSpec.of(inner)
    value = _objective(problem, task, vector)
    z = vector.flatten(inner)
    return torch.autograd.functional.hessian(lambda z: value(z, outer), z, vectorize=True)


def _one_hypergradient(problem, outer, task, inner):
    vector = VectorSpec.of(inner)
    value = _objective(problem, task, vector)
    leaves, spec = tree_flatten(outer)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    x = tree_unflatten(leaves, spec)
    z = vector.flatten(inner).detach().requires_grad_()
    f = problem.outer_objective(vector.unflatten(z), x, task.outer_batch)
    rhs, *direct = torch.autograd.grad(f, [z, *leaves], allow_unused=True)
    v = torch.linalg.solve(_hessian(problem, outer, task, inner), rhs)
    (stationarity,) = torch.autograd.grad(value(z, x), z, create_graph=True)
    cross = torch.autograd.grad(stationarity @ v, leaves)
    return [-c if d is None else d - c for c, d in zip(cross, direct, strict=True)]


@pytest.fixture
def relative_error():
    """‖a − b‖ / ‖b‖ over all leaves."""

    def error(a, b):
        return ((_flat(a) - _flat(b)).norm() / _flat(b).norm()).item()

    return error


@pytest.fixture
def inner_hessian():
    """The dense regularised inner Hessian of one task, by double reverse differentiation."""
    return _hessian


@pytest.fixture
def dense_hypergradient():
    """The hypergradient at given inner solutions by dense algebra, the mean over tasks."""

    def compute(problem, outer, task, inner):
        if isinstance(task, Task):
            found = [_one_hypergradient(problem, outer, task, inner)]
        else:
            leaves, spec = tree_flatten(inner)
            found = [
                _one_hypergradient(
                    problem, outer, one, tree_unflatten([leaf[i] for leaf in leaves], spec)
                )
                for i, one in enumerate(task.unstack())
            ]
        means = [torch.stack(column).mean(0) for column in zip(*found, strict=True)]
        return tree_unflatten(means, tree_flatten(outer)[1])

    return compute
