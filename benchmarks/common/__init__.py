"""What the benchmarks share: arguments, CIFAR-10 as tensors, small networks, paired timings and tables."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules import Digits, HuggingFace

RESULTS = Path(__file__).parent.parent / "results"


def arguments(description: str | None, result: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has; ``result`` names its file in benchmarks/results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / result)
    parser.add_argument("--smoke", action="store_true", help="seconds, writes nothing and claims nothing")
    return parser


def add_data(parser: argparse.ArgumentParser) -> None:
    """Give a parser the option that says where CIFAR-10 lies."""
    parser.add_argument("--data", default="uoft-cs/cifar10", help="CIFAR-10: a hub name or a local folder")


class Data(NamedTuple):
    """Normalised images and labels."""

    images: Tensor  # (N, C, H, W)
    labels: Tensor  # (N,)
    val_images: Tensor
    val_labels: Tensor


def load(args: argparse.Namespace, *, limit: int, val: int) -> Data:
    """The first images of CIFAR-10, or digits for a smoke run."""
    data = Digits() if args.smoke else HuggingFace(args.data, limit=limit + val, val_fraction=val / (limit + val))
    train, held_out = data.splits["train"], data.splits["val"]
    return Data(data.normalise(train.pixels), train.labels, data.normalise(held_out.pixels), held_out.labels)


def small_cnn(channels: int, side: int, widths: Sequence[int] = (16, 32)) -> nn.Sequential:
    """A ReLU convolution and a pooling for each width, and one dense layer: 25,578 parameters on CIFAR-10."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels, side = width, side // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side**2, 10))


def seconds(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, taken in turn so that what else the machine does falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ > 0:  # the first warms up
                times[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in times.items()}


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table in plain text, the first column to the left."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    for line in [header, *rows]:
        print(
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        )
