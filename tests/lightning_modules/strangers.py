"""LightningModules as other people write them: none knows of NSGD but through configure_optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyExperiment, Logger
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import CatMetric, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

Make = Callable[[Any], torch.optim.Optimizer]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classes(samples: int = 48, features: int = 6, number: int = 3, seed: int = 0) -> TensorDataset:
    """Noisy linear classes."""
    x = torch.randn(samples, features, generator=seeded(seed))
    scores = x @ torch.randn(features, number, generator=seeded(seed + 1))
    return TensorDataset(x, (scores + torch.randn(samples, number, generator=seeded(seed + 2))).argmax(1))


def loader(batch_size: int = 16, *, shuffle: bool = False, **options: Any) -> DataLoader[Any]:
    return DataLoader(classes(**options), batch_size=batch_size, shuffle=shuffle)


class Everything(pl.LightningModule):
    """BatchNorm, dropout, metrics with tensor and with list states, logging, and plain Python counters and lists."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make = make
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3), nn.BatchNorm1d(3)
        )
        options: dict[str, Any] = {"num_classes": 3, "average": "macro"}
        self.metrics = MetricCollection(
            {
                "precision": MulticlassPrecision(**options),
                "recall": MulticlassRecall(**options),
                "accuracy": MulticlassAccuracy(**options),
                "mean": MeanMetric(),
            }
        )
        self.losses = CatMetric()
        self.accuracy = MulticlassAccuracy(**options)
        self.seen: list[float] = []
        self.by_name: dict[str, list[float]] = {"loss": []}
        self.calls = 0
        self.running = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits.float(), y)
        for name in ("precision", "recall", "accuracy"):
            self.metrics[name].update(logits.argmax(1), y)
        self.metrics["mean"].update(loss.detach())
        self.losses.update(loss.detach())
        self.accuracy(logits.argmax(1), y)
        self.seen.append(loss.item())
        self.by_name["loss"].append(loss.item())
        self.calls += 1
        self.running += loss.detach()
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"calls": float(self.calls), "random": float(torch.rand(()))}, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.net.parameters())

    def plain_state(self) -> dict[str, Any]:
        """All that training leaves in the module, as plain values."""
        metrics = {
            f"{name}.{key}": [v.tolist() for v in value] if isinstance(value, list) else value.tolist()
            for name, metric in (*self.metrics.items(), ("losses", self.losses), ("step", self.accuracy))
            for key, value in metric.metric_state.items()
        }
        updates = {name: metric._update_count for name, metric in self.metrics.items()}
        python = (list(self.seen), {k: list(v) for k, v in self.by_name.items()}, self.calls, float(self.running))
        tensors = {name: value.tolist() for name, value in self.state_dict().items()}
        return {"metrics": metrics, "updates": updates, "python": python, "tensors": tensors}


class Smooth(pl.LightningModule):
    """A classifier of 12 parameters, so few that a refresh of k = 5 takes the whole Krylov space: exact eigenvalues."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make = make
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
        nn.init.normal_(self.net[0].weight, generator=seeded(5))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())


class ManualSmooth(Smooth):
    """The same with its own loop."""

    def __init__(self, make: Make) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class ManualWithCurvature(ManualSmooth):
    def curvature_loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Regression(pl.LightningModule):
    """Batches are dictionaries, the step takes no index and returns a dictionary."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make = make
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 1))

    def training_step(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        loss = F.mse_loss(self.net(batch["x"]), batch["y"])
        self.log("mse", loss)
        return {"loss": loss, "extra": loss.detach()}

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)}


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """A smooth function of four numbers, with a name for every row."""

    def __init__(self, samples: int = 96) -> None:
        self.x = torch.randn(samples, 4, generator=seeded(2))
        self.y = torch.sin(self.x[:, :1] * 2) + self.x[:, 1:2]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": self.x[i], "y": self.y[i], "name": f"row {i}", "scale": 1.0}


class Adversarial(pl.LightningModule):
    """A generator and a discriminator, each with its optimizer; with ``toggle`` as in Lightning's own example."""

    def __init__(self, make: Make, *, toggle: bool) -> None:
        super().__init__()
        self.make, self.toggle = make, toggle
        self.automatic_optimization = False
        torch.manual_seed(2)
        self.generator = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
        self.noise = torch.randn(16, 3, generator=seeded(4))

    def losses(self, real: Tensor) -> tuple[Tensor, Tensor]:
        fake = self.generator(self.noise)
        told = torch.cat([self.discriminator(real), self.discriminator(fake.detach())])
        truth = torch.cat([torch.ones(len(real), 1), torch.zeros(len(fake), 1)])
        return F.binary_cross_entropy_with_logits(told, truth), F.softplus(-self.discriminator(fake)).mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizers = self.optimizers()
        for i in (1, 0):  # the discriminator's first
            if self.toggle:
                self.toggle_optimizer(optimizers[i])
            loss = self.losses(batch[0])[1 - i]
            optimizers[i].zero_grad()
            self.manual_backward(loss)
            optimizers[i].step()
            if self.toggle:
                self.untoggle_optimizer(optimizers[i])

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.make(self.generator.parameters()), self.make(self.discriminator.parameters())]


class Memory(Logger):
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    @property
    def experiment(self) -> Any:
        return DummyExperiment()

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def without_nsgd(self) -> list[tuple[int | None, dict[str, float]]]:
        return [(s, row) for s, row in self.rows if not any(name.startswith("nsgd/") for name in row)]


class Emulated16(MixedPrecision):
    """True fp16 with loss scaling, on the CPU."""

    def __init__(self, init_scale: float = 2.0**10) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))
