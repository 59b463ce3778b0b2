"""How many gradients, and how many seconds, to the training loss at which tuned SGD with momentum ends?

Trains a CNN of 25,578 parameters on 12,000 CIFAR-10 images, and a ResNet-32 without BatchNorm on 6,000 of them at
16 x 16 pixels, at batch 128 and at 1,024. The learning rate of every method is tuned on one grid by the final training
loss on a seed of its own, and for the ResNet a second such seed decides between the best three, since some diverge on
one seed only; then every method runs on five paired seeds. The targets are, seed by seed, the final training loss and
the best validation accuracy of tuned SGD with momentum. A gradient is one forward and backward pass on a training
batch; refreshes are counted in, evaluation is not. Seconds are the processor's, so that what else runs on the machine
does not count as waiting.

    python benchmarks/time_to_target.py --data PATH_OR_HUB_NAME    # hours; writes benchmarks/results/time_to_target.csv
    python benchmarks/time_to_target.py --smoke                    # seconds, on digits, writes nothing

Interrupted, the same command goes on after the last finished run.
"""

from __future__ import annotations

import math
from itertools import product
from statistics import median

import torch
from common import add_data, arguments, load, print_table
from common.training import RESNET, Case, Make, Row, Runs, by_seed, final_loss

from nsgd import NSGD

METHODS: dict[str, Make] = {
    "SGD": lambda params, lr: torch.optim.SGD(params, lr=lr),
    "SGD, momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "NSGD, momentum": lambda params, lr: NSGD(params, lr=lr, momentum=0.9),
    "NSGD by samples, momentum": lambda params, lr: NSGD(params, lr=lr, momentum=0.9, solver="gradients"),
}
GRID = (0.02, 0.05, 0.1, 0.2, 0.4)
CASES = (
    Case("CNN", 128, 6, 4, GRID),
    Case("CNN", 1024, 16, 2, GRID),
    Case(RESNET, 128, 5, 2, (*GRID, 0.8, 1.6), images=6_000, side=16, finalists=3),
    Case(RESNET, 1024, 12, 1, (*GRID, 0.8, 1.6), images=6_000, side=16, finalists=3),
)


def reached(rows: list[Row], axis: str, measure: str, target: float) -> float:
    """Where a run first meets a target, on an axis; infinity where it does not."""
    sign = 1 if measure == "val_accuracy" else -1
    return next((float(row[axis]) for row in rows if sign * float(row[measure]) >= sign * target), math.inf)


def main() -> None:
    parser = arguments(__doc__, "time_to_target.csv")
    add_data(parser)
    parser.add_argument("--seeds", type=int, default=5)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="default: all, one after the other")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load(args, limit=12_000, val=2_000)
    cases = (Case("CNN", 64, 1, 4, GRID[2:4]),) if args.smoke else [case for case in CASES if case.name in args.cases]
    seeds = 2 if args.smoke else args.seeds
    runs = Runs(None if args.smoke else args.out, data, METHODS)
    for case in cases:
        rates = runs.tuned(case)
        for seed in range(seeds):
            runs.get(case, rates, seed)
    print()
    print_table(*table(runs.rows))


HEADER = (
    *("case, method", "lr", "final training loss", "best validation, %", "gradients a step", "seconds a step"),
    *(
        "gradients to its loss",
        "seconds to its loss",
        "reached",
        "gradients to its accuracy",
        "reached",
        "runs with a jump",
    ),
)


def table(rows: list[Row]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Medians over seeds; gradients and seconds as a multiple of those of tuned SGD with momentum, in all."""
    body = []
    cases = dict.fromkeys(row["case"] for row in rows)
    for case, method in product(cases, METHODS):
        runs, base = by_seed(rows, case, method), by_seed(rows, case, "SGD, momentum")
        if not runs:
            continue  # tuned, not run yet
        pairs = [(runs[seed], base[seed]) for seed in runs]
        by_loss = {
            axis: [reached(own, axis, "train_loss", final_loss(sgd)) / sgd[-1][axis] for own, sgd in pairs]
            for axis in ("gradients", "seconds")
        }
        by_accuracy = [
            reached(own, "gradients", "val_accuracy", best) / reached(sgd, "gradients", "val_accuracy", best)
            for own, sgd in pairs
            for best in [max(row["val_accuracy"] for row in sgd)]
        ]
        body.append(
            [
                f"{case}: {method}",
                f"{next(iter(runs.values()))[0]['lr']:g}",
                f"{median(final_loss(run) for run in runs.values()):.3f}",
                f"{100 * median(max(row['val_accuracy'] for row in run) for run in runs.values()):.1f}",
                *(
                    f"{median(own[-1][axis] / sgd[-1][axis] for own, sgd in pairs):.2f}"
                    for axis in ("gradients", "seconds")
                ),
                *(_ratio(by_loss[axis]) for axis in ("gradients", "seconds")),
                _count(by_loss["gradients"]),
                _ratio(by_accuracy),
                _count(by_accuracy),
                f"{sum(run[-1]['jumps'] > 0 for run in runs.values())} of {len(runs)}",
            ]
        )
    return HEADER, body


def _ratio(values: list[float]) -> str:
    middle = median(values)
    return f"{middle:.2f}" if math.isfinite(middle) else "not reached"


def _count(values: list[float]) -> str:
    return f"{sum(math.isfinite(v) for v in values)} of {len(values)}"


if __name__ == "__main__":
    main()
