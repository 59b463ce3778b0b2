"""When the directions are refreshed, and what happens when that fails."""

from __future__ import annotations

import pytest
import torch
from loops import assert_bitwise, everything, train
from torch import nn
from torch.optim import SGD

from nsgd import NSGD, top_eigenpairs

# -- when it refreshes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"refresh_every": 1}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ({"refresh_every": 3}, [0, 3, 6]),
        ({"refresh_every": 100}, [0]),
        ({"refresh_every": 3, "warmup_steps": 2}, [2, 5, 8]),
        ({"refresh_every": 2, "warmup_steps": 5}, [5, 7]),
    ],
)
def test_the_refreshes_come_at_these_steps(training, options, expected):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=2, **options)
    came = []
    for i in range(9):
        due = optimizer.refresh_due
        loss = run.loss(i)
        if optimizer.refresh_if_due(loss):
            came.append(i)
        assert due == (i in expected)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert came == expected
    assert optimizer.refreshes == len(expected)


def test_a_refresh_by_hand_starts_the_count_anew(training):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=2, refresh_every=3)
    came = []
    for i in range(7):
        if i == 2:
            optimizer.refresh(run.loss(i))
        elif optimizer.refresh_if_due(run.loss(i)):
            came.append(i)
        train(run, optimizer, 1, refreshing=False)
    assert came == [0, 5]


def test_accumulation_refreshes_at_most_once_a_step_with_the_eigenvalues_of_the_plain_loss(training):
    run, twin = training(torch.float64), training(torch.float64)
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3, refresh_every=1)
    plain = NSGD(twin.model.parameters(), lr=0.1, k=3)
    plain.refresh(twin.loss(0))
    for step in range(2):
        optimizer.zero_grad()
        for micro in range(4):
            optimizer.backward(value := run.loss(4 * step + micro) / 4, curvature=value, scale=1 / 4)
        if step == 0:
            assert optimizer.eigenvalues == pytest.approx(plain.eigenvalues, rel=1e-12)  # powers of two
        optimizer.step()
    assert optimizer.refreshes == 2


def test_a_gradient_scaler_gives_the_eigenvalues_and_the_steps_of_the_plain_loss(training):
    run, twin = training(), training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, momentum=0.9, k=3, refresh_every=2)
    plain = NSGD(twin.model.parameters(), lr=0.1, momentum=0.9, k=3, refresh_every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(5):
        optimizer.zero_grad()
        loss = scaler.scale(run.loss(i))
        optimizer.refresh_if_due(loss, scale=scaler.get_scale())
        loss.backward()
        scaler.step(optimizer)
        scaler.update()
        plain.zero_grad()
        plain.backward(value := twin.loss(i), curvature=value)
        plain.step()
        # A power of two scales without rounding, but the trained weights meet float32 rounding on the way.
        assert optimizer.eigenvalues == pytest.approx(plain.eigenvalues, rel=1e-5)
    assert optimizer.refreshes == plain.refreshes == 3


def test_an_overflow_of_the_scaler_skips_the_step_and_the_refresh(training):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = everything(run)
    loss = scaler.scale(run.loss(0) * 1e6)
    with pytest.warns(UserWarning, match="refresh skipped at step 0"):
        assert not optimizer.refresh_if_due(loss, scale=scaler.get_scale())
    loss.backward()
    scaler.step(optimizer)
    scaler.update()
    assert_bitwise(everything(run), before)
    assert optimizer.refresh_due is False  # once a step
    assert (optimizer.refreshes, optimizer.skipped_refreshes) == (0, 1)


def test_curvature_comes_from_the_given_sample_and_only_when_due(training):
    run = training(torch.float64)
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3, refresh_every=2)
    calls = []

    def sample():
        calls.append(1)
        return run.loss(3)

    for i in range(4):
        if i % 2 == 0:
            expected = top_eigenpairs(run.loss(3), run.model.parameters(), k=3, max_hvps=8, repeated=False)
        optimizer.zero_grad()
        optimizer.backward(run.loss(i), curvature=sample, batch_fraction=0.25)
        assert optimizer.eigenvalues == pytest.approx(expected.eigenvalues.tolist(), rel=1e-9)
        optimizer.step()
    assert len(calls) == 2
    assert optimizer.cost_gradients == 0.25 * (2 + 2 * optimizer.hvps)


# -- trouble --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_keeps_the_directions_warns_once_and_goes_on(training, basis_of, value):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3, refresh_every=2)
    assert optimizer.refresh(run.loss(0))
    train(run, optimizer, 2)
    kept, values = basis_of(optimizer), optimizer.eigenvalues
    with pytest.warns(UserWarning, match="refresh skipped at step 2, the last directions are kept: the loss is NaN"):
        assert not optimizer.refresh(run.loss(0) * value)
    assert not optimizer.refresh(run.loss(0) * value)  # a second warning would be an error here
    assert torch.equal(basis_of(optimizer), kept)
    assert optimizer.eigenvalues == values
    assert (optimizer.refreshes, optimizer.skipped_refreshes) == (1, 2)
    train(run, optimizer, 1, refreshing=False)
    assert optimizer.refresh_due  # tried again at the next step
    assert optimizer.refresh_if_due(run.loss(1))
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_without_directions_a_loss_that_is_not_finite_leaves_plain_sgd(training):
    run, twin = training(), training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3, gamma=0.0, solver="lanczos")
    with pytest.warns(UserWarning, match="refresh skipped"):
        optimizer.refresh_if_due(run.loss(0) * float("nan"))
    for i in range(3):
        optimizer.zero_grad()
        optimizer.refresh_if_due(run.loss(i) * float("nan"))
        run.loss(i).backward()
        optimizer.step()
    train(twin, SGD(twin.model.parameters(), lr=0.1), 3)
    assert_bitwise(everything(run), everything(twin))
    assert optimizer.skipped_refreshes == 3


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda run: torch.tensor(1.0), "no graph"),
        (lambda run: run.loss(0).detach(), "no graph"),
        (lambda run: run.loss(0).item(), "expected a loss tensor, a closure"),
        (lambda run: run.model(run.batches[0][0]), "expected a scalar loss tensor"),
        (lambda run: nn.Parameter(torch.ones(())) * 2, "reaches none of the parameters"),
    ],
)
def test_a_bad_loss_is_a_value_error_and_changes_nothing(training, bad, message):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3)
    before = everything(run)
    with pytest.raises(ValueError, match=message):
        optimizer.refresh(bad(run))
    assert_bitwise(everything(run), before)
    assert optimizer.refreshes == 0


@pytest.mark.parametrize("solver", ["lanczos", "gradients", "random"])
@pytest.mark.parametrize("known", [False, True])
def test_k_is_cut_down_with_a_warning_where_parameters_froze_since(training, solver, known):
    """As at construction; a checkpoint has that k, and the directions are orthonormal along what is left."""
    run = training(torch.float64)
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=60, solver=solver)
    samples = [(lambda i=i: run.loss(i), 1) for i in range(70)]
    if known:
        assert optimizer.refresh(samples if solver == "gradients" else run.loss(0))
    run.model[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="k=60 is more than the 36 entries of the parameters that train") as said:
        assert optimizer.refresh(samples if solver == "gradients" else run.loss(0))
    assert said[0].filename == __file__  # the line that asked for the refresh
    assert optimizer.options.k == 36
    rows = optimizer.directions(run.model[2].parameters())
    assert len(rows) == 36 or solver == "gradients"
    rows = rows[: len(optimizer.weights)]  # the others of samples are zero
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=rows.dtype), rtol=0, atol=1e-10)  # float64
    state = optimizer.state_dict()
    assert state["param_groups"][0]["nsgd_options"]["k"] == 36
    run.loss(0).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in run.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_flat_descent_direction_is_not_damped(dtype):
    """The second eigenvalue that products find is rounding, and positive: the first number falls as under SGD."""
    theta = nn.Parameter(torch.zeros(40, dtype=dtype))
    optimizer = NSGD([theta], lr=0.005, k=2, solver="lanczos", refresh_every=10)
    for _ in range(100):
        optimizer.zero_grad()
        rest = theta[2:] - 0.001
        loss = -theta[0] + 10 * (theta[1] - 0.01) ** 2 + 0.05 * rest.square().sum()
        optimizer.backward(loss, curvature=loss)
        optimizer.step()
    assert optimizer.eigenvalues[1] > 0
    assert float(theta[0].detach()) == pytest.approx(0.5, rel=1e-6)
