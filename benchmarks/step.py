"""What NSGD takes of a training iteration's seconds, everything included, against ``torch.optim.SGD(foreach=True)``.

Whole iterations (zero_grad, forward, backward, step), the methods in turn in one process, in windows of as many steps
as lie between two folds of the directions, so that each window holds one: medians of windows, and their ratio to SGD's.
Beside it a refresh from 32 single samples, in iterations of SGD; top-level operations a step; numbers that a step reads
from the device; and memory. On the CPU seconds are the processor's. On a GPU the networks are larger, in bfloat16
autocast, and steps that wait for the device are counted.

    python benchmarks/step.py                  # ten minutes; writes benchmarks/results/step.csv
    python benchmarks/step.py --device cuda    # under three; writes benchmarks/results/step-cuda.csv
    python benchmarks/step.py --smoke          # seconds, writes nothing
"""

from __future__ import annotations

import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from common import RESULTS, arguments, print_table, small_cnn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from lightning_modules.models.nets.named import make_net
from lightning_modules.models.nets.resnet import resnet
from lightning_modules.support.files import write_csv
from nsgd import NSGD, sample_losses
from nsgd.directions.differences import ROWS

SAMPLES = 32
WARM_UP = 4 * ROWS  # steps until folds come once in so many rows
OPTIONS: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "foreach": True}
METHODS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, **OPTIONS),
    "NSGD, k = 10": lambda params: NSGD(params, k=10, **OPTIONS),
    "NSGD, k = 20": lambda params: NSGD(params, k=20, **OPTIONS),
    "NSGD, k = 20, basis in bfloat16": lambda params: NSGD(params, k=20, basis_dtype=torch.bfloat16, **OPTIONS),
}


@dataclass(frozen=True)
class Network:
    """A network, its batch, and how many windows are timed."""

    name: str
    build: Callable[[], nn.Module]
    batch: int
    shape: tuple[int, ...]  # of one input
    windows: int
    classes: int = 10
    words: int = 0  # where inputs are sequences of so many different ones
    needs: str = ""  # a package that it comes from
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = field(
        default=lambda model, x, y: cross_entropy(model(x).float(), y)
    )

    def data(self, device: str) -> tuple[Tensor, Tensor]:
        """A batch."""
        generator = torch.Generator().manual_seed(0)
        if self.words:
            x = torch.randint(self.words, (self.batch, *self.shape), generator=generator).to(device)
            return x, x
        x = torch.randn(self.batch, *self.shape, generator=generator).to(device)
        return x, torch.randint(self.classes, (self.batch,), generator=generator).to(device)


def mlp() -> nn.Module:
    """Dense layers of 269,322 parameters."""
    layers = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers)


def gpt2() -> nn.Module:
    """GPT-2 of 124 M parameters, with random weights."""
    transformers = importlib.import_module("transformers")
    model: nn.Module = transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False))
    return model


def resnet50() -> nn.Module:
    """torchvision's ResNet-50."""
    model: nn.Module = importlib.import_module("torchvision").models.resnet50()
    return model


def next_word(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean loss of the next words."""
    loss: Tensor = model(input_ids=x, labels=y).loss
    return loss


ON_CPU = (
    Network("CNN", lambda: small_cnn(3, 32), 128, (3, 32, 32), 9),
    Network("CNN", lambda: small_cnn(3, 32), 1024, (3, 32, 32), 3),
    Network("SimpleCNN", lambda: make_net("simple-cnn-root", (3, 32, 32), 10), 128, (3, 32, 32), 3),
    Network("MLP 784-256-256-10", mlp, 128, (784,), 15),
    Network("MLP 784-256-256-10", mlp, 1024, (784,), 9),
)
ON_GPU = (
    Network(
        "ResNet-32 without BatchNorm",
        lambda: resnet((3, 32, 32), 10, depth=32, batch_norm=False),
        1024,
        (3, 32, 32),
        9,
    ),
    Network("ResNet-50", resnet50, 128, (3, 224, 224), 5, 1000, needs="torchvision"),
    Network("GPT-2", gpt2, 16, (1024,), 2, words=50_257, needs="transformers", loss=next_word),
)
SMOKE = (Network("CNN", lambda: small_cnn(1, 8, (4, 8)), 32, (1, 8, 8), 1),)


class Training:
    """A network in training by one method."""

    def __init__(self, network: Network, method: str, device: str) -> None:
        torch.manual_seed(0)
        self.network, self.device = network, device
        self.model = network.build().to(device)
        if device == "cuda" and len(network.shape) == 3:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = METHODS[method](self.model.parameters())
        self.x, self.y = network.data(device)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean loss of some samples."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            return self.network.loss(self.model, x, y)

    def iterate(self, steps: int) -> None:
        """Train."""
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss(self.x, self.y).backward()
            self.optimizer.step()

    def refresh(self) -> None:
        """Directions from single samples."""
        optimizer = self.optimizer
        assert isinstance(optimizer, NSGD)
        samples = sample_losses(self.loss, self.x[:SAMPLES], self.y[:SAMPLES], module=self.model)
        optimizer.refresh(samples, batch_fraction=SAMPLES / self.network.batch)

    def seconds(self, work: Callable[[], None]) -> float:
        """What some work takes: of the processor, on a GPU until it is done."""
        if self.device == "cpu":
            started = time.process_time()
            work()
            return time.process_time() - started
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def operations(self) -> tuple[float, float]:
        """Top-level operations a step between two folds, and numbers that it reads from the device."""
        names = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero")
        self.iterate(2)  # whatever a fold leaves for the next step is done then
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            self.optimizer.step()
        events = [event for event in profiled.events() if event.name.startswith("aten::")]
        top = [e for e in events if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
        return len(top), sum(event.name in names for event in events)


def waits(training: Training, steps: int = 2 * ROWS) -> int:
    """Steps of so many that wait for the GPU."""
    waited = 0
    for _ in range(steps):
        training.optimizer.zero_grad()
        training.loss(training.x, training.y).backward()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                training.optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waited += any("synchroniz" in str(warning.message) for warning in said)
    return waited


def measure(network: Network, device: str, warm_up: int) -> list[dict[str, Any]]:
    """Every method on a network, in turn."""
    peaks: dict[str, float] = {}
    waited: dict[str, int] = {}
    trainings: dict[str, Training] = {}
    for method in METHODS:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        trainings[method] = training = Training(network, method, device)
        training.iterate(warm_up)
        if device == "cuda":
            peaks[method] = (torch.cuda.max_memory_allocated() - before) / 2**20
            waited[method] = waits(training)
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(network.windows):
        for method, training in trainings.items():
            times[method].append(training.seconds(lambda training=training: training.iterate(ROWS)) / ROWS)
    size = sum(p.numel() for p in trainings["SGD"].model.parameters())
    seconds = {method: median(values) for method, values in times.items()}
    rows = []
    for method, training in trainings.items():
        operations, reads = training.operations()
        rows.append(
            {
                "network": network.name,
                "parameters": size,
                "batch": network.batch,
                "method": method,
                "seconds": float(f"{seconds[method]:.4g}"),
                "ratio": round(seconds[method] / seconds["SGD"], 3),
                "operations": operations,
                "host_reads": reads,
                "waits": waited.get(method, ""),
                "peak_mib": round(peaks[method]) if method in peaks else "",
                "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            }
        )
    rows.append(refreshes(network, device, rows[0]))
    return rows


def refreshes(network: Network, device: str, base: dict[str, Any]) -> dict[str, Any]:
    """A refresh from single samples at k = 20, in iterations of SGD."""
    training = Training(network, "NSGD, k = 20", device)
    training.refresh()
    took = median(training.seconds(training.refresh) for _ in range(5))
    empty = {"operations": "", "host_reads": "", "waits": "", "peak_mib": ""}
    name = f"a refresh from {SAMPLES} samples, k = 20"
    return {**base, **empty, "method": name, "seconds": float(f"{took:.4g}"), "ratio": round(took / base["seconds"], 3)}


def main() -> None:
    parser = arguments(__doc__, "step.csv")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("expected a CUDA device for --device cuda, got none; leave it out to measure on the CPU")
    torch.set_num_threads(args.threads)
    out = RESULTS / "step-cuda.csv" if args.device == "cuda" and args.out == RESULTS / "step.csv" else args.out
    rows: list[dict[str, Any]] = []
    for network in SMOKE if args.smoke else ON_GPU if args.device == "cuda" else ON_CPU:
        if network.needs and importlib.util.find_spec(network.needs) is None:
            print(f"{network.name}: passed over, {network.needs} is not installed")
            continue
        rows += measure(network, args.device, 12 if args.smoke else WARM_UP)
        if not args.smoke:
            write_csv(out, rows)
    print_table(*table(rows))


def table(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Iterations as a multiple of SGD's."""
    body = [
        [
            f"{r['network']}, batch {r['batch']:,}: {r['method']}",
            f"{r['ratio']:.2f}",
            *(str(r[name]) if r.get(name, "") != "" else "" for name in ("operations", "host_reads")),
        ]
        for r in rows
    ]
    return ("an iteration, everything included", "times SGD's seconds", "operations in a step", "host reads"), body


if __name__ == "__main__":
    main()
