"""Networks: sizes as in the papers, by hand, and the initialisation that they name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector

from lightning_modules.models.nets.mlp import mlp
from lightning_modules.models.nets.named import NETS, make_net
from lightning_modules.models.nets.resnet import resnet
from lightning_modules.models.nets.transformers import causal_transformer, vision_transformer
from nsgd import sample_losses, top_eigenpairs
from nsgd.directions.samples import gradient_moment


def conv(inputs: int, outputs: int, size: int) -> int:
    return outputs * (inputs * size * size + 1)


def dense(inputs: int, outputs: int) -> int:
    return outputs * (inputs + 1)


def transformer_block(dim: int) -> int:
    """Queries, keys, values and the way out; two feed-forward layers; two norms."""
    return 4 * dense(dim, dim) + dense(dim, 4 * dim) + dense(4 * dim, dim) + 2 * 2 * dim


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


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
        (
            "resnet-32",
            (3, 32, 32),
            10,
            9 * (3 * 16 + 10 * 16 * 16 + 16 * 32 + 9 * 32 * 32 + 32 * 64 + 9 * 64 * 64)
            + 2 * (11 * 16 + 10 * 32 + 10 * 64) + dense(64, 10),
        ),
        (
            "resnet-56",
            (3, 32, 32),
            10,
            9 * (3 * 16 + 18 * 16 * 16 + 16 * 32 + 17 * 32 * 32 + 32 * 64 + 17 * 64 * 64)
            + 2 * (19 * 16 + 18 * 32 + 18 * 64) + dense(64, 10),
        ),
        (
            "vgg-11",
            (3, 32, 32),
            10,
            conv(3, 64, 3) + conv(64, 128, 3) + conv(128, 256, 3) + conv(256, 256, 3) + conv(256, 512, 3)
            + 3 * conv(512, 512, 3) + 2 * (64 + 128 + 2 * 256 + 4 * 512) + dense(512, 10),
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
    assert count(net) == expected
    assert net(torch.zeros(2, *shape)).shape == (2, classes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("simple-cnn", 3_397_918),  # the "medium" network of Jastrzębski et al. (2019)
        ("resnet-20", 269_722),  # He et al. (2016), table 6: 0.27 M, 0.46 M, 0.85 M
        ("resnet-32", 464_154),
        ("resnet-56", 853_018),
        # Convolutions with a bias each in place of BatchNorm's two vectors.
        ("resnet-32-plain", 464_154 - 11 * 16 - 10 * 32 - 10 * 64),
        ("vgg-11", 9_231_114),  # 9.2 M
    ],
)
def test_parameter_counts_are_those_published(name, expected):
    assert count(make_net(name, (3, 32, 32), 10)) == expected


@pytest.mark.parametrize("name", NETS)
def test_every_name_builds_a_network_that_learns(name):
    torch.manual_seed(0)
    net = make_net(name, (3, 32, 32), 4, {"hidden": [8]} if name == "mlp" else {})
    logits = net(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 4)
    F.cross_entropy(logits, torch.tensor([0, 3])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


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
    names = ", ".join(NETS)
    with pytest.raises(
        ValueError, match=rf"expected net to be one of {names}, or module:name of your own, got 'resnet'"
    ):
        make_net("resnet", (3, 32, 32), 10)


def test_a_network_of_ones_own_goes_by_its_import_path(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\n"
        "def wide(shape, classes, width=3):\n"
        "    first = nn.Linear(shape[0] * shape[1] * shape[2], width)\n"
        "    return nn.Sequential(nn.Flatten(), first, nn.Linear(width, classes))\n"
        "def wrong(shape, classes):\n"
        "    return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    net = make_net("own_nets:wide", (1, 4, 4), 2, {"width": 5})
    assert [tuple(p.shape) for p in net.parameters()] == [(5, 16), (5,), (2, 5), (2,)]
    for name, sizes, said in (
        ("own_nets:wide", {"depth": 1}, "expected sizes of own_nets:wide among width, got 'depth'"),
        ("own_nets:wrong", {}, "expected own_nets:wrong to return a torch.nn.Module, got a int"),
        ("own_nets:none", {}, "expected net to name a function of own_nets, got 'own_nets:none', which is none"),
        ("no_nets:wide", {}, "expected net to name a module that can be imported, got 'no_nets:wide'"),
    ):
        with pytest.raises(ValueError, match=said):
            make_net(name, (1, 4, 4), 2, sizes)


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("mlp", {"hidden": [5]}, dense(3 * 8 * 8, 5) + dense(5, 10)),
        ("mlp", {"hidden": []}, dense(3 * 8 * 8, 10)),
        (
            "simple-cnn",
            {"widths": [16, 32], "kernel_size": 3},
            conv(3, 16, 3) + conv(16, 16, 3) + conv(16, 32, 3) + conv(32, 32, 3) + dense(32 * 4, 128) + dense(128, 10),
        ),
        (  # what the name stands for and is not overridden stays
            "simple-cnn-root",
            {"dense": 7},
            conv(3, 32, 3) + conv(32, 32, 3) + conv(32, 64, 3) + conv(64, 64, 3) + dense(64 * 4, 7) + dense(7, 10),
        ),
        (
            "resnet-32-plain",
            {"depth": 8, "widths": (2, 3, 4)},
            conv(3, 2, 3) + 2 * conv(2, 2, 3) + conv(2, 3, 3) + conv(3, 3, 3) + conv(3, 4, 3) + conv(4, 4, 3)
            + dense(4, 10),
        ),
        ("vgg-11", {"stages": [[2], [3, 3]]}, conv(3, 2, 3) + conv(2, 3, 3) + conv(3, 3, 3) + 16 + dense(3 * 4, 10)),
        (
            "vit",
            {"patch": 2, "dim": 6, "depth": 1, "heads": 3},
            conv(3, 6, 2) + 16 * 6 + transformer_block(6) + 2 * 6 + dense(6, 10),
        ),
    ],
)  # fmt: skip
def test_sizes_override_those_of_the_name(name, sizes, expected):
    net = make_net(name, (3, 8, 8), 10, sizes)
    assert count(net) == expected
    assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("simple-cnn-root", {"width": [3]}, "sizes of simple-cnn-root among widths, kernel_size, dense, got 'width'"),
        ("vit", {"input_shape": 3}, "sizes of vit among patch, dim, depth, heads, got 'input_shape'"),
        ("mlp", {"hidden": 64}, r"hidden of mlp to be a list like \[64, 64\], got 64"),
        ("mlp", {"hidden": [64, 0]}, r"hidden of mlp to be a list like \[64, 64\], got \[64, 0\]"),
        ("vgg-11", {"stages": [64, 128]}, r"stages of vgg-11 to be a list like \[\[64\], .*, got \[64, 128\]"),
        ("vit", {"depth": True}, "depth of vit to be a whole number of at least 1, got True"),
        ("resnet-20", {"batch_norm": 1}, "batch_norm of resnet-20 to be true or false, got 1"),
        ("resnet-20", {"widths": []}, "widths of at least one stage, got none"),
        ("simple-cnn", {"kernel_size": 4}, "kernel_size to be odd, so that a convolution keeps the sides, got 4"),
        ("vit", {"heads": 3}, "dim to be a multiple of heads, got dim = 64 and heads = 3"),
    ],
)
def test_sizes_that_cannot_be_are_refused(name, sizes, message):
    with pytest.raises(ValueError, match=f"^expected {message}"):
        make_net(name, (3, 8, 8), 10, sizes)


# -- residual and convolutional networks -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 28, 28), (3, 32, 31)])
def test_vgg_wants_images_of_32_pixels(shape):
    with pytest.raises(ValueError, match=rf"at least 32 pixels, got {shape[1]} x {shape[2]}; use --net mlp"):
        make_net("vgg-11", shape, 10)


def test_vgg_takes_larger_images():
    assert make_net("vgg-11", (1, 64, 33), 3)(torch.zeros(2, 1, 64, 33)).shape == (2, 3)


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


# -- transformers ------------------------------------------------------------------------------------------------------


def test_a_vision_transformer_by_hand():
    net = vision_transformer((3, 32, 32), 10, patch=4, dim=64, depth=4)
    assert count(net) == conv(3, 64, 4) + 64 * 64 + 4 * transformer_block(64) + 2 * 64 + dense(64, 10)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_a_vision_transformer_wants_whole_patches():
    with pytest.raises(ValueError, match="multiples of patch = 4, got 30 x 32"):
        vision_transformer((3, 30, 32), 10)


def deviation(tensor: torch.Tensor) -> float:
    return float(tensor.detach().std(correction=0))


def test_a_vision_transformer_starts_as_in_the_code_of_its_paper():
    torch.manual_seed(0)
    patches, encoder, _, _, head = vision_transformer((3, 32, 32), 10, patch=4, dim=64, depth=2)
    found: list[tuple[float, float]] = [
        (deviation(patches.positions), 0.02),
        (deviation(patches.embed.weight), (3 * 4 * 4) ** -0.5),
    ]
    for block in encoder.layers:
        queries, keys, values = block.self_attn.in_proj_weight.chunk(3)
        found += [(deviation(m), (2 / 128) ** 0.5) for m in (queries, keys, values, block.self_attn.out_proj.weight)]
        found += [(deviation(m.weight), (2 / 320) ** 0.5) for m in (block.linear1, block.linear2)]
        assert queries.abs().max() <= (6 / 128) ** 0.5  # uniform
    for value, expected in found:  # 3,072 draws or more: the standard error is below 1.3 %
        assert value == pytest.approx(expected, rel=0.06)
    zeros = [p for name, p in encoder.named_parameters() if name.endswith("bias")]
    assert not any(p.any() for p in (*zeros, patches.embed.bias, head.weight, head.bias))
    first, second = (block.linear1.weight for block in encoder.layers)
    assert not torch.equal(first, second)


def test_a_causal_transformer_starts_as_gpt_2():
    torch.manual_seed(0)
    tokens, causal, _, head = causal_transformer(100, context=64, dim=64, depth=3, heads=4)
    blocks = causal.encoder.layers
    found = [
        (deviation(tokens.positions), 0.01),
        (deviation(tokens.embed.weight), 0.02),
        (deviation(head.weight), 0.02),
    ]
    for block in blocks:
        found += [(deviation(m), 0.02) for m in (block.self_attn.in_proj_weight, block.linear1.weight)]
        found += [(deviation(m.weight), 0.02 / 6**0.5) for m in (block.self_attn.out_proj, block.linear2)]
        biases = (block.self_attn.in_proj_bias, block.self_attn.out_proj.bias, block.linear1.bias, block.linear2.bias)
        assert not any(bias.any() for bias in biases)
        assert (block.norm1.weight == 1).all()
    for value, expected in found:  # 4,096 draws or more: the standard error is below 1.2 %
        assert value == pytest.approx(expected, rel=0.06)
    assert not torch.equal(blocks[0].linear1.weight, blocks[1].linear1.weight)


def test_a_causal_transformer_by_hand():
    net = causal_transformer(11, context=9, dim=6, depth=2, heads=3)
    assert count(net) == 11 * 6 + 9 * 6 + 2 * transformer_block(6) + 2 * 6 + 6 * 11
    assert net(torch.zeros(2, 9, dtype=torch.int64)).shape == (2, 9, 11)
    assert net(torch.zeros(2, 4, dtype=torch.int64)).shape == (2, 4, 11)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])  # torch takes a path of its own in evaluation without gradients
def test_a_causal_transformer_does_not_look_ahead(training, grad):
    torch.manual_seed(0)
    net = causal_transformer(11, context=8, dim=8, depth=2, heads=2).train(training)
    x = torch.randint(11, (3, 8))
    changed = x.clone()
    changed[:, 5:] = (x[:, 5:] + 1) % 11
    with torch.set_grad_enabled(grad):
        before, after = net(x), net(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().amax((0, 2)).min() > 1e-3
    last = net(x[:, :6])[:, -1]
    assert torch.allclose(last, before[:, 5], atol=1e-6)  # rounding: other shapes sum in another order
    swapped = x[:, [1, 0, *range(2, 8)]]
    assert not torch.allclose(net(swapped)[:, -1], before[:, -1], atol=1e-5)  # it does see what came before, in order


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dim": 10, "heads": 4}, "multiple of heads, got dim = 10 and heads = 4"), ({"depth": 0}, "depth of at least 1")],
)
def test_a_causal_transformer_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        causal_transformer(11, **options)


def test_more_tokens_than_the_context_are_refused():
    net = causal_transformer(11, context=4, dim=8)
    with pytest.raises(ValueError, match="expected at most context = 4 tokens in a row, got 5; raise context"):
        net(torch.zeros(1, 5, dtype=torch.int64))


def problem(kind: str):
    """A tiny transformer in double precision, samples, and their loss by network."""
    torch.manual_seed(0)
    if kind == "vit":
        net = vision_transformer((1, 4, 4), 3, patch=2, dim=4, depth=1, heads=2).double()
        nn.init.normal_(net[-1].weight)  # it starts at zero, where nothing else has a gradient
        x, y = torch.randn(6, 1, 4, 4, dtype=torch.float64), torch.randint(3, (6,))
    else:
        net = causal_transformer(5, context=3, dim=4, depth=1, heads=2).double()
        for p in net.parameters():
            nn.init.normal_(p, std=0.5)  # at GPT-2's start it is close to linear in the last layer
        x, y = torch.randint(5, (6, 3)), torch.randint(5, (6, 3))

    def loss(network, x, y):
        logits = network(x)
        return F.cross_entropy(logits.flatten(0, -2), y.flatten())

    return net, x, y, loss


@pytest.mark.parametrize("kind", ["vit", "causal"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_single_samples_are_taken_at_once(kind, training):
    net, x, y, loss = problem(kind)
    net.train(training)
    params = list(net.parameters())

    def of_samples(x, y):
        return loss(net, x, y)

    weights, found = gradient_moment(sample_losses(of_samples, x, y, module=net), params)
    for gradient, i in zip(found, range(6), strict=True):
        expected = torch.autograd.grad(loss(net, x[i : i + 1], y[i : i + 1]), params)
        assert torch.allclose(gradient, torch.cat([g.flatten() for g in expected]), rtol=0, atol=1e-12)
    assert torch.allclose(weights, torch.full((6,), 1 / 6, dtype=weights.dtype))
    assert found.abs().amax(0).gt(0).float().mean() > 0.8  # attention keys' biases alone have none


@pytest.mark.parametrize("kind", ["vit", "causal"])
def test_eigenvalues_under_plain_attention_are_those_of_the_whole_hessian(kind):
    net, x, y, loss = problem(kind)
    names = [name for name, _ in net.named_parameters()]
    params = list(net.parameters())

    def of_vector(vector):
        blocks = vector.split([p.numel() for p in params])
        values = {name: b.view_as(p) for name, b, p in zip(names, blocks, params, strict=True)}
        return loss(lambda x: functional_call(net, values, (x,)), x, y)

    with sdpa_kernel(SDPBackend.MATH):
        pairs = top_eigenpairs(loss(net, x, y), params, k=3, tol=1e-6)
        hessian = torch.autograd.functional.hessian(of_vector, parameters_to_vector(params).detach())
    assert pairs.converged
    expected = torch.linalg.eigvalsh(hessian).flip(0)[:3]
    # An eigenvalue errs by less than its residual, of at most 1e-6 of the largest.
    assert torch.allclose(pairs.eigenvalues.double(), expected, rtol=0, atol=2e-6 * float(expected[0]))
