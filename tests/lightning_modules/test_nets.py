"""Networks: sizes as in the papers, by hand, and the initialisation that they name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_modules.nets import make_net, mlp, resnet, simple_cnn, vision_transformer


def conv(inputs: int, outputs: int, size: int) -> int:
    return outputs * (inputs * size * size + 1)


def dense(inputs: int, outputs: int) -> int:
    return outputs * (inputs + 1)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "expected"),
    [
        ("mlp", (1, 8, 8), 10, dense(64, 64) + dense(64, 64) + dense(64, 10)),
        ("mlp", (3, 5, 7), 4, dense(105, 64) + dense(64, 64) + dense(64, 4)),
        (  # 3,397,918: the paper's "medium" SimpleCNN
            "simple-cnn",
            (3, 32, 32),
            10,
            conv(3, 100, 5) + conv(100, 100, 5) + conv(100, 200, 5) + conv(200, 200, 5)
            + dense(200 * 8 * 8, 128) + dense(128, 10),
        ),
        (
            "simple-cnn-root",
            (3, 32, 32),
            10,
            conv(3, 32, 3) + conv(32, 32, 3) + conv(32, 64, 3) + conv(64, 64, 3)
            + dense(64 * 8 * 8, 128) + dense(128, 10),
        ),
        (  # 269,722: 19 convolutions without bias, as many BatchNorm layers, one dense layer
            "resnet-20",
            (3, 32, 32),
            10,
            9 * (3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64)
            + 2 * (7 * 16 + 6 * 32 + 6 * 64) + dense(64, 10),
        ),
        (  # odd sides are rounded down
            "simple-cnn-root",
            (1, 9, 7),
            2,
            conv(1, 32, 3) + conv(32, 32, 3) + conv(32, 64, 3) + conv(64, 64, 3) + dense(64 * 2 * 1, 128)
            + dense(128, 2),
        ),
    ],
)  # fmt: skip
def test_parameter_counts_are_those_computed_by_hand(name, shape, classes, expected):
    net = make_net(name, shape, classes)
    assert sum(p.numel() for p in net.parameters()) == expected
    assert net(torch.zeros(2, *shape)).shape == (2, classes)


def test_the_medium_network_has_3_397_918_parameters():
    assert sum(p.numel() for p in simple_cnn((3, 32, 32), 10).parameters()) == 3_397_918


def test_weights_are_glorot_uniform_and_biases_zero():
    torch.manual_seed(0)
    for module in mlp((1, 8, 8), 10, hidden=(128,)).modules():
        if isinstance(module, nn.Linear):
            bound = math.sqrt(6 / (module.in_features + module.out_features))
            assert module.weight.abs().max() <= bound
            # 640 draws or more: the standard error of the deviation is below 2 %
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.08)
            assert not module.bias.any()


def test_initialisation_follows_the_global_seed():
    nets = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        nets.append(torch.cat([p.flatten() for p in make_net("mlp", (1, 8, 8), 10).parameters()]))
    assert torch.equal(nets[0], nets[1])
    assert not torch.equal(nets[0], nets[2])


@pytest.mark.parametrize("shape", [(1, 3, 8), (1, 8, 3), (3, 1, 1)])
def test_images_too_small_for_the_poolings_are_refused(shape):
    with pytest.raises(ValueError, match=rf"at least 4 pixels, got {shape[1]} x {shape[2]}; use --net mlp"):
        make_net("simple-cnn", shape, 10)
    assert make_net("simple-cnn-root", (1, 4, 4), 10)(torch.zeros(1, 1, 4, 4)).shape == (1, 10)


def test_an_unknown_name_is_refused():
    with pytest.raises(
        ValueError, match="expected net to be one of mlp, simple-cnn, simple-cnn-root, resnet-20, got 'resnet'"
    ):
        make_net("resnet", (3, 32, 32), 10)


@pytest.mark.parametrize(
    ("depth", "batch_norm", "expected"),
    [
        (20, True, 269_722),  # He et al. (2016), table 6: 0.27 M, 0.46 M, 0.85 M
        (32, True, 464_154),
        (56, True, 853_018),
        # Convolutions with a bias each in place of BatchNorm's two vectors.
        (32, False, 464_154 - 11 * 16 - 10 * 32 - 10 * 64),
    ],
)
def test_resnets_have_the_published_sizes(depth, batch_norm, expected):
    net = resnet((3, 32, 32), 10, depth=depth, batch_norm=batch_norm)
    assert sum(p.numel() for p in net.parameters()) == expected
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_a_resnet_without_batch_norm_starts_at_a_fifteenth_of_he_s_variance():
    torch.manual_seed(0)
    net = resnet((3, 32, 32), 10, depth=32, batch_norm=False)
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_in = module.weight[0].numel()
            # The standard error of a variance of n normal entries is sqrt(2 / n); five of them.
            spread = 5 * math.sqrt(2 / module.weight.numel())
            assert module.weight.var().item() == pytest.approx(2 / fan_in / 15, rel=spread)


def test_a_resnet_of_another_depth_is_refused():
    with pytest.raises(ValueError, match="2 more than a multiple of 6, got 21; take 20 or 32"):
        resnet((3, 32, 32), 10, depth=21)


def test_a_vision_transformer_by_hand():
    net = vision_transformer((3, 32, 32), 10, patch=4, dim=64, depth=4)
    block = 4 * (64 * 64 + 64) + (64 * 256 + 256) + (256 * 64 + 64) + 2 * 2 * 64  # attention, feed-forward, two norms
    expected = (3 * 16 * 64 + 64) + 64 * 64 + 4 * block + 2 * 64 + dense(64, 10)
    assert sum(p.numel() for p in net.parameters()) == expected
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_a_vision_transformer_wants_whole_patches():
    with pytest.raises(ValueError, match="multiples of patch = 4, got 30 x 32"):
        vision_transformer((3, 30, 32), 10)
