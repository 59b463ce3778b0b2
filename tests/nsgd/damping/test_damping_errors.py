from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from nsgd import NSGD, damp

OUT_OF_RANGE = [
    ({"k": 0}, "expected k to be a whole number of at least 1, got 0"),
    ({"k": 2.0}, "expected k to be a whole number of at least 1, got 2.0"),
    ({"k": True}, "expected k to be a whole number"),
    ({"gamma": -0.1}, "expected gamma to be a finite number >= 0 .*got -0.1"),
    ({"gamma": float("nan")}, "expected gamma to be a finite number >= 0 .*got nan"),
    ({"gamma": "0.1"}, "expected gamma to be a finite number >= 0 .*got '0.1'"),
    ({"gamma": True}, "expected gamma to be a finite number >= 0 .*got True"),
    ({"overhead": "0.1"}, "expected overhead to be a number above 0, .*got '0.1'"),
    ({"basis_dtype": torch.int32}, "expected basis_dtype to be torch.bfloat16, .*got torch.int32"),
    ({"basis_dtype": torch.float8_e4m3fn}, "expected basis_dtype to be torch.bfloat16, .*got torch.float8_e4m3fn"),
    ({"bulk_scale": -1}, "expected bulk_scale to be a finite number >= 0"),
    ({"bulk_scale": float("inf")}, "expected bulk_scale to be a finite number >= 0"),
    ({"bulk_scale": True}, "expected bulk_scale to be a finite number >= 0 .*got True"),
    ({"refresh_every": 0}, "expected refresh_every to be 'auto' or a whole number of at least 1, got 0"),
    ({"refresh_every": "often"}, "expected refresh_every to be 'auto' or a whole number of at least 1, got 'often'"),
    ({"overhead": 0}, "expected overhead to be a number above 0, .*got 0"),
    ({"overhead": float("nan")}, "expected overhead to be a number above 0, .*got nan"),
    ({"decay": 1.0}, "expected decay to be a number >= 0 and below 1, got 1.0"),
    ({"decay": -0.1}, "expected decay to be a number >= 0 and below 1, got -0.1"),
    ({"warmup_steps": -1}, "expected warmup_steps to be a whole number of at least 0, got -1"),
    ({"gamma": 1e300}, "expected gamma of at most 1e.06, more than which no step can bear, got 1e.300"),
    ({"save_basis": "x"}, "expected save_basis to be True or False, got 'x'"),
    ({"seed": 10**30}, "expected seed of at most 9223372036854775807, got 10000"),
    ({"k": torch.ones(3)}, "expected k to be a whole number of at least 1, got a Tensor of shape"),
    ({"gamma": np.ones(2)}, "expected gamma to be a finite number >= 0 .*got a ndarray of shape"),
    ({"solver": ["auto"]}, "expected solver to be one of auto, .*got ..auto"),
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


def test_numbers_of_other_libraries_are_numbers_and_a_checkpoint_with_them_loads_safely(training, tmp_path):
    given = {"k": np.int64(3), "warmup_steps": np.int32(0), "seed": np.int64(1), "refresh_every": np.int64(5)}
    given |= {name: np.float32(0.5) for name in ("gamma", "overhead", "decay", "step_decay", "bulk_scale")}
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, **given)
    assert {name: type(getattr(optimizer.options, name)) for name in given} == {
        name: int if name in ("k", "warmup_steps", "seed", "refresh_every") else float for name in given
    }
    optimizer.param_groups[0]["gamma"] = np.float32(0.25)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert optimizer.param_groups[0]["gamma"] == 0.25


def test_tensors_without_dimensions_are_numbers(training):
    run = training()
    given = {"k": torch.tensor(3), "gamma": torch.tensor(0.5), "seed": np.array(2), "save_basis": np.True_}
    options = NSGD(run.model.parameters(), lr=0.1, **given).options
    assert (options.k, options.gamma, options.seed, options.save_basis) == (3, 0.5, 2, True)
    assert [type(getattr(options, name)) for name in given] == [int, float, int, bool]
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3)
    assert optimizer.refresh(2 * run.loss(0), torch.tensor(2.0), batch_fraction=np.float32(0.5))
    other = NSGD(run.model.parameters(), lr=0.1, k=3)
    other.refresh(run.loss(0))
    assert optimizer.eigenvalues == pytest.approx(other.eigenvalues, rel=1e-4)


@pytest.mark.parametrize("value", ["0.1", -1.0, float("nan"), None])
def test_a_bad_factor_written_into_a_group_or_a_checkpoint_is_refused_and_nothing_moves(training, value):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3)
    run.loss(0).backward()
    saved = optimizer.state_dict()
    before = [p.detach().clone() for p in run.model.parameters()]
    optimizer.param_groups[0]["gamma"] = value
    with pytest.raises(ValueError, match="expected gamma to be a finite number >= 0"):
        optimizer.step()
    assert all(map(torch.equal, run.model.parameters(), before))
    assert optimizer.steps == 0
    optimizer.param_groups[0]["gamma"] = 0.1
    saved["param_groups"][0]["gamma"] = value
    with pytest.raises(ValueError, match="expected gamma to be a finite number >= 0"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["gamma"] == 0.1


def test_a_checkpoint_of_a_later_format_is_refused(training):
    optimizer = NSGD(training().model.parameters(), k=3)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["nsgd_version"] = 99
    with pytest.raises(ValueError, match="expected a checkpoint of format 2 or older, got 99; update nsgd"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("solver", ["gradients", "lanczos", "arpack", "random"])
def test_a_loop_that_never_refreshes_where_the_solver_wants_it_is_told_once(solver):
    """Its steps are those of the base optimizer, and would be so in silence."""
    p = nn.Parameter(torch.ones(30))
    optimizer = NSGD([p], lr=0.01, solver=solver, warmup_steps=3)
    p.grad = torch.ones(30)
    for _ in range(12):
        optimizer.step()
    with pytest.warns(
        UserWarning, match=f"10 steps with solver='{solver}' and no refresh .* take solver='auto'"
    ) as said:
        optimizer.step()
    for _ in range(200):
        optimizer.step()  # a second warning would be an error
    assert len(said) == 1
    assert said[0].filename == __file__


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


@pytest.mark.parametrize("options", [{"k": 0}, {"gamma": -1.0}, {"no_such_option": 1}])
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
