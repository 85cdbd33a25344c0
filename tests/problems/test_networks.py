import pytest
import torch
from torch import nn

from bilevel import stateless
from bilevel.problems import conv_pool, conv_strided, mlp

FACTORIES = {
    "conv_strided": lambda **kw: conv_strided(5, channels=8, **kw),
    "conv_pool": lambda **kw: conv_pool(5, channels=8, **kw),
}
every_network = pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_are_the_published_ones():
    assert count(conv_strided(5)) == 113_221
    assert count(conv_strided(20)) == 117_076
    assert count(conv_pool(5)) == 112_261
    assert count(mlp((1, 40, 40, 1))) == 1_761


def test_sizes_along_the_strided_network():
    module, sizes, x = conv_strided(5), [], torch.rand(2, 1, 28, 28)
    for layer in module:
        x = layer(x)
        if isinstance(layer, nn.Conv2d | nn.ZeroPad2d):
            sizes.append(x.shape[-1])
    assert sizes == [14, 7, 8, 4, 2]
    assert module[-1].in_features == 256
    assert x.shape == (2, 5)


def test_padding_is_below_and_to_the_right():
    pad = next(layer for layer in conv_strided(5) if isinstance(layer, nn.ZeroPad2d))
    x = pad(torch.ones(1, 1, 2, 2))[0, 0]
    assert x.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]


@every_network
def test_seed_decides_the_initial_values(make):
    state = torch.get_rng_state()
    first, again, other = make(), make(), make(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0].weight, other[0].weight)


@every_network
def test_initial_values_follow_pytorch(make):
    for layer in make():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = layer.weight[0].numel() ** -0.5
            assert 0.7 * bound < layer.weight.detach().abs().max() <= bound
            assert -bound <= layer.bias.detach().min() < 0 < layer.bias.detach().max() <= bound


@every_network
def test_unknown_initial_values_are_refused(make):
    with pytest.raises(ValueError, match="`init` is 'zeros'"):
        make(init="zeros")


@every_network
def test_initial_values_of_imaml_have_their_ranges(make):
    for layer in make(init="imaml"):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight = layer.weight.detach()
            receptive = weight[0, 0].numel()
            fans = (weight.shape[0] + weight.shape[1]) * receptive
            bound = 1.73 * (6 / fans) ** 0.5
            assert 0.7 * bound < weight.abs().max() <= bound
            assert layer.bias.min() >= 0.0
            assert layer.bias.max() <= 0.05
        elif isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "instance", "none"])
@every_network
def test_every_norm_is_stateless_and_finite(make, norm):
    module = make(norm=norm, activation=nn.Softplus, blocks=3).double()
    params, net = stateless(module)
    images = torch.rand(4, 1, 28, 28, dtype=torch.float64)
    assert torch.equal(net(params, images), module(images))
    stacked = torch.vmap(lambda x: net(params, x))(torch.stack([images, images.flip(0)]))
    torch.testing.assert_close(stacked[1], net(params, images.flip(0)))


def test_mean_of_activations_is_centred_by_batch_norm():
    module = conv_strided(5, channels=4, blocks=1)
    x = module[1](module[0](torch.rand(16, 1, 28, 28)))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0.0)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="norm"):
        conv_strided(5, norm="weight")
    with pytest.raises(ValueError, match="size"):
        conv_pool(5, size=8)
    with pytest.raises(ValueError, match="sizes"):
        mlp((1,))


# Batch norm with the statistics of a reference


@every_network
def test_a_reference_makes_predictions_independent_of_each_other(make):
    module = make().double()
    params, net = stateless(module)
    images = torch.rand(6, 1, 28, 28, dtype=torch.float64)
    support = torch.rand(5, 1, 28, 28, dtype=torch.float64)
    together = net(params, images, support)
    alone = torch.cat([net(params, image[None], support) for image in images])
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(net(params, images), torch.cat([net(params, images[:3])] * 2))


@every_network
def test_images_that_are_their_own_reference_are_normalised_as_usual(make):
    module = make().double()
    for layer in module:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight)
            nn.init.uniform_(layer.bias)
    params, net = stateless(module)
    images = torch.rand(5, 1, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(net(params, images, images), net(params, images))


def test_no_norm_leaves_out_its_layers():
    module = conv_strided(5, channels=4, norm="none")
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in module)
    assert count(module) == count(conv_strided(5, channels=4)) - 4 * 2 * 4
