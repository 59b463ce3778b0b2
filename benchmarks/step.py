"""What a damped step costs between refreshes, as a share of a training iteration.

Whole iterations (zero_grad, forward, backward, step) of NSGD with directions of rank k against
``torch.optim.SGD(foreach=True)``, in turn in one process: medians and their ratio. First on a SimpleCNN, then on dense
layers of 10^5 to 10^8 parameters. Reads of the device by the host are counted in one profiled step.

    python benchmarks/step.py            # minutes; writes benchmarks/results/step.csv
    python benchmarks/step.py --smoke    # seconds, writes nothing
"""

from __future__ import annotations

import math
from typing import Any

import torch
from common import arguments, print_table, seconds
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import profile

from lightning_modules.nets import make_net
from lightning_modules.rows import write_csv
from nsgd import NSGD

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANKS = (1, 10, 50)


def dense(size: int, layers: int = 4) -> nn.Sequential:
    """ReLU layers of equal width with about ``size`` parameters."""
    width = round(math.sqrt(size / layers))
    return nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width, bias=False), nn.ReLU())))


def with_directions(optimizer: NSGD, k: int) -> None:
    """Random orthonormal directions in place of estimated ones: a step costs the same."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    size = sum(p.numel() for p in params)
    vectors = torch.randn(k, size, device=params[0].device, generator=torch.Generator(DEVICE).manual_seed(0))
    # Rows of so many random entries are orthogonal but for 1 / sqrt(size).
    vectors /= torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    optimizer._take(torch.ones(k), vectors, params, [])


def iteration(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    optimizer.step()


def waits(optimizer: torch.optim.Optimizer) -> int:
    """Operations in a step that bring a number to the host, by the profiler."""
    with profile() as profiled:
        optimizer.step()
    return sum(
        event.count
        for event in profiled.key_averages()
        if event.key in ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero")
    )


def measure(name: str, build: Any, x: Tensor, y: Tensor, repeats: int, ranks: tuple[int, ...]) -> list[dict[str, Any]]:
    calls: dict[str, Any] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    options: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "foreach": True}
    for label in ("SGD", *(f"NSGD, k = {k}" for k in ranks)):
        torch.manual_seed(0)
        model = build().to(DEVICE)
        if label == "SGD":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), **options)
        else:
            k = int(label.rpartition(" ")[2])
            optimizer = nudged = NSGD(model.parameters(), k=k, **options)
            with_directions(nudged, k)
        optimizers[label] = optimizer
        calls[label] = lambda model=model, optimizer=optimizer: iteration(model, optimizer, x, y)
    size = sum(p.numel() for p in model.parameters())
    found = seconds(calls, repeats)
    return [
        {
            "network": name,
            "parameters": size,
            "batch": len(x),
            "method": label,
            "seconds": float(f"{found[label]:.4g}"),
            "ratio": round(found[label] / found["SGD"], 3),
            "host_reads": waits(optimizers[label]),
            "basis_mib": round(0 if label == "SGD" else int(label.rpartition(" ")[2]) * size * 4 / 2**20, 1),
            "device": DEVICE,
        }
        for label in calls
    ]


def main() -> None:
    parser = arguments(__doc__, "step.csv")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 3, 32, 32, generator=generator).to(DEVICE)
    y = torch.randint(10, (128,), generator=generator).to(DEVICE)
    repeats = 1 if args.smoke else args.repeats
    ranks = RANKS[:2] if args.smoke else RANKS
    rows = measure("SimpleCNN", lambda: make_net("simple-cnn-root", (3, 32, 32), 10), x, y, repeats, ranks)
    for size in (10**5,) if args.smoke else (10**5, 10**6, 10**7, 10**8):
        width = dense(size)[0].in_features
        inputs = torch.randn(128, width, generator=generator).to(DEVICE)
        ranks = RANKS if size < 10**8 else RANKS[:2]  # 50 directions of 10^8 entries take 20 GB
        rows += measure(
            "dense layers",
            lambda size=size: dense(size),
            inputs,
            y,
            repeats if args.smoke else (5 if size >= 10**7 else 3 * repeats),
            ranks,
        )
    print_table(*table(rows))
    if not args.smoke:
        write_csv(args.out, rows)


def table(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Iterations as a multiple of SGD's."""
    body = [
        [
            f"{r['network']}, {r['parameters']:,} parameters, {r['method']}",
            f"{r['ratio']:.3f}",
            str(r["host_reads"]),
            f"{r['basis_mib']:.0f}",
        ]
        for r in rows
    ]
    return ("iteration of batch 128", "times SGD's seconds", "host reads in a step", "basis, MiB"), body


if __name__ == "__main__":
    main()
