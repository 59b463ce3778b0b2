"""How much to damp: a constant gamma, gamma = 0, or a cap on each direction's step, and along how many directions?

Trains a CNN of 25,578 parameters on 6,000 CIFAR-10 images at batch 512, with and without momentum. The learning rate
of every rule is tuned on one grid by the final training loss of a seed of its own; then every rule runs on paired
seeds. The cap is gamma_i = min(1, c / (lr lambda_i)), with the weights of the directions for lambda_i.

    python benchmarks/damping_rule.py --data PATH_OR_HUB_NAME    # an hour; writes benchmarks/results/damping_rule.csv
    python benchmarks/damping_rule.py --smoke                    # seconds, on digits, writes nothing

Interrupted, the same command goes on after the last finished run.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from common import add_data, arguments, load, print_table
from common.training import TUNING_SEEDS, Case, Make, Method, Row, Runs, by_seed, final_loss
from torch import Tensor

from nsgd import NSGD

GRIDS = {0.9: (0.1, 0.2, 0.4), 0.0: (0.1, 0.2, 0.4, 0.8)}  # by momentum


class Capped(NSGD):
    """NSGD with a cap on lr * lambda_i along each direction in place of a constant factor."""

    def __init__(self, *args: Any, cap: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cap = cap

    def _gammas(self, gamma: float, coefficients: Tensor) -> Tensor:
        weights = torch.tensor(self.weights).to(coefficients)
        return (self.cap / (self.param_groups[0]["lr"] * weights.clamp(min=1e-12))).clamp(max=1)


def rules(momentum: float) -> dict[str, Make]:
    """The optimizers that are compared, by name."""
    constant = {f"gamma = {gamma:g}": {"gamma": gamma} for gamma in (0.3, 0.1, 0.0)}
    ranks = {f"gamma = 0.1, k = {k}": {"k": k} for k in (10, 40) if momentum > 0}

    def nsgd(options: dict[str, Any]) -> Make:
        return lambda params, lr: NSGD(params, lr=lr, momentum=momentum, solver="gradients", **options)

    def capped(cap: float) -> Make:
        return lambda params, lr: Capped(params, lr=lr, momentum=momentum, cap=cap, solver="gradients")

    return {
        "SGD": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=momentum),
        **{name: nsgd(options) for name, options in (constant | ranks).items()},
        **{f"cap c = {c:g}": capped(c) for c in (0.1, 0.5)},
    }


def main() -> None:
    parser = arguments(__doc__, "damping_rule.csv")
    add_data(parser)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load(args, limit=6_000, val=2_000)
    seeds = 1 if args.smoke else args.seeds
    runs = Runs(None if args.smoke else args.out, data, {})
    for momentum, grid in GRIDS.items():
        runs.methods = {f"{name}, momentum {momentum:g}": Method(make) for name, make in rules(momentum).items()}
        case = Case("CNN", 256, 1, 4) if args.smoke else Case("CNN", 512, 8, 8, images=6_000)
        rates = tuned(runs, case, grid[1:2] if args.smoke else grid)
        for seed in range(seeds):
            runs.get(case, rates, seed)
    print()
    print_table(*table(runs.rows))


def tuned(runs: Runs, case: Case, grid: tuple[float, ...]) -> dict[str, float]:
    """For each method the rate of the grid with the least final training loss on the first tuning seed."""
    losses: dict[str, dict[float, float]] = {method: {} for method in runs.methods}
    for lr in grid:
        for method, rows in runs.get(case, dict.fromkeys(runs.methods, lr), TUNING_SEEDS[0]).items():
            losses[method][lr] = final_loss(rows)
    return {method: min(found, key=found.__getitem__) for method, found in losses.items()}


def table(rows: list[Row]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Means over seeds."""
    body = []
    for case, method in dict.fromkeys((row["case"], row["method"]) for row in rows):
        runs = list(by_seed(rows, case, method).values())
        if not runs:
            continue  # tuned, not run yet
        losses = [final_loss(run) for run in runs]
        accuracy = mean(max(row["val_accuracy"] for row in run) for run in runs)
        jumps = sum(run[-1]["jumps"] > 0 for run in runs)
        counts = [f"{mean(losses):.3f}", f"{max(losses):.3f}", f"{100 * accuracy:.1f}", f"{jumps} of {len(runs)}"]
        body.append([method, f"{runs[0][0]['lr']:g}", *counts])
    return ("rule", "lr", "final training loss", "worst seed", "best validation, %", "runs with a jump"), body


if __name__ == "__main__":
    main()
