"""Gradients of groups of samples all at once, against a backward pass for each; nothing is left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from traces import assert_untouched, random_states, same_random_states, snapshot

from nsgd import NSGD, sample_losses
from nsgd.directions.samples import gradient_moment

SAMPLES = 10
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}  # of the largest entry: the order of summation differs


class Tied(nn.Module):
    """One matrix reads tokens and scores them."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.embedding(x).sum(1)))


class Frozen(nn.Sequential):
    """Its first bias and last weight do not train."""

    def __init__(self):
        super().__init__(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        self[0].bias.requires_grad_(False)
        self[2].weight.requires_grad_(False)


class Weighted(nn.Module):
    """A criterion with a parameter and a buffer of its own, and a count of calls."""

    def __init__(self):
        super().__init__()
        self.net, self.sharpness = nn.Linear(6, 3), nn.Parameter(torch.tensor(1.5))
        self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.2, 3.0]))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls += 1
        return self.net(x) * self.sharpness


class LastToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(self.embedding(x))[:, -1])


class Unused(nn.Sequential):
    """Has a parameter that the loss does not reach."""

    def __init__(self):
        super().__init__(nn.Linear(6, 3))
        self.spare = nn.Parameter(torch.ones(2, 2))


def images():
    return torch.randn(SAMPLES, 1, 6, 6)


def rows():
    return torch.randn(SAMPLES, 6)


def tokens():
    return torch.randint(5, (SAMPLES, 7))


NETS = {  # a network, and what it is given
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), rows),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)),
        images,
    ),
    "layer_norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3)), rows),
    "transformer": (LastToken, tokens),
    "tied": (Tied, tokens),
    "frozen": (Frozen, rows),
    "weighted": (Weighted, rows),
    "unused": (Unused, rows),
    "batch_norm_eval": (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval(), rows),
}
WITH_STATISTICS = {
    "batch_norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)), rows),
    "batch_norm_2d": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 3)),
        images,
    ),
}


class Case:
    """A network, its loss of some samples, and the losses of groups, to be computed at once or one by one."""

    def __init__(self, name="mlp", dtype=torch.float64, factor=1.0):
        make, draw = {**NETS, **WITH_STATISTICS}[name]
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.model, self.x, self.y = make().to(dtype), draw(), torch.randint(3, (SAMPLES,))
        if self.x.is_floating_point():
            self.x = self.x.to(dtype)
        self.factor, self.params = factor, list(self.model.parameters())

    def loss(self, x, y):
        criterion = getattr(self.model, "criterion", F.cross_entropy)
        return self.factor * criterion(self.model(x), y)

    def losses(self, at_once=True, group_size=1):
        module = self.model if at_once else None
        return sample_losses(self.loss, self.x, self.y, group_size=group_size, module=module)

    def both(self, group_size=1, **options):
        """Weights and gradients at once, and one by one."""
        return (gradient_moment(self.losses(way, group_size), self.params, **options) for way in (True, False))


def assert_equal(found, expected, tolerance):
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    assert found[1].dtype == expected[1].dtype
    scale = float(expected[1].abs().max())
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=tolerance * scale)


# -- the same gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("net", "group_size"),
    [
        *((name, size) for name in NETS for size in (1, 4, 5)),
        *((name, size) for name in WITH_STATISTICS for size in (4, 5)),
    ],
)  # 10 samples in groups of 4: a last one of 2
def test_gradients_at_once_are_those_one_by_one(net, group_size, dtype):
    found, expected = Case(net, dtype).both(group_size)
    assert found[1].shape == (-(-SAMPLES // group_size), sum(p.numel() for p in Case(net).params))
    assert_equal(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("net", ["mlp", "conv", "transformer", "weighted"])  # vmap has no LayerNorm of mixed dtypes
def test_gradients_under_autocast_are_those_one_by_one_to_half_precision(net):
    case = Case(net, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = case.both(4)
    full, _ = case.both(4)
    assert found[1].dtype == torch.float32
    assert not torch.equal(found[1], full[1])  # autocast did reach the forward pass
    assert_equal(found, expected, 0.05)  # eps 2^-8, a few times over


def test_half_precision_parameters_give_float32_gradients():
    found, expected = Case("mlp", torch.bfloat16).both(2)
    assert found[1].dtype == torch.float32
    assert_equal(found, expected, 0.05)


@pytest.mark.parametrize("group_size", [1, 4])
def test_the_scale_is_taken_out(group_size):
    (found, _), (expected, _) = (
        Case(factor=256.0).both(group_size, scale=256.0),
        Case().both(group_size),
    )
    assert_equal(found, expected, 1e-12)


def test_parameters_may_be_some_of_the_module_s_in_any_order():
    case = Case()
    case.params = [case.params[i] for i in (3, 0)]
    found, expected = case.both()
    assert found[1].shape == (SAMPLES, 3 + 30)
    assert_equal(found, expected, 1e-12)


def test_gradients_of_some_parameters_carry_no_graph(basis_of):
    case = Case()
    case.params = case.params[:2]
    optimizer = NSGD(case.params, lr=0.1, k=2)
    for _ in range(2):
        optimizer.refresh(case.losses())
    assert not gradient_moment(case.losses(), case.params)[1].requires_grad
    assert not basis_of(optimizer).requires_grad


@pytest.mark.parametrize("which", [slice(None), slice(2)], ids=["all", "some"])
def test_parameters_that_the_loss_reaches_past_the_module_are_not_lost(which):
    """As in a penalty on a list of parameters that was made once."""
    case = Case()
    of_labels, kept = case.loss, case.params[which]
    case.loss = lambda x, y: of_labels(x, y) + 0.5 * sum(p.square().sum() for p in kept)
    expected = gradient_moment(case.losses(False), case.params)
    try:
        found = gradient_moment(case.losses(), case.params)
    except ValueError:  # to say so is as good
        return
    assert_equal(found, expected, 1e-12)


def test_a_module_inside_another_need_only_hold_the_parameters():
    case = Case()
    outer = nn.ModuleDict({"net": case.model, "other": nn.Linear(2, 2)})
    found = gradient_moment(sample_losses(case.loss, case.x, case.y, module=outer), case.params)
    assert_equal(found, gradient_moment(case.losses(False), case.params), 1e-12)


def test_the_pairs_are_those_of_the_one_by_one_way():
    """For products, which take the same list."""
    case = Case()
    pairs, expected = case.losses(True, 4), case.losses(False, 4)
    assert [n for _, n in pairs] == [4, 4, 2]
    assert [closure().item() for closure, _ in pairs] == [closure().item() for closure, _ in expected]


def test_a_slice_of_the_losses_has_so_many_groups():
    case = Case()
    found, expected = (gradient_moment(case.losses(way)[2:6], case.params) for way in (True, False))
    assert found[1].shape[0] == 4
    assert_equal(found, expected, 0.0)


# -- nothing left behind --------------------------------------------------------------------------------------


class Dropped(nn.Module):
    """Dropout and BatchNorm, in a mixture of modes, with a gradient from before, in float64."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
        self.double()
        self.net[3].eval()
        self.net[0].weight.grad = torch.ones_like(self.net[0].weight)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("fails", [None, "in a group", "in the last group"])
def test_buffers_modes_grad_and_random_state_stay_as_found(fails):
    model, calls = Dropped(), []
    before, states = snapshot(model), random_states()

    def loss(x):
        calls.append(1)
        value = model(x).square().mean()
        model.eval()
        model.register_buffer("surprise", torch.ones(2))
        if fails == ("in a group" if len(calls) == 1 else "in the last group"):
            raise KeyError("inside")
        return value

    x = torch.ones(SAMPLES, 6, dtype=torch.float64)
    losses = sample_losses(loss, x, group_size=4, module=model)
    with pytest.raises(KeyError, match="inside") if fails else torch.no_grad():
        gradient_moment(losses, list(model.parameters()))
    assert len(calls) == (1 if fails == "in a group" else 2)  # all whole groups at once, then the last
    assert_untouched(model, before)
    same_random_states(states)
    assert not hasattr(model, "surprise")
    assert torch.is_grad_enabled()


def test_a_backward_pass_from_before_still_works():
    case = Case("batch_norm")
    loss = case.loss(case.x, case.y)
    expected = torch.autograd.grad(loss, case.params, retain_graph=True)
    gradient_moment(case.losses(group_size=5), case.params)
    loss.backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(case.params, expected, strict=True))


@pytest.mark.parametrize("group_size", [1, 2])
def test_every_group_draws_a_dropout_mask_of_its_own(group_size):
    """As the samples of a batch do: gradients of equal samples differ, and are what some mask gives."""
    torch.manual_seed(0)
    weight = nn.Linear(12, 1, bias=False)
    x = torch.ones(16, 12)
    states = random_states()
    losses = sample_losses(lambda x: weight(F.dropout(x, 0.5)).mean(), x, group_size=group_size, module=weight)
    _, gradients = gradient_moment(losses, [weight.weight])
    same_random_states(states)
    assert len({tuple(row) for row in gradients.tolist()}) == len(gradients)
    assert set(gradients.unique().tolist()) == {2.0 * i / group_size for i in range(group_size + 1)}
    again = gradient_moment(losses, [weight.weight])[1]
    assert torch.equal(again, gradients)  # the random state was as found
    torch.manual_seed(1)
    assert not torch.equal(gradient_moment(losses, [weight.weight])[1], gradients)


def test_inference_mode_and_no_grad_around_make_no_difference():
    case = Case()
    expected = gradient_moment(case.losses(), case.params)[1]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = gradient_moment(case.losses(), case.params)[1]
        assert torch.equal(found, expected)
        assert not found.requires_grad


# -- refused, or left out -------------------------------------------------------------------------------------


def with_labels(case, *unknown):
    case.y[list(unknown)] = -100  # which cross_entropy ignores: the mean over none is NaN
    return case


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("group_size", "unknown", "left_out"),
    [(1, [0, 4], [0, 4]), (4, [4, 5, 6, 7], [1]), (4, [8, 9], [2]), (4, [3, 8], []), (1, range(2, 10), range(2, 10))],
)
def test_groups_of_unknown_loss_are_left_out(at_once, group_size, unknown, left_out):
    case = with_labels(Case(), *unknown)
    counts = torch.tensor([len(part) for part in case.x.split(group_size)], dtype=torch.float64)
    kept = [i for i in range(len(counts)) if i not in left_out]
    pairs = case.losses(False, group_size)
    expected = torch.stack(
        [torch.cat([g.reshape(-1) for g in torch.autograd.grad(pairs[i][0](), case.params)]) for i in kept]
    )
    weights, gradients = gradient_moment(case.losses(at_once, group_size), case.params)
    torch.testing.assert_close(weights, counts[kept] / counts[kept].sum())
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)


def infinite(value):
    return lambda case, x: torch.where((x == case.x[3]).all(), value, 0.0)


def steep(case, x):
    """Zero, with a gradient that is infinite."""
    w = next(case.model.parameters()).sum()
    return (w - w.detach()).sqrt()


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("unknown", "added", "message"),
    [
        (range(10), None, "the loss is NaN"),
        (range(1, 10), None, "the loss is NaN"),  # a single group is left
        ([], infinite(torch.inf), "the loss is NaN or infinite"),
        ([0], infinite(-torch.inf), "the loss is NaN or infinite"),
        ([], steep, "the gradient of the loss is NaN or infinite"),
        ([0], steep, "the gradient of the loss is NaN or infinite"),
    ],
    ids=["all", "all but one", "infinite", "infinite and unknown", "gradient", "gradient and unknown"],
)
def test_all_unknown_or_any_infinite_is_a_floating_point_error(at_once, unknown, added, message):
    case = with_labels(Case(), *unknown)
    of_labels = case.loss
    case.loss = lambda x, y: of_labels(x, y) + (added(case, x) if added else 0.0)
    with pytest.raises(FloatingPointError, match=message):
        gradient_moment(case.losses(at_once), case.params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: case.params.append(nn.Parameter(torch.ones(2))), "1 of 5 are not its own; .*leave module out"),
        (lambda case: setattr(case, "model", copy.deepcopy(case.model)), "4 of 4 are not its own"),
        (lambda case: setattr(case, "loss", lambda x, y: case.model(x)), r"scalar loss, got shape \(1, 3\)"),
    ],
    ids=["a parameter of none", "another module's", "no scalar"],
)
def test_what_does_not_fit_the_module_is_a_value_error(change, message):
    case = Case()
    change(case)
    with pytest.raises(ValueError, match=message):
        gradient_moment(case.losses(), case.params)


@pytest.mark.parametrize(
    "module", [lambda x: x, nn.Linear, "net", torch.ones(2)], ids=["function", "class", "str", "tensor"]
)
def test_a_module_is_an_nn_module(module):
    with pytest.raises(ValueError, match=r"expected module to be the network, an nn\.Module, got a "):
        sample_losses(lambda x: x.sum(), torch.ones(3), module=module)


def test_what_vmap_cannot_run_is_an_error_and_leaves_everything_as_found():
    case = Case("batch_norm")
    before, states = snapshot(case.model), random_states()
    losses = sample_losses(
        lambda x, y: case.loss(x, y) * x.sum().item(), case.x, case.y, group_size=5, module=case.model
    )
    with pytest.raises(RuntimeError, match="vmap"):
        gradient_moment(losses, case.params)
    assert_untouched(case.model, before)
    same_random_states(states)


# -- through the optimizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["mlp", "conv", "transformer", "tied", "frozen"])
def test_an_optimizer_takes_the_same_directions_either_way(net, basis_of):
    bases, weights = [], []
    for at_once in (True, False):
        case = Case(net)
        optimizer = NSGD(case.params, lr=0.05, momentum=0.9, k=2, refresh_every=2)
        for _ in range(6):
            optimizer.zero_grad()
            optimizer.backward(case.loss(case.x, case.y), curvature=case.losses(at_once))
            optimizer.step()
        assert (optimizer.refreshes, optimizer.hvps, optimizer.cost_gradients) == (3, 0, 3.0)
        rows = basis_of(optimizer)
        bases.append(rows.T @ rows)
        weights.append(optimizer.weights)
    assert weights[0] == pytest.approx(weights[1], rel=1e-8)
    torch.testing.assert_close(*bases, rtol=0, atol=1e-8)
