"""Networks, and losses of their samples, whose gradients are taken at once and one by one."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from nsgd import sample_losses
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


NORMALISED = {
    "group_norm": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3)),
        images,
    ),
    "instance_norm": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.InstanceNorm2d(3, affine=True), nn.Flatten(), nn.ReLU(), nn.Linear(48, 3)
        ),
        images,
    ),
}
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
    **NORMALISED,
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
