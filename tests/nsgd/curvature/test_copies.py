"""Fresh batches of every make; and what modules hold in attributes is as found after a look at the loss."""

from __future__ import annotations

from collections import UserDict, defaultdict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_sequence

from nsgd import NSGD, sample_losses
from nsgd.curvature.copies import fresh_batch
from nsgd.curvature.guard import untouched

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Columns:
    x: Tensor
    names: list[str]


class Graph:
    def __init__(self, x: Tensor) -> None:
        self.nodes = {"x": x}


class Encoding(UserDict):  # type: ignore[type-arg]
    """As transformers' BatchEncoding."""


BATCHES: dict[str, Any] = {
    "tensor": (lambda x: x, lambda b: b),
    "list": (lambda x: [x, "name"], lambda b: b[0]),
    "nested": (lambda x: ({"a": [x]}, 3), lambda b: b[0]["a"][0]),
    "named tuple": (lambda x: Pair(x, None), lambda b: b.x),
    "dataclass": (lambda x: Columns(x, ["a"]), lambda b: b.x),
    "object": (Graph, lambda b: b.nodes["x"]),
    "mapping of a library": (lambda x: Encoding(x=x), lambda b: b["x"]),
    "defaultdict": (lambda x: defaultdict(list, x=[x]), lambda b: b["x"][0]),
    "packed sequence": (lambda x: pack_sequence([x]), lambda b: b.data),
    "array": (lambda x: {"x": x.numpy().copy()}, lambda b: b["x"]),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_a_fresh_batch_is_of_its_class_and_changes_nothing(kind):
    make, inner = BATCHES[kind]
    batch = make(torch.arange(6.0))
    copied = fresh_batch(batch)
    assert type(copied) is type(batch)
    inner(copied)[:] = -1
    assert np.asarray(inner(batch)).tolist() == list(range(6))


def test_a_fresh_batch_copies_a_slice_alone_and_what_is_shared_stays_shared():
    whole = torch.zeros(1000, requires_grad=True)
    x, leaf = whole.detach()[:2], torch.ones(2, requires_grad=True)
    copied = fresh_batch({"a": x, "b": x, "leaf": leaf, "graph": whole[:2]})
    assert copied["a"] is copied["b"]
    assert copied["a"].untyped_storage().nbytes() == 8
    assert copied["leaf"].is_leaf
    assert copied["leaf"].requires_grad
    assert copied["graph"].grad_fn is not None


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head, self.h = nn.Linear(10, 4), nn.Linear(4, 3), None

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 4) if self.h is None or len(self.h) != len(x) else self.h
        h = torch.tanh(self.cell(torch.cat([x, h], 1)))
        self.h = h.detach()
        return self.head(h)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.seen, self.means = nn.Linear(6, 3), 0, {"x": torch.zeros(6)}

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        if not torch._C._functorch.is_functorch_wrapped_tensor(x):
            self.means["x"].mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.head(x) / (1 + 0.01 * self.seen) + self.means["x"].sum()


class Teacher(nn.Module):
    def __init__(self, *, by_data: bool) -> None:
        super().__init__()
        self.fast, self.slow, self.by_data = nn.Linear(6, 3), nn.Linear(6, 3).requires_grad_(False), by_data

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.fast.parameters(), strict=True):
                if self.by_data:
                    slow.data = slow.data * 0.9 + fast.data * 0.1
                else:
                    slow.mul_(0.9)
        return self.fast(x) + self.slow(x)


def pruned() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    prune.random_unstructured(net[0], "weight", 0.4)
    return net


NETWORKS: dict[str, Any] = {
    "hidden state": Hidden,
    "counter and means": Counts,
    "pruned": pruned,
    "teacher in place": lambda: Teacher(by_data=False),
    "teacher by data": lambda: Teacher(by_data=True),
}


def trained(make: Any, solver: str | None, *, module: bool = False) -> Any:
    torch.manual_seed(0)
    net = make()
    params = [p for p in net.parameters() if p.requires_grad]
    given = {"k": 3, "gamma": 1.0, "solver": solver, "refresh_every": 1}
    optimizer: Any = NSGD(params, lr=0.1, **given) if solver else torch.optim.SGD(params, lr=0.1)
    data = torch.randn(64, 6), torch.randint(3, (64,))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x), y)

    for i in range(8):
        x, y = (tensor[8 * i : 8 * i + 8] for tensor in data)
        optimizer.zero_grad()
        running = loss(x, y)  # a graph from before, which still holds
        if solver == "gradients":
            of = sample_losses(loss, x, y, group_size=2, module=net if module else None)
            try:
                optimizer.refresh(of)
            except RuntimeError as error:
                assert "leave module out" in str(error)  # noqa: PT017  what vmap cannot run, it says
        elif solver:
            optimizer.refresh(lambda x=x, y=y: loss(x[:4], y[:4]))
        running.backward()
        optimizer.step()
    kept = {name: value for m in net.modules() for name, value in vars(m).items() if name in ("h", "seen", "means")}
    return {name: value.tolist() for name, value in net.state_dict().items()}, repr(kept)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("solver", "module"), [("gradients", False), ("gradients", True), ("lanczos", False)])
def test_training_is_that_without_refreshes_to_the_bit(name, solver, module):
    assert trained(NETWORKS[name], solver, module=module) == trained(NETWORKS[name], None)


@pytest.mark.parametrize("module", [False, True])
def test_samples_whose_loss_changes_them_in_place_stay_as_they_are(module):
    net, x, y = nn.Linear(6, 3), torch.eye(8, 6), torch.arange(8) % 3
    before = x.clone()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x.sub_(3.0)), y)

    NSGD(net.parameters(), lr=0.1, k=3, solver="gradients").refresh(
        sample_losses(loss, x, y, module=net if module else None)
    )
    assert torch.equal(x, before)


def test_a_network_whose_tensors_are_replaced_for_a_call_keeps_its_own():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    own = dict((*net.named_parameters(), *net.named_buffers()))
    others = {name: value.clone() for name, value in own.items()}
    before = {name: value.clone() for name, value in own.items()}
    with untouched():
        functional_call(net, others, torch.randn(4, 2)).sum().backward()
    assert all(value is own[name] for name, value in (*net.named_parameters(), *net.named_buffers()))
    assert all(torch.equal(value, before[name]) for name, value in own.items())


def test_a_parameter_that_is_given_another_value_or_storage_has_its_own_back_after_an_exception():
    net = nn.Linear(3, 3)
    values, addresses = [p.detach().clone() for p in net.parameters()], [p.data_ptr() for p in net.parameters()]

    def failing() -> None:
        with untouched(net), torch.no_grad():
            net.weight.data = torch.zeros(2, 2)
            net.bias.data.zero_()
            net.extra = nn.Parameter(torch.ones(1))
            raise KeyError("inside")

    with pytest.raises(KeyError):
        failing()
    assert [p.data_ptr() for p in net.parameters()] == addresses
    assert all(torch.equal(p, value) for p, value in zip(net.parameters(), values, strict=True))


def test_a_guard_around_another_does_not_bring_back_what_the_inner_one_changed():
    """The outer guard meets the module first while the inner one has changed it, as Lightning's log is muted."""
    module = nn.BatchNorm1d(2)
    module.told = "as found"  # type: ignore[assignment]
    mean = module.running_mean
    with untouched():
        for _ in range(2):
            with untouched(module):
                module.told = "muted"  # type: ignore[assignment]
                module(torch.randn(3, 2))
        assert module.told == "as found"
        module(torch.randn(3, 2))  # met by the outer guard alone
        module.told = "changed"  # type: ignore[assignment]
    assert module.told == "as found"
    assert module.running_mean is mean
    assert not mean.any()
