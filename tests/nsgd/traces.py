"""What a measurement must leave as it found it."""

from __future__ import annotations

import random

import numpy as np
import torch


def random_states():
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *on_gpus], random.getstate(), np.random.get_state()


def same_random_states(before):
    torch_states, python_state, numpy_state = before
    assert all(map(torch.equal, random_states()[0], torch_states))
    assert random.getstate() == python_state
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))


def snapshot(model):
    """Everything of a model that a measurement must leave alone: values, identity of buffers, gradients, modes."""
    return {
        "values": {n: t.clone() for n, t in model.state_dict().items()},
        "buffers": {n: id(b) for n, b in model.named_buffers()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
    }


def assert_untouched(model, before):
    now = snapshot(model)
    assert now["buffers"] == before["buffers"]
    assert now["modes"] == before["modes"]
    for kind in ("values", "grads"):
        assert now[kind].keys() == before[kind].keys()
        for name, value in before[kind].items():
            assert (value is None and now[kind][name] is None) or torch.equal(now[kind][name], value), (kind, name)
