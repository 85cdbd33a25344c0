import pickle

import pytest
import torch
from torch import nn

from bilevel import ObjectiveError, exact_norms, stateless
from tests.helpers import five_point, randn

F64 = torch.float64


def shaken(module, seed=1):
    """The module in float64 with random parameters and running statistics."""
    module = module.double()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p += 0.3 * randn(*p.shape, seed=seed + i)
        for name, b in module.named_buffers():
            if name.endswith("running_mean"):
                b += 0.2
            elif name.endswith("running_var"):
                b *= 1.3
    return module


CASES = {
    "batch1d": (lambda: nn.BatchNorm1d(3), (5, 3)),
    "batch1d sequence": (lambda: nn.BatchNorm1d(3, momentum=None), (4, 3, 2)),
    "batch2d": (lambda: nn.BatchNorm2d(3, eps=1e-3), (4, 3, 2, 2)),
    "batch3d": (lambda: nn.BatchNorm3d(2, affine=False), (3, 2, 2, 2, 2)),
    "batch without statistics": (
        lambda: nn.BatchNorm2d(3, track_running_stats=False),
        (4, 3, 2, 2),
    ),
    "instance1d": (lambda: nn.InstanceNorm1d(3, affine=True), (2, 3, 4)),
    "instance1d unbatched": (lambda: nn.InstanceNorm1d(3), (3, 4)),
    "instance2d": (
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        (2, 3, 2, 3),
    ),
    "instance3d": (lambda: nn.InstanceNorm3d(2), (2, 2, 2, 2, 2)),
    "layer": (lambda: nn.LayerNorm(4), (2, 3, 4)),
    "layer of two dimensions": (lambda: nn.LayerNorm([3, 4], elementwise_affine=False), (2, 3, 4)),
    "layer without bias": (lambda: nn.LayerNorm(4, bias=False), (2, 4)),
}
both = pytest.mark.parametrize("case", CASES)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def pair(case, training=True):
    build, shape = CASES[case]
    native = shaken(build()).train(training)
    return native, exact_norms(native), 1.5 * randn(*shape, seed=7) + 0.4


@both
@modes
def test_values_and_running_statistics_are_those_of_pytorch(case, training):
    native, exact, x = pair(case, training)
    for step in range(3):
        y = x + step
        torch.testing.assert_close(exact(y), native(y), rtol=1e-12, atol=1e-12)
    assert exact.state_dict().keys() == native.state_dict().keys()
    for key, value in native.state_dict().items():
        torch.testing.assert_close(exact.state_dict()[key], value, rtol=1e-12, atol=1e-12)
    if case == "batch2d":
        moved = not torch.equal(exact.running_mean, CASES[case][0]().double().running_mean + 0.2)
        assert moved == training


def test_statistics_switched_off_later_are_left_alone_in_training():
    native = shaken(nn.BatchNorm1d(3))
    native.track_running_stats = False
    exact, x = exact_norms(native), randn(5, 3)
    for training in (True, False):
        native.train(training), exact.train(training)
        torch.testing.assert_close(exact(x), native(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(exact.running_mean, native.running_mean)


@both
@modes
def test_first_derivatives_are_those_of_pytorch(case, training):
    native, exact, x = pair(case, training)
    x.requires_grad_()
    w = randn(*x.shape, seed=3)
    for a, b in zip(
        torch.autograd.grad((native(x) * w).sum(), [x, *native.parameters()]),
        torch.autograd.grad((exact(x) * w).sum(), [x, *exact.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@both
@modes
def test_third_derivatives_match_finite_differences(case, training):
    _, exact, x = pair(case, training)
    if training:
        # Statistics of the batch without a trace, so that evaluations can be repeated.
        exact = exact_norms(shaken(_without_statistics(case)))
    d = randn(*x.shape, seed=5)

    def second(x):
        (g,) = torch.autograd.grad(exact(x).pow(3).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad((g * d).sum(), x, create_graph=True)
        return (h * d).sum()

    (third,) = torch.autograd.grad(second(x.requires_grad_()), x)
    want = five_point(lambda t: second((x + t * d).detach().requires_grad_()).detach())
    torch.testing.assert_close((third * d).sum(), want, rtol=1e-8, atol=1e-8)


def _without_statistics(case):
    module = CASES[case][0]()
    if isinstance(module, nn.LayerNorm):
        return module
    settings = {"eps": module.eps, "affine": module.affine, "track_running_stats": False}
    return type(module)(module.num_features, **settings)


@both
def test_state_dicts_load_either_way(case):
    native, exact, x = pair(case, training=False)
    other = CASES[case][0]().double().eval()
    other.load_state_dict(exact.state_dict())
    torch.testing.assert_close(other(x), native(x))
    fresh = exact_norms(CASES[case][0]().double().eval())
    fresh.load_state_dict(native.state_dict())
    torch.testing.assert_close(fresh(x), native(x))


def test_nested_and_shared_layers_are_replaced_in_a_copy_only():
    norm = nn.LayerNorm(4)
    net = nn.Sequential(nn.Linear(3, 4), norm, nn.ModuleDict({"a": nn.Sequential(norm)})["a"])
    exact = exact_norms(net)
    assert type(net[1]) is nn.LayerNorm
    assert type(exact[1]) is not nn.LayerNorm
    assert exact[1] is exact[2][0]
    with torch.no_grad():
        exact[1].weight.zero_()
    assert net[1].weight.sum() == 4


def test_exact_layers_stay_what_they_were():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.LayerNorm(4), nn.GroupNorm(1, 2))
    exact = exact_norms(net)
    assert all(isinstance(new, type(old)) for new, old in zip(exact, net, strict=True))
    assert type(exact[2]) is nn.GroupNorm
    copy = pickle.loads(pickle.dumps(exact))
    assert type(copy[0]) is type(exact[0])
    with pytest.raises(ObjectiveError, match="running statistics"):
        stateless(exact)


def test_a_layer_of_the_users_own_is_left_alone():
    class Mine(nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    assert type(exact_norms(nn.Sequential(Mine(3)))[0]) is Mine


def test_wrong_inputs_are_refused_like_pytorchs():
    with pytest.raises(ValueError, match="one value to a channel"):
        exact_norms(nn.BatchNorm1d(3))(torch.ones(1, 3))
    with pytest.raises(ValueError, match="expected 4D input"):
        exact_norms(nn.BatchNorm2d(3))(torch.ones(2, 3))
    with pytest.raises(ValueError, match="last dimensions"):
        exact_norms(nn.LayerNorm(3))(torch.ones(2, 4))
