"""How many gradients, and how many seconds, to the training loss at which tuned SGD with momentum ends?

Trains a CNN of 10,218 parameters on 12,000 CIFAR-10 images of 16 x 16 pixels, and a ResNet-32 without BatchNorm on
6,000 of 8 x 8, at batch 1,024 and at 128, with a constant learning rate and with a cosine schedule. Every method's rate
is tuned by one rule: on a grid in steps of the square root of 2, by the mean of the final training loss over three
seeds of their own, where a run that diverged counts as infinite and the best has a neighbour on either side. To spend
little, the first of these seeds encloses the best by factors of 2, then of the square root of 2; all three decide
between it and its neighbours. Then every method runs on five paired seeds, fewer in some cases, as the table counts.

The target is, seed by seed, the final training loss of tuned SGD with momentum, the mean of its last three evaluations
of 30 or more. Gradients and seconds to it are given as a share of all that momentum SGD takes, and of what it takes to
its own first passage of that loss. A gradient is one forward and backward pass on a training batch; refreshes are
counted in, evaluation is not. Seconds are the processor's, so that what else runs on the machine does not count as
waiting; the methods of a case take turns, evaluation by evaluation. No method has weight decay.

    export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=1000000000
    python benchmarks/time_to_target.py --data PATH_OR_HUB_NAME    # hours; writes benchmarks/results/time_to_target.csv
    python benchmarks/time_to_target.py --smoke                    # seconds, on digits, writes nothing

The first line keeps memory between steps: without it the system clears every large tensor anew, for half of the time.
Interrupted, the same command goes on after the last finished run; --cases and --methods do a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from statistics import median
from typing import Any

import torch
from common import add_data, arguments, load, print_table
from common.training import RESNET, Case, Method, Row, Runs, by_seed, final_loss
from torch import Tensor

from nsgd import NSGD

BASE = "SGD, momentum"


class Muon:
    """Muon on matrices and on kernels flattened to matrices, AdamW on biases; one rate, as Muon's steps are scaled."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        params = list(params)
        self.pairs = [(p, p.detach().flatten(1)) for p in params if p.dim() > 1]  # views: a step moves the parameter
        others = [p for p in params if p.dim() <= 1]
        matrices = [matrix for _, matrix in self.pairs]
        self.parts = (
            torch.optim.Muon(matrices, lr=lr, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, weight_decay=0),
        )
        self.param_groups: list[dict[str, Any]] = [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        """Forget the last gradients."""
        for p, _ in self.pairs:
            p.grad = None
        self.parts[1].zero_grad()

    def step(self) -> None:
        """Take a step with both."""
        for p, matrix in self.pairs:
            matrix.grad = None if p.grad is None else p.grad.flatten(1)
        for part in self.parts:
            part.step()


def momentum_sgd(params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def nsgd(params: Iterable[Tensor], lr: float) -> NSGD:
    return NSGD(params, lr=lr, momentum=0.9)


METHODS = {
    "SGD": Method(lambda params, lr: torch.optim.SGD(params, lr=lr), start=0.2),
    BASE: Method(momentum_sgd),
    "SGD, momentum, clipped": Method(momentum_sgd, clip=1.0),
    "AdamW": Method(lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0), start=0.004),
    "Muon": Method(Muon, start=0.008),
    "NSGD, momentum": Method(nsgd),
    "NSGD, momentum, 8 micro-batches": Method(nsgd, micro_batches=8),
    "NSGD by samples, momentum": Method(
        lambda params, lr: NSGD(params, lr=lr, momentum=0.9, solver="gradients"), start=0.2
    ),
}
CONSTANT = (
    Case("CNN", 1024, 16, side=16),
    Case("CNN", 128, 6, side=16),
    Case(RESNET, 1024, 12, images=6_000, side=8),
    Case(RESNET, 128, 5, images=6_000, side=8),
)
CASES = [replace(case, schedule=schedule) for case in CONSTANT for schedule in ("constant", "cosine")]


def reached(rows: list[Row], axis: str, target: float) -> float:
    """Where a run first meets a training loss, on an axis; infinity where it does not."""
    return next((float(row[axis]) for row in rows if row["train_loss"] <= target), math.inf)


def main() -> None:
    parser = arguments(__doc__, "time_to_target.csv")
    add_data(parser)
    parser.add_argument("--seeds", type=int, default=5, help="0 tunes only")
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="default: all, one after the other")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load(args, limit=12_000, val=2_000)
    runs = Runs(None if args.smoke else args.out, data, METHODS)
    if args.smoke:
        smoke = Case("CNN", 64, 1, evaluations=4, schedule="cosine")
        for seed in range(2):
            runs.get(smoke, {name: method.start for name, method in METHODS.items()}, seed)
        runs.tuned(replace(smoke, schedule="constant"), BASE)
    for case in () if args.smoke else [case for case in CASES if case.name in args.cases]:
        rates = {method: runs.tuned(case, method) for method in args.methods}
        for seed in range(args.seeds):
            runs.get(case, rates, seed)
    print()
    print_table(*table(runs.rows))


HEADER = (
    *("case, method", "lr", "final training loss", "validation, %", "a step: gradients / seconds"),
    *("to SGD's loss: gradients / seconds", "the same, of SGD's first passage", "reached", "runs with a jump"),
)


def table(rows: list[Row]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Medians over seeds; gradients and seconds as a multiple of those of tuned SGD with momentum.

    Validation accuracy is the mean of the last three evaluations, as the final training loss is.
    """
    body = []
    cases = dict.fromkeys(row["case"] for row in rows)
    for case, method in product(cases, METHODS):
        base = by_seed(rows, case, BASE)
        runs = {seed: run for seed, run in by_seed(rows, case, method).items() if seed in base}
        if not runs:
            continue  # tuned, not run yet
        pairs = [(own, base[seed]) for seed, own in runs.items()]
        in_all, from_passage, a_step = [], [], []
        for axis in ("gradients", "seconds"):
            found = [(reached(own, axis, final_loss(sgd)), sgd) for own, sgd in pairs]
            in_all.append([at / sgd[-1][axis] for at, sgd in found])
            from_passage.append([at / reached(sgd, axis, final_loss(sgd)) for at, sgd in found])
            a_step.append([own[-1][axis] / own[-1]["step"] * sgd[-1]["step"] / sgd[-1][axis] for own, sgd in pairs])
        accuracies = [sum(row["val_accuracy"] for row in run[-3:]) / len(run[-3:]) for run in runs.values()]
        body.append(
            [
                f"{case}: {method}",
                f"{next(iter(runs.values()))[0]['lr']:g}",
                f"{median(final_loss(run) for run in runs.values()):.3f}",
                f"{100 * median(accuracies):.1f}",
                *(_both(values) for values in (a_step, in_all, from_passage)),
                _count([math.isfinite(value) for value in in_all[0]]),
                _count([run[-1]["jumps"] > 0 for run in runs.values()]),
            ]
        )
    return HEADER, body


def _both(axes: list[list[float]]) -> str:
    """The median on each axis."""
    middles = [median(values) for values in axes]
    return " / ".join(f"{middle:.2f}" for middle in middles) if math.isfinite(max(middles)) else "not reached"


def _count(runs: list[bool]) -> str:
    return f"{sum(runs)} of {len(runs)}"


if __name__ == "__main__":
    main()
