"""Whether the mean gradient belongs into directions from single samples: their covariance, or their second moment?

Trains a dense network and a CNN on digits at batch 128 and at 1,024, with momentum, by SGD, by NSGD from the gradients
of 32 samples every second step, and by NSGD with their mean left in. One untuned rate for all three: the loss at the
end on the training set, validation accuracy, and at three points the overlap of the first ten directions with the exact
top ten eigenvectors of the training set's Hessian. Means over paired seeds, with the worst loss.

    python benchmarks/centring.py            # five minutes; writes benchmarks/results/centring.csv
    python benchmarks/centring.py --smoke    # seconds, writes nothing
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
from common import arguments, print_table, small_cnn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_modules import Digits
from lightning_modules.support.files import write_csv
from nsgd import NSGD, sample_losses, top_eigenpairs

SAMPLES, JUDGED = 32, 10
METHODS = ("SGD", "NSGD by samples", "NSGD by samples, mean left in")


@dataclass(frozen=True)
class Case:
    """A network with its batch, rate and length."""

    net: str
    batch: int
    lr: float
    steps: int

    def build(self) -> nn.Module:
        """The network, afresh."""
        if self.net == "CNN":
            return small_cnn(1, 8, widths=(8, 16))
        layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
        return nn.Sequential(nn.Flatten(), *layers)


CASES = [
    Case(net, batch, lr, steps) for net in ("MLP", "CNN") for batch, lr, steps in ((128, 0.1, 120), (1024, 0.2, 60))
]


def with_mean() -> AbstractContextManager[Any]:
    """Inside, refreshes leave the mean gradient in."""
    return patch("nsgd.directions.refresh.centred", lambda rows, new: new)


def run(case: Case, method: str, seed: int, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """Train once."""
    x, y, held_out, labels = data
    torch.manual_seed(seed)
    model = case.build()
    params = list(model.parameters())
    options: dict[str, Any] = {"lr": case.lr, "momentum": 0.9}
    nsgd = NSGD(params, solver="gradients", refresh_every=2, **options) if method != "SGD" else None
    optimizer = torch.optim.SGD(params, **options) if nsgd is None else nsgd
    generator = torch.Generator().manual_seed(100 + seed)
    overlaps = []

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model(x), y)

    with with_mean() if method == METHODS[2] else nullcontext():
        for step in range(case.steps):
            chosen = torch.randperm(len(x), generator=generator)[: case.batch]
            optimizer.zero_grad()
            loss = loss_of(x[chosen], y[chosen])
            if nsgd is None:
                loss.backward()
            else:
                few = chosen[:SAMPLES]
                groups = sample_losses(loss_of, x[few], y[few], module=model)
                nsgd.backward(loss, curvature=groups, batch_fraction=SAMPLES / case.batch)
            optimizer.step()
            if nsgd is not None and step + 1 in (case.steps // 4, case.steps // 2, case.steps):
                exact = top_eigenpairs(loss_of(x, y), params, k=JUDGED, max_hvps=60, tol=1e-2, repeated=False)
                found = nsgd.directions(params)[:JUDGED]
                overlaps.append(float((found @ exact.eigenvectors.T).square().sum() / JUDGED))
    with torch.no_grad():
        accuracy = float((model(held_out).argmax(1) == labels).double().mean())
        result = {"loss": float(loss_of(x, y)), "accuracy": accuracy, "overlap": mean(overlaps) if overlaps else ""}
    return {"net": case.net, "batch": case.batch, "method": method, "seed": seed, **result}


def table(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Means over the seeds of each case."""
    body = []
    for net, batch, method in dict.fromkeys((row["net"], row["batch"], row["method"]) for row in rows):
        own = [row for row in rows if (row["net"], row["batch"], row["method"]) == (net, batch, method)]
        losses = [row["loss"] for row in own]
        overlap = f"{mean(row['overlap'] for row in own):.2f}" if method != "SGD" else ""
        cells = [f"{mean(losses):.3f}", f"{max(losses):.3f}", f"{100 * mean(row['accuracy'] for row in own):.1f}"]
        body.append([f"{net}, batch {int(batch):,}: {method}", *cells, overlap])
    return ("digits", "final training loss", "worst seed", "validation, %", "overlap"), body


def main() -> None:
    parser = arguments(__doc__, "centring.csv")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    digits = Digits()
    parts = [digits.splits[name] for name in ("train", "val")]
    x, held_out = (digits.normalise(part.pixels) for part in parts)
    data = (x, parts[0].labels, held_out, parts[1].labels)
    rows = []
    for case in [Case("MLP", 128, 0.1, 4)] if args.smoke else CASES:
        for method in METHODS:
            rows += [run(case, method, seed, data) for seed in range(1 if args.smoke else args.seeds)]
        if not args.smoke:
            write_csv(args.out, rows)
    print_table(*table(rows))


if __name__ == "__main__":
    main()
