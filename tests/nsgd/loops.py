"""A training loop, and the comparison of two runs."""

from __future__ import annotations

import io

import torch

from nsgd import NSGD


def train(run, optimizer, steps, *, before_step=None, after_step=None, set_to_none=True, refreshing=True):
    for i in range(steps):
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = run.loss(i)
        if isinstance(optimizer, NSGD) and refreshing:
            optimizer.backward(loss, curvature=loss)
        else:
            loss.backward()
        if before_step is not None:
            before_step()
        optimizer.step()
        if after_step is not None:
            after_step()


def everything(run):
    return {name: t.clone() for name, t in run.model.state_dict().items()}


def assert_bitwise(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
