"""Optimizers with a second set of weights, as schedule-free ones have: looking at it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_optimizer
import torch
from steps import network, trained

from lightning_modules import Classifier, Digits, ReadOuts
from lightning_modules.callbacks.evaluation_weights import EvaluationWeights, evaluation_weights
from lightning_modules.support.quiet import quiet_trainer


def test_a_look_at_the_weights_changes_no_bit_also_where_it_fails():
    net = network()
    optimizer = pytorch_optimizer.ScheduleFreeAdamW(net.parameters(), lr=0.01)
    before = trained(net, optimizer, 3)
    with evaluation_weights([optimizer]):
        assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    with pytest.raises(ZeroDivisionError), evaluation_weights([optimizer]):
        1 / 0  # noqa: B018
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert optimizer.param_groups[0]["train_mode"]


class Strict(pytorch_optimizer.ScheduleFreeAdamW):
    """As schedulefree's own: it begins in eval mode, and steps in train mode only."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr=lr)
        self.param_groups[0]["train_mode"] = False

    def step(self, closure: Any = None) -> Any:
        assert self.param_groups[0]["train_mode"]
        return super().step(closure)


def test_an_entry_that_switches_is_switched():
    module = Classifier()
    module.configure_optimizers = lambda: Strict(module.parameters())
    trainer = quiet_trainer(
        max_steps=6, max_epochs=-1, callbacks=[ReadOuts(), EvaluationWeights()], log_every_n_steps=1
    )
    trainer.fit(module, datamodule=Digits(batch_size=50, limit=300))
    assert not trainer.optimizers[0].param_groups[0]["train_mode"]
