"""The test problems, as data: small losses in float64 whose Hessian an independent route gives in full."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes on the cores: one thread each, before torch is there
    os.environ["OMP_NUM_THREADS"] = "1"

import itertools
import random
import signal
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from nsgd.directions import samples

# In the background of a shell SIGINT is ignored, and so would every process be that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the hub, which would be asked again and again

Forward = Callable[..., Tensor]  # the model, or a functional call of it


@dataclass(frozen=True)
class Problem:
    """A model, its loss on one fixed batch, and the same loss on parts of that batch."""

    name: str
    model: nn.Module
    loss_of: Callable[[Forward], Tensor]
    parts: tuple[tuple[Callable[[Forward], Tensor], int], ...] = ()  # mean losses and sample counts

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.params)

    def loss(self) -> Tensor:
        return self.loss_of(self.model)

    def batches(self) -> list[tuple[Callable[[], Tensor], int]]:
        return [(lambda part=part: part(self.model), n) for part, n in self.parts or ((self.loss_of, 1),)]

    def hessian(self, loss_of: Callable[[Forward], Tensor] | None = None) -> Tensor:
        """The dense (P, P) Hessian, forward over reverse on a functional call: not the library's way."""
        objective = loss_of or self.loss_of
        named = dict(self.model.named_parameters())
        free = [name for name, p in named.items() if p.requires_grad]
        sizes = [named[name].numel() for name in free]

        def at(theta: Tensor) -> Tensor:
            blocks = {n: part.view_as(named[n]) for n, part in zip(free, theta.split(sizes), strict=True)}
            rest = {n: p.detach() for n, p in named.items() if n not in blocks}

            def forward(*inputs: Tensor) -> Tensor:
                buffers = {n: b.clone() for n, b in self.model.named_buffers()}  # BatchNorm writes to them
                return functional_call(self.model, {**rest, **blocks, **buffers}, inputs)

            return objective(forward)

        theta = torch.cat([named[name].detach().reshape(-1) for name in free])
        # Row by row: under vmap, torch 2.13 gets the second derivatives of BatchNorm wrong (against differences too).
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forward mode loads torch.jit.script
            rows = [torch.func.jvp(torch.func.grad(at), (theta,), (e,))[1] for e in torch.eye(len(theta)).to(theta)]
        inner = torch.stack(rows)
        where = torch.cat([torch.full((p.numel(),), p.requires_grad) for p in self.params])
        full = torch.zeros(self.size, self.size, dtype=theta.dtype)
        full[where.nonzero(), where.nonzero().T] = inner
        return full


class Vector(nn.Module):
    """Parameters and nothing else."""

    def __init__(self, *values: Tensor) -> None:
        super().__init__()
        self.theta = nn.ParameterList(values)

    def forward(self) -> Tensor:
        return torch.cat([t.reshape(-1) for t in self.theta])


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _double(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 with weights from a private generator, larger than usual so that curvature is not tiny."""
    generator = _seeded(seed)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def _supervised(name: str, model: nn.Module, x: Tensor, y: Tensor, criterion: Callable[..., Tensor]) -> Problem:
    cuts = [0, 3, 10, len(x)]  # unequal parts

    def on(first: int, last: int) -> Callable[[Forward], Tensor]:
        return lambda forward: criterion(forward(x[first:last]), y[first:last])

    parts = tuple((on(a, b), b - a) for a, b in itertools.pairwise(cuts))
    return Problem(name, model, on(0, len(x)), parts)


def _images(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *shape, generator=_seeded(1), dtype=torch.float64)


def _labels(n: int, classes: int) -> Tensor:
    return torch.randint(classes, (n,), generator=_seeded(2))


# Distinct positive and negative eigenvalues, five of these; no two of one absolute value.
SPECTRUM = (10.0, 7.0, 5.0, 2.0, 1.0, 0.25, 0.05, -0.1, -0.6, -1.5, -3.0, -8.0)


def symmetric(spectrum: tuple[float, ...], seed: int = 0) -> Tensor:
    n = len(spectrum)
    rotation = torch.linalg.qr(torch.randn(n, n, generator=_seeded(seed), dtype=torch.float64)).Q
    return rotation @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ rotation.T


def quadratic() -> Problem:
    """Half theta^T H theta + b^T theta in two parameter tensors, of 5 and 7 entries."""
    matrix = symmetric(SPECTRUM)
    slope = torch.randn(len(SPECTRUM), generator=_seeded(3), dtype=torch.float64)
    start = torch.randn(len(SPECTRUM), generator=_seeded(4), dtype=torch.float64)

    def loss_of(forward: Forward) -> Tensor:
        theta = forward()
        return 0.5 * theta @ matrix @ theta + slope @ theta

    return Problem("quadratic", Vector(start[:5].clone(), start[5:].clone()), loss_of)


def regression() -> Problem:
    """Three outputs share the inputs: every eigenvalue of the Hessian comes three times."""
    x = _images(20, 5)
    return _supervised(
        "regression", _double(nn.Linear(5, 3)), x, _images(20, 3), lambda out, y: (out - y).square().mean()
    )


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def tanh_mlp() -> Problem:
    return _supervised("tanh_mlp", _double(_mlp()), _images(20, 6), _labels(20, 4), F.cross_entropy)


def conv_batchnorm() -> Problem:
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )
    return _supervised("conv_batchnorm", _double(net), _images(20, 1, 6, 6), _labels(20, 3), F.cross_entropy)


def partly_frozen() -> Problem:
    model = _double(_mlp())
    for p in (model[0].bias, model[2].weight):
        p.requires_grad_(False)
    return _supervised("partly_frozen", model, _images(20, 6), _labels(20, 4), F.cross_entropy)


def unused_parameter() -> Problem:
    model = _mlp()
    model[2].register_parameter("spare", nn.Parameter(torch.zeros(4)))
    return _supervised("unused_parameter", _double(model), _images(20, 6), _labels(20, 4), F.cross_entropy)


def zero_curvature() -> Problem:
    x = _images(20, 6)
    return _supervised("zero_curvature", _double(nn.Linear(6, 1)), x, x[:, :1], lambda out, y: (out * y).mean())


def one_parameter() -> Problem:
    """(w^2 - 2)^2 in a single number without dimensions: its second derivative is 12 w^2 - 8."""
    return Problem(
        "one_parameter", Vector(torch.tensor(1.5, dtype=torch.float64)), lambda f: ((f() ** 2 - 2) ** 2).sum()
    )


def saddle() -> Problem:
    """Negative curvature only, by a maximum of the loss."""
    matrix = symmetric((-1.0, -1.0, -2.0, -4.0, -4.0, -4.0), seed=5)
    start = torch.ones(6, dtype=torch.float64)
    return Problem("negative", Vector(start), lambda f: 0.5 * f() @ matrix @ f() + f().sum())


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "quadratic": quadratic,
    "regression": regression,
    "tanh_mlp": tanh_mlp,
    "conv_batchnorm": conv_batchnorm,
    "partly_frozen": partly_frozen,
    "unused_parameter": unused_parameter,
    "zero_curvature": zero_curvature,
    "one_parameter": one_parameter,
    "negative": saddle,
}


@pytest.fixture(params=list(PROBLEMS))
def problem(request: pytest.FixtureRequest) -> Problem:
    """Each problem in turn; a test that wants some names them: parametrize("problem", [...], indirect=True)."""
    return PROBLEMS[request.param]()


@dataclass(frozen=True)
class Training:
    """A fresh float32 classifier (unless said otherwise) and the batches to train it on."""

    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]

    def loss(self, i: int) -> Tensor:
        x, y = self.batches[i % len(self.batches)]
        return F.cross_entropy(self.model(x).float() if x.dtype == torch.bfloat16 else self.model(x), y)


@pytest.fixture
def training() -> Callable[..., Training]:
    """A factory of equal models: two calls with the same arguments give the same weights and data."""

    def build(dtype: torch.dtype = torch.float32, *, noisy: bool = False, batches: int = 4) -> Training:
        layers: list[nn.Module] = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)]
        if noisy:  # random masks and running statistics
            layers[1:1] = [nn.BatchNorm1d(8), nn.Dropout(0.3)]
        model = _double(nn.Sequential(*layers)).to(dtype)
        generator = _seeded(7)
        data = [
            (torch.randn(16, 6, generator=generator).to(dtype), torch.randint(4, (16,), generator=generator))
            for _ in range(batches)
        ]
        return Training(model, data)

    return build


def flat(params: Iterable[Tensor]) -> Tensor:
    """The values of all parameters, end to end, (P,)."""
    return torch.cat([p.detach().reshape(-1) for p in params])


@pytest.fixture(name="flat")
def flat_fixture() -> Callable[[Iterable[Tensor]], Tensor]:
    return flat


@pytest.fixture
def basis_of() -> Callable[[torch.optim.Optimizer], Tensor]:
    """The directions of an optimizer as (r, P), read from its checkpoint; zero for a parameter that has none."""

    def read(optimizer: torch.optim.Optimizer) -> Tensor:
        state = optimizer.state_dict()["state"]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        found = {i: state[i]["directions"] for i in range(len(params)) if "directions" in state.get(i, {})}
        some = next(iter(found.values()))
        rows = torch.cat(
            [found.get(i, some.new_zeros(len(some), *p.shape)).flatten(1) for i, p in enumerate(params)], 1
        )
        return rows[: optimizer._directions.rank]  # type: ignore[attr-defined]  # a checkpoint holds k rows always

    return read


class Noisy(nn.Module):
    """Dropout, BatchNorm, and draws from Python's and NumPy's generators, in float64."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 2))
        self.double()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))

    def forward(self, x):
        return self.net(x) * (1.0 + random.random() + np.random.rand())


@pytest.fixture
def noisy():
    generator = torch.Generator().manual_seed(1)
    model = Noisy()
    data = [torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (5, 9)]
    model(data[0])  # running statistics that are not the initial ones
    losses = [(lambda x=x: model(x).square().mean(), len(x)) for x in data]
    return model, losses


@pytest.fixture
def averaging_is_free(monkeypatch):
    """What refreshes from samples cost is the samples' gradients alone; what averaging adds has tests of its own."""
    monkeypatch.setattr("nsgd.directions.refresh.averaging_share", lambda **sizes: 0.0)


@pytest.fixture
def groups_at_once(monkeypatch):
    """How many groups of samples each call of vmap takes, in order."""
    sizes, run = [], samples.vmap

    def seen(function, **options):
        def inner(*args):
            sizes.append(len(args[-1]))
            return run(function, **options)(*args)

        return inner

    monkeypatch.setattr(samples, "vmap", seen)
    return sizes


@pytest.fixture(autouse=True)
def no_clock(request, monkeypatch):
    """No test depends on the speed of the machine: refreshes go by the count, but where a test brings a clock."""
    if "clock" not in request.fixturenames:
        monkeypatch.setattr("nsgd.directions.pace.Pace.is_known", False)
