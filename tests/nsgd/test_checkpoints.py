"""state_dict and load_state_dict: a resumed run is the uninterrupted one."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from loops import through_a_file
from torch import nn
from torch.optim import SGD, AdamW

from nsgd import NSGD, damp

MAKERS = {
    "nsgd": lambda params, **options: NSGD(params, lr=0.1, momentum=0.9, **options),
    "nsgd_without_momentum": lambda params, **options: NSGD(params, lr=0.1, **options),
    "sgd": lambda params, **options: damp(SGD(params, lr=0.1, momentum=0.9), **options),
    "adamw": lambda params, **options: damp(AdamW(params, lr=0.01), **options),
}
DIAGNOSTICS = (
    "eigenvalues",
    "weights",
    "overlap",
    "refreshes",
    "skipped_refreshes",
    "hvps",
    "cost_gradients",
    "refresh_due",
)


def train(run, optimizer, first, last):
    for i in range(first, last):
        optimizer.zero_grad()
        optimizer.backward(value := run.loss(i), curvature=value)
        optimizer.step()


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("stop", [1, 4, 6])  # within a cycle, and just before a refresh
@pytest.mark.parametrize("saved", [through_a_file, copy.deepcopy])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(training, flat, maker, stop, saved):
    options = {"k": 3, "gamma": 0.1, "refresh_every": 3}
    whole, part, resumed = training(), training(), training()
    optimizer = MAKERS[maker](whole.model.parameters(), **options)
    train(whole, optimizer, 0, 10)

    halted = MAKERS[maker](part.model.parameters(), **options)
    train(part, halted, 0, stop)
    state, weights = saved(halted.state_dict()), saved(part.model.state_dict())
    resumed.model.load_state_dict(weights)
    # Made with other options: those of the checkpoint hold, as for any torch optimizer.
    again = MAKERS[maker](resumed.model.parameters(), k=2, gamma=0.7, refresh_every=50)
    again.load_state_dict(state)
    train(resumed, again, stop, 10)

    assert torch.equal(flat(resumed.model.parameters()), flat(whole.model.parameters()))
    for name in DIAGNOSTICS:
        assert getattr(again, name) == getattr(optimizer, name), name
    assert again.alignment == optimizer.alignment


def test_a_resumed_run_refreshes_neither_twice_nor_too_late_between_refresh_and_step(training):
    run, twin = training(), training()
    optimizer = NSGD(run.model.parameters(), k=3, refresh_every=2)
    assert optimizer.refresh_if_due(run.loss(0))
    again = NSGD(twin.model.parameters(), k=3)
    again.load_state_dict(optimizer.state_dict())
    assert not again.refresh_due


def test_loading_does_not_tie_two_optimizers_together(training, basis_of):
    run, twin = training(), training()
    optimizer, other = (NSGD(r.model.parameters(), k=3, refresh_every=1) for r in (run, twin))
    train(run, optimizer, 0, 1)
    state = optimizer.state_dict()
    other.load_state_dict(state)
    before = basis_of(optimizer).clone()
    train(twin, other, 0, 3)
    other._directions.blocks[0].basis.zero_()
    assert torch.equal(basis_of(optimizer), before)
    assert optimizer.refreshes == 1
    assert state["state"][0]["directions"].abs().sum() > 0


def test_the_checkpoint_has_the_basis_in_blocks_beside_the_state_of_each_parameter(training):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, momentum=0.9, k=3)
    train(run, optimizer, 0, 1)
    state = optimizer.state_dict()["state"]
    for i, p in enumerate(run.model.parameters()):
        assert state[i].keys() >= {"momentum_buffer", "directions"}
        for name in state[i].keys() - {"momentum_buffer", "directions"}:  # what "auto" would need of differences
            assert state[i][name].untyped_storage().nbytes() == 4
            assert not state[i][name].any()
        assert state[i]["directions"].shape == (3, *p.shape)
        assert state[i]["directions"].dtype == torch.float32


@pytest.mark.parametrize("maker", ["nsgd", "sgd"])
def test_a_plain_sgd_checkpoint_loads_and_the_next_step_refreshes(training, maker):
    run, twin = training(), training()
    plain = SGD(run.model.parameters(), lr=0.05, momentum=0.8)
    for i in range(3):
        plain.zero_grad()
        run.loss(i).backward()
        plain.step()
    twin.model.load_state_dict(run.model.state_dict())
    optimizer = MAKERS[maker](twin.model.parameters(), k=3, gamma=0.3, refresh_every=7)
    optimizer.load_state_dict(through_a_file(plain.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.05, 0.8)  # from the checkpoint
    assert (optimizer.options.k, group["gamma"], optimizer.options.refresh_every) == (3, 0.3, 7)  # its own
    buffers = [plain.state[p]["momentum_buffer"] for p in run.model.parameters()]
    for p, buffer in zip(twin.model.parameters(), buffers, strict=True):
        assert torch.equal(optimizer.state[p]["momentum_buffer"], buffer)
    assert optimizer.refresh_due
    train(twin, optimizer, 3, 4)
    assert optimizer.refreshes == 1


def test_a_plain_sgd_checkpoint_leaves_the_damping_options_of_each_group(training):
    run = training()
    groups = [
        {"params": run.model[0].parameters(), "gamma": 0.7},
        {"params": run.model[2].parameters(), "curvature": False},
    ]
    plain = SGD([{"params": run.model[0].parameters()}, {"params": run.model[2].parameters()}], lr=0.1)
    optimizer = NSGD(groups, lr=0.1, k=3, gamma=0.1)
    optimizer.load_state_dict(plain.state_dict())
    assert [g["gamma"] for g in optimizer.param_groups] == [0.7, 0.1]
    assert [g["curvature"] for g in optimizer.param_groups] == [True, False]


def test_a_checkpoint_loads_into_plain_sgd(training):
    run, twin = training(), training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, momentum=0.9, k=3)
    train(run, optimizer, 0, 2)
    twin.model.load_state_dict(run.model.state_dict())
    plain = SGD(twin.model.parameters(), lr=0.1)
    plain.load_state_dict(optimizer.state_dict())
    twin.loss(0).backward()
    plain.step()


@pytest.mark.parametrize(
    ("saved", "loaded", "basis"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float64, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_a_checkpoint_loads_into_another_dtype_and_the_basis_stays_as_good(training, basis_of, saved, loaded, basis):
    run, twin = training(saved), training(loaded)
    optimizer = NSGD(run.model.parameters(), lr=0.1, momentum=0.9, k=3)
    train(run, optimizer, 0, 1)
    other = NSGD(twin.model.parameters(), lr=0.1, momentum=0.9, k=3)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    vectors = basis_of(other)
    assert vectors.dtype == basis
    # Orthonormal to float32, not to the 2^-8 of bfloat16.
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(3, dtype=basis), rtol=0, atol=1e-5)
    torch.testing.assert_close(vectors, basis_of(optimizer).to(basis), rtol=0, atol=1e-7)
    assert next(iter(other.state.values()))["momentum_buffer"].dtype == loaded
    train(twin, other, 1, 2)


@pytest.mark.parametrize("maker", MAKERS)
def test_without_the_basis_a_checkpoint_is_small_and_the_first_step_refreshes(training, maker):
    run, twin = training(), training()
    options = {"k": 3, "refresh_every": 50, "save_basis": False}
    optimizer = MAKERS[maker](run.model.parameters(), **options)
    train(run, optimizer, 0, 2)
    state = through_a_file(optimizer.state_dict())
    assert all("directions" not in entry for entry in state["state"].values())
    twin.model.load_state_dict(run.model.state_dict())
    again = MAKERS[maker](twin.model.parameters(), **options)
    again.load_state_dict(state)
    assert again.refresh_due
    train(twin, again, 2, 4)
    assert again.refreshes == 2


def test_a_checkpoint_of_other_parameters_is_refused_and_changes_nothing(training, flat, basis_of):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3)
    train(run, optimizer, 0, 1)
    before = basis_of(optimizer)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(NSGD([nn.Parameter(torch.ones(5))], k=3).state_dict())
    assert torch.equal(basis_of(optimizer), before)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("nsgd_counts", '{"steps": 1', "nsgd_counts of the checkpoint to be a JSON object, got '{\"steps\": 1'"),
        ("nsgd_counts", "[1]", "to be a JSON object"),
        ("nsgd_counts", None, "to be a JSON object, got None"),
        ("nsgd_counts", "{}", "weights in nsgd_counts of the checkpoint to be a list of numbers, got None"),
        ("nsgd_counts", {"steps": "many"}, "steps in nsgd_counts of the checkpoint to be a number, got 'many'"),
        ("nsgd_counts", {"weights": [1.0, "x"]}, "weights in nsgd_counts of the checkpoint to be a list of numbers"),
        ("nsgd_counts", {"overlap": None}, "overlap in nsgd_counts of the checkpoint to be a number, got None"),
        (
            "nsgd_counts",
            {"weights": [1.0, float("nan")]},
            "weights in nsgd_counts of the checkpoint to be a list of num",
        ),
        ("nsgd_counts", {"weights": [1.0] * 4}, "expected 4 directions along parameter 0 in the checkpoint, got 3"),
        (
            "nsgd_counts",
            {"steps": -3},
            "steps in nsgd_counts of the checkpoint to be a whole number of at least 0, got -3",
        ),
        ("nsgd_counts", {"steps": 2.5}, "to be a whole number of at least 0, got 2.5"),
        ("nsgd_counts", {"cost_gradients": -1.0}, "to be a number of at least 0, got -1.0"),
        ("nsgd_counts", {"refreshed_at": -2}, "to be a whole number of at least -1, got -2"),
        ("nsgd_counts", {"followed": [0, 9]}, "followed in nsgd_counts .*places below 4, .*got .0, 9."),
        ("nsgd_counts", {"rows": [1]}, "rows in nsgd_counts of the checkpoint to be an object"),
        ("nsgd_counts", {"rows": {}}, "rows.recorded in nsgd_counts .*to be a whole number from 0 to inf, got None"),
        ("nsgd_options", None, "nsgd_options of the checkpoint to be a mapping, got None"),
        ("nsgd_options", {"k": 3, "gama": 0.1}, "nsgd_options of the checkpoint to be among .*gamma.*, got gama; "),
        ("nsgd_options", {"k": -3}, "k to be a whole number of at least 1, got -3"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_sentence_and_changes_nothing(training, basis_of, key, value, message):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, momentum=0.9, k=3)
    train(run, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    group = saved["param_groups"][0]
    if key == "nsgd_counts" and isinstance(value, dict):
        value = json.dumps({**json.loads(group[key]), **value})
    train(run, optimizer, 2, 3)
    before, options = copy.deepcopy(optimizer.state_dict()), optimizer.options
    if value is None:
        del group[key]
    else:
        group[key] = value
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for number, entry in before["state"].items():
        for name, tensor in entry.items():
            assert torch.equal(after["state"][number][name], tensor)
    assert optimizer.options == options


def test_adam_starts_its_state_afresh_beside_a_loaded_basis(training):
    """A parameter that has directions, but no state of Adam's yet, is not taken for one that has."""
    run, twin = training(), training()
    optimizer = damp(AdamW(run.model.parameters()), k=3)
    optimizer.refresh(run.loss(0))
    again = damp(AdamW(twin.model.parameters()), k=3)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    train(twin, again, 0, 1)
    assert again.steps == 1


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda s: s["state"][0]["directions"].fill_(float("nan")), "expected finite directions in the checkpoint"),
        (
            lambda s: s["state"][1].pop("directions"),
            "expected directions along parameter 1 in the checkpoint, got none",
        ),
        (lambda s: s["state"].pop(2), "expected directions along parameter 2 in the checkpoint, got none"),
        (
            lambda s: s["state"][0].update(directions=3),
            "expected directions of the checkpoint to be real numbers, got int",
        ),
        (lambda s: s["state"][0].update(directions=s["state"][0]["directions"][:1]), "expected 3 directions along par"),
        (lambda s: s["state"][0].update(nsgd_rows=torch.ones(9, dtype=torch.int64)), "real numbers, got torch.int64"),
        (lambda s: s["state"][0].update(directions=torch.ones(3, 5)), "for a parameter of shape .8, 6., got .5,."),
        (lambda s: s.pop("state"), "with state and param_groups, got one with param_groups"),
        (lambda s: s.clear(), "with state and param_groups, got one with nothing"),
        (lambda s: s.update(param_groups=[3]), "with state and param_groups"),
        (None, "expected an optimizer's state_dict.., got a int"),
    ],
)
@pytest.mark.parametrize("maker", ["nsgd_without_momentum", "adamw"])
def test_damaged_directions_are_refused_in_one_sentence_and_change_nothing(training, basis_of, maker, harm, message):
    run = training()
    optimizer = MAKERS[maker](run.model.parameters(), k=3)
    for i in range(13):
        optimizer.zero_grad()
        run.loss(i).backward()
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    if harm is not None:
        harm(saved)
    with pytest.raises(ValueError, match=message) as error:
        optimizer.load_state_dict(3 if harm is None else saved)
    assert "\n" not in str(error.value)
    after = optimizer.state_dict()
    assert str(after["param_groups"]) == str(before["param_groups"])
    for number, entry in before["state"].items():
        assert all(torch.equal(after["state"][number][name], tensor) for name, tensor in entry.items())


def test_a_checkpoint_of_more_directions_than_the_model_has_is_cut_down_with_a_warning(training):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3)
    train(run, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["nsgd_options"]["k"] = 10**6
    with pytest.warns(UserWarning, match="k=1000000 is more than the 92 entries") as said:
        optimizer.load_state_dict(saved)
    assert said[0].filename == __file__
    assert optimizer.options.k == 92


@pytest.mark.parametrize("solver", ["differences", "gradients", "lanczos"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_basis_is_orthonormal_in_the_precision_that_it_has_now(training, basis_of, solver, dtype, error):
    """In memory and on loading: float32 vectors are orthonormal to 1e-7, in float64 to 1e-15."""
    run, twin = (training(torch.float64 if dtype == torch.float32 else torch.float32) for _ in range(2))
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3, solver=solver, refresh_every=1)
    for i in range(12):
        optimizer.zero_grad()
        loss = run.loss(i)
        if solver == "gradients":
            optimizer.refresh_if_due([(lambda i=i: run.loss(i), 16) for i in range(4)])
        elif solver == "lanczos":
            optimizer.refresh_if_due(loss)
        loss.backward()
        optimizer.step()
    saved = through_a_file(optimizer.state_dict())
    run.model.to(dtype)
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()  # without gradients: it only takes note of the change
    twin.model.to(dtype)
    other = NSGD(twin.model.parameters(), lr=0.1, k=3, solver=solver)
    other.load_state_dict(saved)
    for vectors in (basis_of(optimizer), basis_of(other)):
        assert vectors.dtype == dtype
        gram = vectors.double() @ vectors.double().T
        torch.testing.assert_close(gram, torch.eye(3, dtype=torch.float64), rtol=0, atol=error)
