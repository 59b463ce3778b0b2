"""Muon for a whole network, against torch's two optimizers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from steps import network, trained
from torch import nn

from lightning_modules.study.methods.muon import Muon


def muons(net: nn.Module) -> Any:
    """The two optimizers of torch that Muon stands for, on matrices that are parameters of their own."""
    params = list(net.parameters())
    matrices = [nn.Parameter(p.detach().clone().flatten(1)) for p in params if p.dim() > 1]
    biases = [p for p in params if p.dim() <= 1]
    pairs = [p for p in params if p.dim() > 1]

    class Both:
        parts = (
            torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(biases, lr=0.02, weight_decay=0.1),
        )

        def zero_grad(self) -> None:
            for p in params:
                p.grad = None

        def step(self) -> None:
            for p, matrix in zip(pairs, matrices, strict=True):
                matrix.grad = p.grad.flatten(1)
            for part in self.parts:
                part.step()
            for p, matrix in zip(pairs, matrices, strict=True):
                p.data = matrix.detach().view(p.shape).clone()

    return Both()


SETTINGS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muons_steps_are_those_of_torch(memory_format):
    net = network().to(memory_format=memory_format)
    mine, theirs = copy.deepcopy(net), copy.deepcopy(net)
    found = trained(mine, Muon(mine.parameters(), **SETTINGS), 4)
    expected = trained(theirs, muons(theirs), 4)
    exact = memory_format is torch.contiguous_format  # else convolutions add up in another order
    for a, b, start in zip(found, expected, net.parameters(), strict=True):
        assert torch.equal(a, b) if exact else torch.allclose(a, b, atol=1e-5)
        assert not torch.equal(a, start)


def test_muon_goes_on_from_its_state_and_from_a_pickle():
    whole = network()
    expected = trained(whole, Muon(whole.parameters(), **SETTINGS), 6)
    net = network()
    optimizer = Muon(net.parameters(), **SETTINGS)
    trained(net, optimizer, 3)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    resumed = network()
    resumed.load_state_dict(weights)
    fresh = Muon(resumed.parameters(), lr=0.5)
    fresh.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(trained(resumed, fresh, 3, start=3), expected, strict=True))
    copied, optimizer = pickle.loads(pickle.dumps((net, optimizer)))
    assert all(torch.equal(a, b) for a, b in zip(trained(copied, optimizer, 3, start=3), expected, strict=True))


def test_parameters_without_a_gradient_stay_and_bad_options_are_refused():
    net = network()
    frozen = net[3].weight.requires_grad_(False).clone()
    trained(net, Muon(net.parameters(), **SETTINGS), 2)
    assert torch.equal(net[3].weight, frozen)
    for name in SETTINGS:
        with pytest.raises(ValueError, match=f"expected {name} >= 0, got -1"):
            Muon(net.parameters(), **{name: -1.0})
