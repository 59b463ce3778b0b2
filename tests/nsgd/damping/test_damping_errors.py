from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from nsgd import NSGD, damp

OUT_OF_RANGE = [
    ({"k": 0}, "expected k to be a whole number of at least 1, got 0"),
    ({"k": 2.0}, "expected k to be a whole number of at least 1, got 2.0"),
    ({"k": True}, "expected k to be a whole number"),
    ({"k": 1000}, "expected k of at most 92, the number of trainable parameters, got 1000"),
    ({"gamma": -0.1}, "expected gamma to be a finite number >= 0 .*got -0.1"),
    ({"gamma": float("nan")}, "expected gamma to be a finite number >= 0 .*got nan"),
    ({"gamma": "0.1"}, "expected gamma to be a finite number >= 0 .*got '0.1'"),
    ({"bulk_scale": -1}, "expected bulk_scale to be a finite number >= 0"),
    ({"bulk_scale": float("inf")}, "expected bulk_scale to be a finite number >= 0"),
    ({"refresh_every": 0}, "expected refresh_every to be 'auto' or a whole number of at least 1, got 0"),
    ({"refresh_every": "often"}, "expected refresh_every to be 'auto' or a whole number of at least 1, got 'often'"),
    ({"overhead": 0}, "expected overhead to be a number above 0, .*got 0"),
    ({"overhead": float("nan")}, "expected overhead to be a number above 0, .*got nan"),
    ({"decay": 1.0}, "expected decay to be a number >= 0 and below 1, got 1.0"),
    ({"decay": -0.1}, "expected decay to be a number >= 0 and below 1, got -0.1"),
    ({"warmup_steps": -1}, "expected warmup_steps to be a whole number of at least 0, got -1"),
    ({"which": "BE"}, "expected which to be one of LA, LM, SA, got 'BE'"),
    (
        {"solver": "power"},
        "expected solver to be one of auto, differences, gradients, .*got 'power'",
    ),
]


@pytest.mark.parametrize(("options", "message"), OUT_OF_RANGE)
@pytest.mark.parametrize("way", ["nsgd", "damp"])
def test_an_option_out_of_range_is_one_clear_sentence(training, way, options, message):
    params = list(training().model.parameters())
    with pytest.raises(ValueError, match=message) as error:
        NSGD(params, **options) if way == "nsgd" else damp(SGD(params), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"k": 3}, "k is one value for the whole optimizer, 20, got 3 for one group"),
        ({"refresh_every": 7}, "refresh_every is one value for the whole optimizer, 'auto', got 7"),
        ({"overhead": 0.3}, "overhead is one value for the whole optimizer"),
        ({"decay": 0.5}, "decay is one value for the whole optimizer"),
        ({"gamma": -1.0}, "expected gamma to be a finite number"),
        ({"maximize": True}, "maximize is one value for the whole optimizer"),
        ({"differentiable": True}, "expected differentiable=False"),
    ],
)
@pytest.mark.parametrize("way", ["nsgd", "damp", "added"])
def test_a_bad_group_is_a_value_error(way, group, message):
    params, more = [nn.Parameter(torch.ones(20))], [nn.Parameter(torch.ones(20))]
    groups = [{"params": params}, {"params": more, **group}]
    optimizer = NSGD(params)
    make = {
        "nsgd": lambda: NSGD(groups),
        "damp": lambda: damp(SGD(groups)),
        "added": lambda: optimizer.add_param_group(groups[1]),
    }[way]
    with pytest.raises(ValueError, match=message):
        make()
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("way", ["nsgd", "damp"])
def test_nothing_to_train_is_a_value_error(way):
    def make(params, **options):
        return NSGD(params, **options) if way == "nsgd" else damp(SGD(params, lr=0.1), **options)

    with pytest.raises(ValueError, match="empty parameter list"):
        make([])
    with pytest.raises(ValueError, match="none of the 2 parameters requires a gradient"):
        make([torch.zeros(20), torch.zeros(3)])
    with pytest.raises(ValueError, match="in a group with curvature=True"):
        make([{"params": [nn.Parameter(torch.zeros(20))], "curvature": False}])
    with pytest.raises(ValueError, match="complex"):
        make([nn.Parameter(torch.zeros(20, dtype=torch.complex64))])


def test_a_negative_learning_rate_and_a_differentiable_step_are_refused():
    params = [nn.Parameter(torch.zeros(20))]
    with pytest.raises(ValueError, match=r"expected lr >= 0, got -0\.1"):
        NSGD(params, lr=-0.1)
    with pytest.raises(ValueError, match="expected differentiable=False"):
        NSGD(params, differentiable=True)
    with pytest.raises(ValueError, match="expected differentiable=False"):
        damp(Adam(params, differentiable=True))


def test_damp_refuses_what_is_no_optimizer_or_damped_already():
    params = [nn.Parameter(torch.zeros(20))]
    with pytest.raises(ValueError, match=r"expected a torch\.optim\.Optimizer, got a list"):
        damp(params)
    for optimizer in (NSGD(params), damp(SGD(params))):
        with pytest.raises(ValueError, match="expected an optimizer that is not damped yet"):
            damp(optimizer)


@pytest.mark.parametrize("options", [{"k": 1000}, {"gamma": -1.0}, {"no_such_option": 1}])
def test_a_failing_damp_leaves_the_optimizer_as_it_was(training, options):
    run = training()
    optimizer = AdamW(run.model.parameters())
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    run.loss(0).backward()
    optimizer.step()
    before, defaults, groups = (
        dict(vars(optimizer)),
        dict(optimizer.defaults),
        [dict(g) for g in optimizer.param_groups],
    )
    with pytest.raises((ValueError, TypeError)):
        damp(optimizer, **options)
    assert type(optimizer) is AdamW
    assert dict(vars(optimizer)) == before
    assert optimizer.defaults == defaults
    assert [dict(g).keys() for g in optimizer.param_groups] == [g.keys() for g in groups]
    optimizer.step()
