"""References that share nothing with the library's own differentiation."""

import pytest
import torch

from bilevel import Task
from bilevel.pytree import VectorSpec, tree_flatten, tree_leaves, tree_unflatten


def _flat(tree):
    return torch.cat([leaf.detach().double().flatten() for leaf in tree_leaves(tree)])


def _stationarity(problem, task, vector):
    """∂_z G with the regularizer, as a function of a flat inner point and outer."""

    def objective(z, outer):
        return problem.inner_objective(vector.unflatten(z), outer, task.inner_batch)

    def stationarity(z, outer):
        if problem.is_equilibrium:
            total = _graph(problem.stationarity(vector.unflatten(z), outer, task.inner_batch))
        else:
            z = z if z.requires_grad else z.detach().requires_grad_()
            (total,) = torch.autograd.grad(objective(z, outer), z, create_graph=True)
        proximal = problem.regularizer
        if proximal is None:
            return total
        strength = proximal.strength_vector(outer, vector)
        return total + strength * (z - proximal.center_vector(outer, vector))

    return stationarity


def _graph(tree):
    return torch.cat([leaf.flatten() for leaf in tree_leaves(tree)])


def _jacobian(problem, outer, task, inner):
    vector = VectorSpec.of(inner)
    function = _stationarity(problem, task, vector)
    z = vector.flatten(inner)
    return torch.autograd.functional.jacobian(lambda z: function(z, outer), z, vectorize=True)


def _one_hypergradient(problem, outer, task, inner):
    vector = VectorSpec.of(inner)
    function = _stationarity(problem, task, vector)
    leaves, spec = tree_flatten(outer)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    x = tree_unflatten(leaves, spec)
    z = vector.flatten(inner).detach().requires_grad_()
    f = problem.outer_objective(vector.unflatten(z), x, task.outer_batch)
    rhs, *direct = torch.autograd.grad(f, [z, *leaves], allow_unused=True)
    v = torch.linalg.solve(_jacobian(problem, outer, task, inner).mT, rhs)
    cross = torch.autograd.grad(function(z, x) @ v, leaves, allow_unused=True)
    cross = [torch.zeros_like(x) if c is None else c for c, x in zip(cross, leaves, strict=True)]
    return [-c if d is None else d - c for c, d in zip(cross, direct, strict=True)]


@pytest.fixture
def relative_error():
    """‖a − b‖ / ‖b‖ over all leaves."""

    def error(a, b):
        return ((_flat(a) - _flat(b)).norm() / _flat(b).norm()).item()

    return error


@pytest.fixture
def inner_hessian():
    """The dense Jacobian of one task's regularised stationarity: the Hessian of an objective."""
    return _jacobian


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
