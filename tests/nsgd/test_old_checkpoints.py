"""Checkpoints that release 0.1.0 wrote, with where it went from there: they load, and training goes on as it did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from nsgd import NSGD, damp, sample_losses
from nsgd.directions import refresh

FOLDER = Path(__file__).parent / "checkpoints_0_1_0"
MAKERS = {
    "nsgd_products": lambda params: NSGD(params, lr=1.0),
    "nsgd_samples": lambda params: NSGD(params, lr=1.0),
    "damped_adamw": lambda params: damp(AdamW(params, lr=1.0)),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.usefixtures("averaging_is_free")  # in that release it was
def test_a_run_goes_on_as_in_the_release_that_wrote_it(name, monkeypatch):
    monkeypatch.setattr(refresh, "centred", lambda rows, new: new)  # in that release the mean gradient was left in
    saved = torch.load(FOLDER / f"{name}.pt", weights_only=True)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    model.load_state_dict(saved["model"])
    optimizer = MAKERS[name](model.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    x, y = saved["x"], saved["y"]
    for _ in range(6):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        samples = sample_losses(lambda x, y: cross_entropy(model(x), y), x[:8], y[:8], module=model)
        if name == "nsgd_products":
            optimizer.backward(loss, curvature=loss)
        else:
            optimizer.backward(loss, curvature=samples, batch_fraction=0.5)
        optimizer.step()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, saved["after"][key], rtol=1e-5, atol=1e-6)  # float32, in another order
    assert optimizer.weights == pytest.approx(saved["weights"], rel=1e-4)
    assert (optimizer.refreshes, optimizer.cost_gradients) == (saved["refreshes"], saved["cost_gradients"])
    assert optimizer.steps == 12
    assert optimizer.param_groups[0].keys() <= {*optimizer.defaults, "params"}  # what it counted lies elsewhere now


@pytest.mark.parametrize("name", MAKERS)
def test_its_checkpoint_is_of_the_new_kind(name):
    saved = torch.load(FOLDER / f"{name}.pt", weights_only=True)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    optimizer = MAKERS[name](model.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    first = optimizer.state_dict()["param_groups"][0]
    assert first["nsgd_version"] == 2
    assert first["nsgd_options"]["k"] == optimizer.options.k == 3
    assert "refreshed_at" not in first
    assert torch.equal(optimizer.state_dict()["state"][0]["directions"], saved["optimizer"]["state"][0]["directions"])
