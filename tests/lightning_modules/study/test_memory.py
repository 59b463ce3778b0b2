"""What an optimizer holds between steps, against counts of its buffers by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from studies import finished
from torch import nn

from lightning_modules.report.study.files import read_folder
from lightning_modules.report.study.tables import main_tables
from lightning_modules.study.runs.memory import held_share
from lightning_modules.support.files import read_csv
from nsgd import NSGD, damp
from nsgd.directions.differences import ROWS

SIZE = 10 * 20 + 20


def stepped(make: Any, steps: int = 3) -> torch.optim.Optimizer:
    module = nn.Linear(10, 20)
    optimizer: torch.optim.Optimizer = make(module.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(5, 10)).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("make", "share"),
    [
        (lambda params: torch.optim.SGD(params, lr=0.1), 0.0),
        (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), 1.0),
        (lambda params: torch.optim.AdamW(params), 2 + 2 / SIZE),  # and a count of steps for each of two tensors
        (lambda params: torch.optim.SGD([{"params": [p]} for p in params], lr=0.1, momentum=0.9), 1.0),
    ],
)
def test_buffers_count_once_and_parameters_and_gradients_do_not(make, share):
    assert held_share([stepped(make)]) == pytest.approx(share)


def test_a_basis_and_its_differences_count_as_they_lie_in_memory():
    """Two directions more are two copies of the parameters; in bfloat16 basis and rows take half."""
    shares = {}
    for k, dtype in ((2, None), (4, None), (4, torch.bfloat16)):
        optimizer = stepped(lambda params, k=k, dtype=dtype: NSGD(params, lr=0.1, k=k, basis_dtype=dtype), steps=40)
        shares[k, dtype] = held_share([optimizer])
    assert shares[4, None] - shares[2, None] == pytest.approx(2, abs=0.4)
    assert shares[4, None] - shares[4, torch.bfloat16] == pytest.approx((4 + ROWS) / 2, abs=0.4)
    assert held_share([stepped(lambda params: damp(torch.optim.AdamW(params), k=2), steps=40)]) > 2 + 2


def test_a_run_says_what_its_optimizer_holds_and_the_page_too(tmp_path):
    folder = finished(tmp_path, methods=["sgd-momentum", "adamw"], seeds=1, epochs=1, lr=None)
    found = {row["method"]: row["state"] for row in read_csv(folder / "results.csv")}
    assert found["sgd-momentum"] == 1
    assert found["adamw"] == pytest.approx(2, abs=0.01)
    costs = next(table for table in main_tables(read_folder(folder)) if table["title"].startswith("Cost of a run"))
    assert costs["header"][-1] == "optimizer's state / parameters"
    assert [row[-1] for row in costs["rows"]] == ["1", "2"]
