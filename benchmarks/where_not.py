"""Where has the drop-in something to damp, and why does it gain nothing with BatchNorm?

Trains momentum SGD and NSGD (differences, k = 20, gamma = 0.1) on 6,000 CIFAR-10 images of 8 x 8 pixels, on three seeds
at each of a few rates; the rate with the least mean final training loss is the method's best. The first seed then runs
again at that rate, and is stopped early, halfway and at the end. There the top 20 eigenvalues of the training-mode loss
on 128 fixed training images are taken, by 40 products: the first are exact, the last somewhat low. SGD runs as NSGD
with gamma = 1, bitwise the same, so that the directions which NSGD would follow on SGD's path are known too. Noted:

- edge: lambda_1 lr / (2 (1 + momentum)). Above 1 the rate is not borne along that direction.
- felt: the same of M^(1/2) H M^(1/2), what a step damped by gamma = 0.1 along the directions still feels.
  On SGD's path it is what damping would leave.
- caught: the curvature along the directions, tr(V H V^T), over the sum of as many top eigenvalues.
- alignment: the share of the base optimizer's step, in norm, inside the directions; mean over all steps so far.
- noise: the share of a training batch's squared gradient that is not the mean gradient's, from eight batches.

Expected, written down before any of them was measured (final losses of one seed, by which the grids were chosen, were
known for the network of dense layers and the lowest two rates with BatchNorm):

| case | edge of SGD, late | caught | noise | NSGD's final loss over SGD's |
| --- | --- | --- | --- | --- |
| ResNet-32 without BatchNorm | 0.7 to 1.3 | 0.5 to 0.8 | 0.5 | 0.85 to 0.95 |
| ResNet-20 with BatchNorm | below 0.5 | 0.3 to 0.5 | 0.7 | 0.97 to 1.05 |
| 12 dense layers | 0.7 to 1.3 | 0.6 to 0.8 | 0.6 | 0.93 |
| ResNet-32 without BatchNorm, batch 32 | 0.2 to 0.5 | 0.5 | 0.9 | 0.97 to 1.03 |

    python benchmarks/where_not.py --data PATH_OR_HUB_NAME    # 15 minutes; writes benchmarks/results/where_not.csv
    python benchmarks/where_not.py --smoke                    # seconds, on digits, writes nothing

Interrupted, the same command goes on after the last finished run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from common import Data, add_data, arguments, print_table
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_modules import Digits, HuggingFace
from lightning_modules.models.nets.named import make_net
from lightning_modules.support.files import read_csv, write_csv
from nsgd import NSGD, sample_losses, top_eigenpairs
from nsgd.curvature.hessian import loss_hessian
from nsgd.trajectory.sharpness import damped_sharpness, stability_limit

MOMENTUM, GAMMA, TOP = 0.9, 0.1, 20
SAMPLE, JUDGED, TESTED = 128, 2048, 2000  # images for curvature, training loss and accuracy
PRODUCTS = 40  # of Lanczos

SGD, DROP_IN = "SGD", "NSGD"
METHODS: dict[str, dict[str, Any]] = {
    SGD: {"gamma": 1.0},
    DROP_IN: {},
    "NSGD by samples, statistics frozen": {"solver": "gradients", "refresh_every": 1},
    "NSGD by products": {"solver": "lanczos", "k": 10, "refresh_every": 20},
    "NSGD, gamma 0.3": {"gamma": 0.3},
}


@dataclass(frozen=True)
class Case:
    """A network, a batch size, how long it is trained, and the rates that each method is tried at."""

    name: str
    net: str
    batch: int
    steps: int
    rates: dict[str, tuple[float, ...]]
    sizes: dict[str, Any] = field(default_factory=dict)


Row = dict[str, Any]


def marks(steps: int) -> tuple[int, ...]:
    """The steps after which a path is looked at: early, halfway, last."""
    return (max(2, steps // 8), steps // 2, steps)


def curvature(
    loss: Tensor, params: Sequence[Tensor], directions: Tensor, *, lr: float, k: int = TOP, momentum: float = MOMENTUM
) -> Row:
    """What the directions (r, P) leave and catch of a loss's top k eigenvalues, at a rate."""
    limit = stability_limit(lr=lr, momentum=momentum)
    with loss_hessian(loss, params) as hessian:
        pairs = top_eigenpairs(
            hessian.hvp, params, k=k, start=hessian.gradient, max_hvps=max(k, PRODUCTS), tol=1e-2, repeated=False
        )
        inside = sum(float(row @ hessian.hvp(row)) for row in directions)
        felt = damped_sharpness(hessian.hvp, params, directions, gamma=GAMMA, max_hvps=25, tol=1e-2)
    values = pairs.eigenvalues.tolist()
    found: Row = {f"lambda_{i + 1}": value for i, value in enumerate(values)}
    return {
        "edge": values[0] / limit,
        "felt": float(felt.eigenvalues[0]) / limit,
        "caught": inside / sum(values[: len(directions)]) if len(directions) else 0.0,
        **found,
    }


def noise(gradients: Tensor) -> float:
    """The share of a batch's squared gradient that is noise, from gradients of several batches (n, P).

    Products of different batches estimate the mean gradient's square without a bias.
    """
    products = (gradients @ gradients.T).double()
    own = products.diagonal().sum()
    count = len(gradients)
    return float(1 - (products.sum() - own) / (count - 1) / own)


class Run:
    """One training run of a case by a method."""

    def __init__(self, data: Data, case: Case, method: str, lr: float, seed: int) -> None:
        self.data, self.case, self.lr = data, case, lr
        torch.manual_seed(seed)
        self.model = make_net(case.net, data.images.shape[1:], 10, case.sizes)
        self.params = list(self.model.parameters())
        options = {"solver": "differences", "k": TOP, "gamma": GAMMA, **METHODS[method]}
        self.optimizer = NSGD(self.params, lr=lr, momentum=MOMENTUM, **options)
        self.solver = options["solver"]
        self.order = torch.Generator().manual_seed(seed)
        self.alignments: list[float] = []

    def loss_of(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean loss, in the mode that the network is in."""
        return cross_entropy(self.model(x), y)

    def frozen(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean loss by the running statistics, so that BatchNorm is linear."""
        self.model.eval()
        try:
            return self.loss_of(x, y)
        finally:
            self.model.train()

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images drawn without replacement; channels last takes two thirds of the time."""
        chosen = torch.randperm(len(self.data.labels), generator=generator)[: self.case.batch]
        return self.data.images[chosen].contiguous(memory_format=torch.channels_last), self.data.labels[chosen]

    def train(self) -> Iterator[int]:
        """Each step, when it is taken; ends where the loss is not finite."""
        for step in range(1, self.case.steps + 1):
            x, y = self.batch(self.order)
            self.optimizer.zero_grad()
            loss = self.loss_of(x, y)
            if self.solver == "gradients":
                groups = sample_losses(self.frozen, x[:32], y[:32], module=self.model)
                self.optimizer.backward(loss, curvature=groups, batch_fraction=32 / self.case.batch)
            elif self.solver == "lanczos":
                self.optimizer.backward(loss, curvature=lambda x=x, y=y: self.loss_of(x[:128], y[:128]))
            else:
                loss.backward()
            self.optimizer.step()
            if not loss.isfinite():
                return
            if self.optimizer.alignment >= 0:  # NaN before the first directions
                self.alignments.append(self.optimizer.alignment)
            yield step

    def result(self) -> Row:
        """Final training-mode loss and test accuracy."""
        failed = {"train_loss": math.inf, "test_accuracy": 0.1}
        if sum(1 for _ in self.train()) < self.case.steps:
            return failed
        with torch.no_grad():
            self.model.eval()
            guess = self.model(self.data.val_images).argmax(1)
            self.model.train()
            loss = float(self.loss_of(self.data.images[:JUDGED], self.data.labels[:JUDGED]))
        if not math.isfinite(loss):
            return failed
        accuracy = float((guess == self.data.val_labels).double().mean())
        return {"train_loss": loss, "test_accuracy": accuracy}

    def points(self) -> Iterator[Row]:
        """What is measured along the path."""
        for step in self.train():
            if step in marks(self.case.steps):
                yield {"step": step, "alignment": mean(self.alignments), **self.point()}

    def point(self) -> Row:
        """Curvature and noise where the run is now; it goes on as if nothing had been."""
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        loss = self.loss_of(self.data.images[-SAMPLE:], self.data.labels[-SAMPLE:])
        found = curvature(loss, self.params, self.optimizer.directions(self.params), lr=self.lr)
        other = torch.Generator().manual_seed(0)
        gradients = []
        for _ in range(8):
            gradient = torch.autograd.grad(self.loss_of(*self.batch(other)), self.params)
            gradients.append(torch.cat([part.flatten() for part in gradient]))
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        return {**found, "noise": noise(torch.stack(gradients))}


def compare(data: Data, case: Case, method: str, seeds: int, rows: list[Row]) -> Iterator[None]:
    """Add what is missing of a method: runs at every rate, and the path of its best rate; comes back after each."""
    own = {"case": case.name, "method": method}

    def has(row: Row, key: Row) -> bool:
        return all(row[name] == value for name, value in key.items())

    for lr in case.rates[method]:
        for seed in range(seeds):
            key = {**own, "lr": lr, "seed": seed, "step": case.steps}
            if not any("train_loss" in row and has(row, key) for row in rows):
                rows.append({**key, **Run(data, case, method, lr, seed).result()})
                print(*key.values(), f"loss {rows[-1]['train_loss']:.3f}", flush=True)
                yield
    lr = best_rate([row for row in rows if has(row, own)])
    if not any("edge" in row and has(row, {**own, "lr": lr}) for row in rows):
        rows[:] = [row for row in rows if not ("edge" in row and has(row, own))]  # another rate was the best
        for point in Run(data, case, method, lr, 0).points():
            rows.append({**own, "lr": lr, "seed": 0, **point})
            print(*(f"{name} {point[name]:.2f}" for name in ("step", *MEASURED)), flush=True)
        yield


def best_rate(rows: list[Row]) -> float:
    """The rate of the least mean final training loss."""
    losses: dict[float, list[float]] = {}
    for row in rows:
        if "train_loss" in row:
            losses.setdefault(row["lr"], []).append(row["train_loss"])
    return min(losses, key=lambda lr: mean(losses[lr]))


MEASURED = ("edge", "felt", "caught", "alignment", "noise")
HEADER = ("case: method", "lr", "rates", "training loss", "test, %", *MEASURED, "lambda_1 / lambda_10")


def table(rows: list[Row]) -> tuple[tuple[str, ...], list[list[str]]]:
    """The best rate of each method: means over seeds, and what was measured of the first, early / halfway / late."""
    body = []
    for case, method in dict.fromkeys((row["case"], row["method"]) for row in rows):
        own = [row for row in rows if (row["case"], row["method"]) == (case, method)]
        runs = [row for row in own if "train_loss" in row]
        points = [row for row in own if "edge" in row]
        rates, lr = sorted({row["lr"] for row in runs}), best_rate(runs)
        best = [row for row in runs if row["lr"] == lr]
        cells = [f"{lr:g}", f"{rates[0]:g} to {rates[-1]:g}" if len(rates) > 1 else f"{lr:g}"]
        cells += [f"{mean(row['train_loss'] for row in best):.3f}"]
        cells += [f"{100 * mean(row['test_accuracy'] for row in best):.1f}"]
        cells += [" / ".join(f"{row[name]:.2f}" for row in points) for name in MEASURED]
        cells += [" / ".join(f"{row['lambda_1'] / row['lambda_10']:.1f}" for row in points)]
        body.append([f"{case}: {method}", *cells])
    return HEADER, body


def both(*rates: float) -> dict[str, tuple[float, ...]]:
    """Both methods at the same rates."""
    return {SGD: rates, DROP_IN: rates}


BATCH_NORM = "ResNet-20 with BatchNorm, batch 128"
VARIANTS = dict.fromkeys(list(METHODS)[2:], (0.05,))  # paired with SGD and the drop-in at the same rate
CASES = (
    Case(BATCH_NORM, "resnet-20", 128, 100, both(0.0125, 0.025, 0.05, 0.1)),
    Case("12 dense layers, batch 256", "mlp", 256, 400, both(0.05, 0.1, 0.2), {"hidden": [32] * 11}),
    Case("ResNet-32 without BatchNorm, batch 128", "resnet-32-plain", 128, 80, both(0.2, 0.4)),
    Case(BATCH_NORM, "resnet-20", 128, 100, VARIANTS),
    Case("ResNet-32 without BatchNorm, batch 32", "resnet-32-plain", 32, 120, both(0.05, 0.1)),
)
SMOKE = Case("smoke", "resnet-20", 32, 4, both(0.1) | VARIANTS, {"depth": 8, "widths": [4, 4, 4]})


def load(args: Any) -> Data:
    """Training images, and some of the test images; digits for a smoke run."""
    data = Digits() if args.smoke else HuggingFace(args.data, limit=7_000, val_fraction=1 / 7, side=8)
    train, test = data.splits["train"], data.splits["test"]
    return Data(data.normalise(train.pixels), train.labels, data.normalise(test.pixels[:TESTED]), test.labels[:TESTED])


def main() -> None:
    parser = arguments(__doc__, "where_not.csv")
    add_data(parser)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load(args)
    rows: list[Row] = read_csv(args.out) if args.out.exists() and not args.smoke else []
    for case in (SMOKE,) if args.smoke else CASES:
        for method in case.rates:
            for _ in compare(data, case, method, 1 if args.smoke else args.seeds, rows):
                if not args.smoke:
                    write_csv(args.out, rows)
    print_table(*table(rows))


if __name__ == "__main__":
    main()
