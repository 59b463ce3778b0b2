"""What an optimizer prints: torch's own groups, and what a user chose of the damping."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nsgd import NSGD, damp


def params(count: int = 1) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(30)) for _ in range(count)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "every option at its default"),
        ({"k": 20, "gamma": 0.1}, "every option at its default"),
        ({"k": 10, "gamma": 0.3}, "k=10, gamma=0.3"),
        ({"solver": "lanczos", "refresh_every": 50}, "refresh_every=50, solver='lanczos'"),
        ({"basis_dtype": torch.bfloat16, "bulk_scale": 0.5}, "bulk_scale=0.5, basis_dtype=torch.bfloat16"),
    ],
)
def test_the_groups_are_torchs_and_the_options_those_that_were_set(options, said):
    plain = repr(torch.optim.SGD(params(), lr=0.2, momentum=0.9)).splitlines()
    found = repr(NSGD(params(), lr=0.2, momentum=0.9, **options)).splitlines()
    assert found[0] == "NSGD ("
    assert found[1 : len(plain) - 1] == plain[1:-1]
    assert found[len(plain) - 1 :] == ["Damping", f"    {said}", ")"]


def test_a_group_says_what_it_has_of_its_own():
    first, second = params(2)
    groups = [{"params": [first], "gamma": 0.5}, {"params": [second], "curvature": False}]
    one, other = repr(NSGD(groups, lr=0.2, gamma=0.3)).split("Parameter Group 1")
    assert "    gamma: 0.5\n" in one
    assert "curvature" not in one
    assert "    curvature: False\n" in other
    assert "gamma: " not in other
    assert "    gamma=0.3\n)" in other


def test_any_damped_optimizer_prints_so():
    damped = damp(torch.optim.AdamW(params(), lr=0.01), k=5)
    assert repr(damped).endswith("    weight_decay: 0.01\nDamping\n    k=5\n)")
