"""Off the CPU a fold ends when the next step comes; here on the CPU, made to do the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nsgd import NSGD
from nsgd.directions import directions
from nsgd.directions.on_host import OnHost

STEPS, K = 45, 3


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(directions, "folds_late", lambda device: True)


class Run:
    """Training whose directions damp nothing, so that all see the same gradients, or that they damp."""

    def __init__(self, gamma: float = 1.0, passes: int = 1) -> None:
        torch.manual_seed(0)
        self.model, self.passes = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), passes
        self.optimizer = NSGD(self.model.parameters(), lr=0.1, momentum=0.9, k=K, gamma=gamma)
        self.generator = torch.Generator().manual_seed(1)

    def step(self) -> None:
        self.optimizer.zero_grad()
        for _ in range(self.passes):
            x = torch.randn(12, 6, generator=self.generator)
            F.cross_entropy(self.model(x), x[:, :3].argmax(1)).backward()
        self.optimizer.step()

    def seen(self) -> list[Tensor]:
        vectors = self.optimizer.directions(self.model.parameters()).clone()
        return [vectors, torch.tensor([*self.optimizer.weights, self.optimizer.overlap])]

    def parameters(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.mark.parametrize("passes", [1, 3])
def test_directions_are_those_of_the_step_before(monkeypatch, passes):
    prompt, seen = Run(passes=passes), []
    for _ in range(STEPS):
        prompt.step()
        seen.append(prompt.seen())
    monkeypatch.setattr(directions, "folds_late", lambda device: True)
    run = Run(passes=passes)
    run.step()
    assert not run.optimizer.weights
    for before in seen[:-1]:
        run.step()
        for one, other in zip(run.seen(), before, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert run.optimizer.refreshes >= prompt.optimizer.refreshes - 1 > 5


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("way", ["checkpoint", "copy"])
def test_between_the_halves_of_a_fold_it_is_copied_and_saved_whole(late, passes, way):
    whole = Run(0.1, passes)
    for _ in range(STEPS):
        whole.step()
    halves = 0
    for at in range(18, 31):
        run = Run(0.1, passes)
        for _ in range(at):
            run.step()
        halves += run.optimizer._directions.differences.folding
        if way == "copy":
            run.model, run.optimizer, run.generator = copy.deepcopy((run.model, run.optimizer, run.generator))
        else:
            other = Run(0.1, passes)
            other.model.load_state_dict(run.model.state_dict())
            other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
            other.generator, run = run.generator, other
        for _ in range(STEPS - at):
            run.step()
        assert all(map(torch.equal, run.parameters(), whole.parameters()))
        assert run.optimizer.refreshes == whole.optimizer.refreshes
    assert halves > 0


@pytest.mark.parametrize("passes", [1, 3])
def test_the_host_asks_for_the_numbers_of_a_step_when_the_next_has_gone_backward(late, monkeypatch, passes):
    """So that the device has something to do meanwhile."""
    run, asked, get = Run(0.1, passes), [], OnHost.get

    def noted(self: OnHost) -> Tensor:
        asked.append(True)
        return get(self)

    monkeypatch.setattr(OnHost, "get", noted)
    begun = 0
    for _ in range(STEPS):
        run.optimizer.zero_grad()
        x = torch.randn(12, 6)
        losses = [F.cross_entropy(run.model(x), x[:, :3].argmax(1)) for _ in range(passes)]
        was_begun = run.optimizer._directions.differences.folding
        assert not asked
        for loss in losses:
            loss.backward()
        run.optimizer.step()
        assert len(asked) == was_begun
        begun += was_begun
        asked.clear()
    assert begun > 5
