import pytest
import torch
from torch import nn

from bilevel import ObjectiveError, stateless
from tests.helpers import randn


def net_with_everything():
    return nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2)
    ).double()


def test_the_function_is_the_module():
    module = net_with_everything().eval()
    module[1].running_mean += 1.0
    params, net = stateless(module)
    x = randn(4, 2, 3)
    assert torch.equal(net(params, x), module(x))
    assert set(params) == {name for name, _ in module.named_parameters()}


def test_parameters_are_detached_copies():
    module = nn.Linear(2, 1)
    params, _ = stateless(module)
    assert not any(p.requires_grad for p in params.values())
    params["weight"].add_(1.0)
    assert not torch.equal(params["weight"], module.weight)


def test_buffers_follow_the_parameters_in_dtype():
    params, net = stateless(net_with_everything().float().eval())
    double = {name: p.double() for name, p in params.items()}
    assert net(double, randn(4, 2, 3)).dtype == torch.float64


def test_the_function_is_differentiable_in_its_parameters():
    params, net = stateless(nn.Linear(2, 1).double())
    w = {name: p.requires_grad_() for name, p in params.items()}
    x = randn(3, 2)
    gradient = torch.autograd.grad(net(w, x).sum(), list(w.values()))
    torch.testing.assert_close(gradient[0], x.sum(0, keepdim=True))


def test_tied_parameters_stay_tied():
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    module[1].weight = module[0].weight
    params, net = stateless(module)
    assert list(params) == ["0.weight"]
    other = {"0.weight": randn(2, 2)}
    x = randn(3, 2)
    torch.testing.assert_close(net(other, x), x @ other["0.weight"].mT @ other["0.weight"].mT)


def test_keyword_arguments_reach_the_module():
    params, net = stateless(nn.MultiheadAttention(2, 1, batch_first=True))
    x = torch.ones(1, 3, 2)
    out, weights = net(params, x, x, x, need_weights=False)
    assert out.shape == (1, 3, 2)
    assert weights is None


def test_a_module_without_parameters_is_refused():
    with pytest.raises(ObjectiveError, match="no parameter"):
        stateless(nn.Tanh())


def test_a_function_of_parameters_does_not_depend_on_the_module_any_more():
    module = net_with_everything().eval()
    params, net = stateless(module)
    x = randn(4, 2, 3)
    want = net(params, x)
    module.train()
    module[1].running_mean += 5.0
    module(x)
    assert torch.equal(net(params, x), want)
