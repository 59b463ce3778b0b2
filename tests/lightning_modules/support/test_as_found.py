"""What a study takes of its process is given back; the rest is tested with studies, in study/test_compare.py."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.support.as_found import as_found


@pytest.mark.parametrize("used", [True, False])
def test_gpus_that_a_study_used_first_are_seeded_as_if_nobody_had(monkeypatch, used):
    """As torch.manual_seed leaves them, which seeds GPUs and the CPU alike."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    seeded.clear()
    with as_found():
        torch.manual_seed(7)
        seeded.clear()
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    assert seeded == ([5] if used else [])
    assert torch.equal(torch.get_rng_state(), state)
