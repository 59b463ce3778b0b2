"""Parameters, groups and checkpoints that are out of the ordinary."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nsgd import NSGD, damp
from nsgd.curvature.guard import untouched


def quadratic(*params):
    """Curvatures 1, 2, 3 ... over the entries of all parameters."""
    flat = torch.cat([p.reshape(-1) for p in params])
    return 0.5 * (torch.arange(1, len(flat) + 1, dtype=flat.dtype) * flat.square()).sum()


def test_scalar_and_empty_parameters_are_damped_like_any_other():
    scalar, vector, empty = (nn.Parameter(torch.full(s, 2.0, dtype=torch.float64)) for s in ((), (3,), (0,)))
    optimizer = NSGD([scalar, vector, empty], lr=0.01, k=4, gamma=0.1)
    optimizer.backward(value := quadratic(scalar, vector, empty), curvature=value)
    optimizer.step()
    # All four directions are damped: entry i moves by gamma lr i x.
    torch.testing.assert_close(scalar.detach(), torch.tensor(2 - 0.1 * 0.01 * 1 * 2, dtype=torch.float64))
    wanted = 2 - 0.1 * 0.01 * torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64) * 2
    torch.testing.assert_close(vector.detach(), wanted)


def coupled():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(32, 4), torch.randint(0, 2, (32,))


def test_a_group_at_rest_stays_bitwise_as_it_is():
    model, x, y = coupled()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    optimizer = NSGD(groups, lr=0.5, k=5)
    before = [p.detach().clone() for p in model[0].parameters()]
    optimizer.backward(value := nn.functional.cross_entropy(model(x), y), curvature=value)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model[0].parameters(), strict=True))


def test_a_parameter_frozen_after_a_refresh_moves_as_under_sgd():
    model, x, y = coupled()
    optimizer = NSGD(model.parameters(), lr=0.5, k=5)
    optimizer.backward(value := nn.functional.cross_entropy(model(x), y), curvature=value)
    optimizer.zero_grad(set_to_none=False)
    model[0].requires_grad_(False)
    before = [p.detach().clone() for p in model[0].parameters()]
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()  # zero gradients: torch.optim.SGD leaves it where it is
    assert all(torch.equal(a, b) for a, b in zip(before, model[0].parameters(), strict=True))


def test_alignment_is_measured_at_gamma_one_and_belongs_to_the_last_step():
    model, x, y = coupled()
    optimizer = NSGD(model.parameters(), lr=0.5, k=5, gamma=1.0)
    optimizer.backward(value := nn.functional.cross_entropy(model(x), y), curvature=value)
    optimizer.step()
    assert 0 < optimizer.alignment <= 1 + 1e-6
    optimizer.zero_grad()
    optimizer.step()  # nothing moved
    assert math.isnan(optimizer.alignment)


def test_a_refresh_through_checkpointed_activations_leaves_batch_norm_as_it_is():
    torch.manual_seed(0)
    block, head = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh()), nn.Linear(8, 2)
    x, y = torch.randn(32, 4), torch.randint(0, 2, (32,))
    optimizer = NSGD([*block.parameters(), *head.parameters()], lr=0.1, k=3)
    loss = nn.functional.cross_entropy(head(checkpoint(block, x, use_reentrant=False)), y)
    found = {name: b.clone() for name, b in block.named_buffers()}
    assert optimizer.refresh(loss)
    assert all(torch.equal(found[name], b) for name, b in block.named_buffers())


def test_a_buffer_that_a_guarded_forward_pass_registers_is_taken_away():
    class Lazy(nn.Module):
        def forward(self, x):
            self.register_buffer("seen", x.detach())
            return x

    module = Lazy()
    with untouched():
        module(torch.ones(1))
    assert not dict(module.named_buffers())


@pytest.mark.parametrize("k", [1, 3])
def test_a_loss_without_curvature_is_refreshed_again_and_again(k):
    w = nn.Parameter(torch.ones(3))
    optimizer = NSGD([w], lr=0.1, k=k, gamma=0.0, refresh_every=1)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(value := w.sum(), curvature=value)
        optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full((3,), 0.7))
    assert optimizer.refreshes == 3


def test_a_skipped_refresh_counts_what_it_spent():
    w = nn.Parameter(torch.ones(3))
    optimizer = NSGD([w], lr=0.1, k=2)
    with pytest.warns(UserWarning, match="refresh skipped"):
        assert not optimizer.refresh((w * math.nan).sum(), batch_fraction=0.5)
    assert optimizer.cost_gradients == 0.5
    assert optimizer.skipped_refreshes == 1


def test_a_checkpoint_without_its_basis_refreshes_at_the_next_step():
    w = nn.Parameter(torch.ones(3))
    optimizer = NSGD([w], lr=0.1, k=2, save_basis=False)
    optimizer.refresh(quadratic(w))  # saved between the refresh and the step
    other = NSGD([nn.Parameter(torch.ones(3))], lr=0.1, k=2)
    other.load_state_dict(optimizer.state_dict())
    assert other.refresh_due


def test_a_checkpoint_of_another_model_is_refused_and_nothing_changes():
    w = nn.Parameter(torch.ones(3))
    optimizer = NSGD([w], lr=0.1, k=2)
    optimizer.refresh(quadratic(w))
    other = NSGD([nn.Parameter(torch.ones(4))], lr=0.7, k=2)
    with pytest.raises(ValueError, match=r"shape \(4,\), got \(3,\); the checkpoint is of another model"):
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.7


def test_a_negative_learning_rate_of_a_group_is_refused():
    with pytest.raises(ValueError, match="expected lr >= 0, got -1"):
        NSGD([{"params": [nn.Parameter(torch.ones(9))], "lr": -1}], lr=0.1, k=2)


def test_a_refresh_with_everything_frozen_is_refused():
    w = nn.Parameter(torch.ones(3))
    optimizer = NSGD([w], lr=0.1, k=2)
    loss = quadratic(w)
    w.requires_grad_(False)
    with pytest.raises(ValueError, match="requires a gradient in a group with curvature"):
        optimizer.refresh(loss)


@pytest.mark.parametrize("base", [torch.optim.Adafactor, torch.optim.AdamW, torch.optim.SGD])
def test_half_precision_state_keeps_its_dtypes_through_damped_steps(base):
    torch.manual_seed(0)
    model = nn.Linear(6, 4).to(torch.bfloat16)
    x, y = torch.randn(16, 6, dtype=torch.bfloat16), torch.randint(0, 4, (16,))
    plain = base(nn.Linear(6, 4).to(torch.bfloat16).parameters(), lr=0.01)
    optimizer = damp(base(model.parameters(), lr=0.01), k=3, warmup_steps=2, refresh_every=1)
    for _ in range(4):
        optimizer.zero_grad()
        optimizer.backward(value := nn.functional.cross_entropy(model(x).float(), y), curvature=value)
        optimizer.step()
    for p in plain.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    plain.step()
    kept = [{n: v.dtype for n, v in s.items() if torch.is_tensor(v)} for s in optimizer.state.values()]
    assert kept == [{n: v.dtype for n, v in s.items() if torch.is_tensor(v)} for s in plain.state.values()]
    assert optimizer.refreshes == 2


def test_optimizers_do_not_share_their_lists():
    a, b = (NSGD([nn.Parameter(torch.ones(3))], k=2) for _ in range(2))
    assert a._directions.eigenvalues is not b._directions.eigenvalues
