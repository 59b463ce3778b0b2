"""Does a factor that follows each direction's weight beat a constant gamma, and a basis for each parameter one for all?

Trains the CNN of 10,218 parameters and the ResNet-32 without BatchNorm of benchmarks/time_to_target.py at batch 1,024,
with momentum 0.9, directions from differences or from 8 micro-batches. The root rule has the factor sqrt(w_k / w_i) on
direction i, with w the weights and k directions, in place of gamma = 0.1: what full-matrix Adagrad would do along them,
relative to the flattest. A basis for each parameter has 20 directions, or as many as it has entries. Every rate is
tuned by the rule of time_to_target.py, on three seeds; then each runs on paired seeds.

    python benchmarks/rule_and_blocks.py --data NAME    # an hour a case; writes benchmarks/results/rule_and_blocks.csv
    python benchmarks/rule_and_blocks.py --smoke        # seconds, on digits, writes nothing

Interrupted, the same command goes on after the last finished run.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from statistics import median
from typing import Any

import torch
from common import add_data, arguments, load, print_table
from common.training import RESNET, Case, Method, Row, Runs, by_seed, final_loss
from torch import Tensor

from nsgd import NSGD

BASE = "SGD"
CASES = (Case("CNN", 1024, 16, side=16), Case(RESNET, 1024, 12, images=6_000, side=8))


class Root(NSGD):
    """NSGD with the factor sqrt(w_k / w_i) along direction i, w_k the least of its weights."""

    def _gammas(self, gamma: float, coefficients: Tensor) -> Tensor:
        weights = self._directions.weights.to(coefficients)
        least = torch.where(weights > 0, weights, torch.inf).min()
        return torch.where(weights > 0, (least / weights).sqrt(), 1.0)


class PerParameter:
    """An optimizer for each parameter, so that each has a basis of its own."""

    def __init__(self, kind: type[NSGD], params: Iterable[Tensor], lr: float) -> None:
        self.parts = [kind([p], lr=lr, momentum=0.9, k=min(20, p.numel())) for p in params]
        self.param_groups: list[dict[str, Any]] = [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        """Forget the last gradients."""
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        """Take a step with each."""
        for part in self.parts:
            part.step()


def methods() -> dict[str, Method]:
    """All that are compared, by name."""
    found = {BASE: Method(lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9))}
    directions = {"differences": 1, "8 micro-batches": 8}
    rules: dict[str, type[NSGD]] = {"gamma = 0.1": NSGD, "root": Root}
    for (source, passes), (rule, kind), alone in product(directions.items(), rules.items(), (False, True)):
        name = f"{source}, {rule}, {'a basis for each parameter' if alone else 'one basis'}"

        def make(params: Iterable[Tensor], lr: float, kind: type[NSGD] = kind, alone: bool = alone) -> Any:
            return PerParameter(kind, params, lr) if alone else kind(params, lr=lr, momentum=0.9)

        found[name] = Method(make, start=0.2, micro_batches=passes)
    return found


def main() -> None:
    parser = arguments(__doc__, "rule_and_blocks.csv")
    add_data(parser)
    parser.add_argument("--seeds", type=int, default=5)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="default: all, one after the other")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load(args, limit=12_000, val=2_000)
    runs = Runs(None if args.smoke else args.out, data, methods())
    if args.smoke:
        runs.get(Case("CNN", 64, 1, evaluations=4), {name: method.start for name, method in methods().items()}, 0)
    for case in () if args.smoke else [case for case in CASES if case.name in args.cases]:
        rates = {name: runs.tuned(case, name) for name in runs.methods}
        for seed in range(args.seeds):
            runs.get(case, rates, seed)
    print()
    print_table(*table(runs.rows))


def table(rows: list[Row]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Medians over seeds, and the final loss as a ratio to that of the first rule on the same seed."""
    body = []
    for case, method in product(dict.fromkeys(row["case"] for row in rows), methods()):
        runs, paper = by_seed(rows, case, method), by_seed(rows, case, next(m for m in methods() if m != BASE))
        if not runs:
            continue  # tuned, not run yet
        losses = {seed: final_loss(run) for seed, run in runs.items()}
        ratios = [loss / final_loss(paper[seed]) for seed, loss in losses.items() if seed in paper]
        accuracy = median(max(row["val_accuracy"] for row in run) for run in runs.values())
        jumps = sum(run[-1]["jumps"] > 0 for run in runs.values())
        body.append(
            [
                f"{case}: {method}",
                f"{next(iter(runs.values()))[0]['lr']:g}",
                f"{median(losses.values()):.3f}",
                f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "",
                f"{100 * accuracy:.1f}",
                f"{jumps} of {len(runs)}",
            ]
        )
    header = ("case, directions, rule", "lr", "final training loss", "to the first, and range", "best validation, %")
    return (*header, "runs with a jump"), body


if __name__ == "__main__":
    main()
