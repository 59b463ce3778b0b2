"""A second look at the loss leaves training as it is, bit for bit, whatever a training_step changes on its way."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from strangers import classes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_modules import BatchQuadratic, RefreshDirections, SharpnessMonitor, ValleyWalk, WriteAverages
from nsgd import NSGD


class Plain(pl.LightningModule):
    """A classifier of batches in a dictionary; a subclass changes something in its step that it should not."""

    def __init__(self, solver: str | None = None) -> None:
        super().__init__()
        self.solver = solver
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch["x"]), batch["y"])

    def configure_optimizers(self) -> Any:
        params = [p for p in self.parameters() if p.requires_grad]
        if self.solver is None:
            return torch.optim.SGD(params, lr=0.1, momentum=0.9)
        return NSGD(params, lr=0.1, momentum=0.9, k=3, gamma=1.0, solver=self.solver, refresh_every=2)


class TeacherInPlace(Plain):
    """The gradient runs through the teacher, so that the graph of the step holds its weights."""

    def __init__(self, solver: str | None = None) -> None:
        super().__init__(solver)
        self.teacher = nn.Linear(3, 3).requires_grad_(False)
        self.student = nn.Linear(3, 3)

    def follow(self) -> None:
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.follow()
        out = self.net(batch["x"])
        return F.cross_entropy(self.student(out), batch["y"]) + F.mse_loss(self.student(out), self.teacher(out))


class TeacherByData(TeacherInPlace):
    def follow(self) -> None:
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.data = slow.data * 0.9 + fast.data * 0.1


class ClipsItsWeights(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for p in self.net.parameters():
            p.data.mul_(0.999)
        return super().training_step(batch, batch_idx)


class Pops(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch["x"]), batch.pop("y"))


class NormalisesInPlace(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch["x"].sub_(0.5).div_(2.0)
        return super().training_step(batch, batch_idx)


class Hidden(Plain):
    """Truncated backpropagation through time: a state goes from batch to batch."""

    hidden: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch["x"])
        if self.hidden is not None:
            logits = logits + self.hidden
        self.hidden = logits.detach().mean(0)
        return F.cross_entropy(logits, batch["y"])


class Pruned(Plain):
    def __init__(self, solver: str | None = None) -> None:
        super().__init__(solver)
        prune.random_unstructured(self.net[0], "weight", 0.4)


class Remembers(Plain):
    """A loss of an attribute, a counter that the loss depends on, and averages in a list and in an object."""

    class Meter:
        def __init__(self) -> None:
            self.values = {"mean": torch.zeros(3)}

    def __init__(self, solver: str | None = None) -> None:
        super().__init__(solver)
        self.steps, self.shadow, self.meter = 0, [torch.zeros(3)], self.Meter()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch["x"])
        self.steps += 1
        self.aux = logits.square().mean() / self.steps
        for average in (self.shadow[0], self.meter.values["mean"]):
            average.mul_(0.9).add_(logits.detach().mean(0), alpha=0.1)
        penalty = (logits * (self.shadow[0] + self.meter.values["mean"])).mean()
        return F.cross_entropy(logits, batch["y"]) + 0.1 * self.aux + penalty


class Measures(Plain):
    def __init__(self, solver: str | None = None) -> None:
        super().__init__(solver)
        self.accuracy = MulticlassAccuracy(num_classes=3, average="macro")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch["x"])
        self.log("accuracy", self.accuracy(logits, batch["y"]) + 0 * torch.rand(()), on_epoch=True)
        loss = F.cross_entropy(logits, batch["y"])
        self.log("loss", loss, on_epoch=True)
        return loss


KINDS = [
    *(TeacherInPlace, TeacherByData, ClipsItsWeights, Pops, NormalisesInPlace, Hidden, Pruned, Remembers, Measures),
]
LOOKS: dict[str, Any] = {
    "samples": ("gradients", partial(RefreshDirections, samples=8, group_size=2)),
    "samples of the training set": ("gradients", partial(RefreshDirections, samples=8, group_size=2, source="train")),
    "products": ("lanczos", partial(RefreshDirections, samples=8)),
    "products of the whole batch": ("lanczos", partial(RefreshDirections, samples=None)),
    "sharpness": (None, partial(SharpnessMonitor, every=3, samples=16, k=2)),
    "quadratic": (None, partial(BatchQuadratic, every=3)),
    "valley": (None, partial(ValleyWalk, every=4, samples=16, length=2, points=2)),
    "averages": (None, partial(WriteAverages, calibration=16)),
}


class Rows(torch.utils.data.Dataset[Any]):
    def __init__(self) -> None:
        self.x, self.y = classes(64).tensors

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return {"x": self.x[i] + 1, "y": self.y[i]}


def trained(make_trainer: Any, kind: type[Plain], solver: str | None, callbacks: list[Any]) -> Any:
    module = kind(solver)
    torch.manual_seed(3)
    trainer = make_trainer(max_epochs=2, callbacks=callbacks)
    trainer.fit(module, DataLoader(Rows(), batch_size=16))
    kept = [getattr(module, name, None) for name in ("hidden", "steps", "aux", "shadow")]
    values = {name: value.tolist() for name, value in module.state_dict().items()}
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return module, (values, metrics, repr(kept), torch.rand(3).tolist())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.filterwarnings("ignore:grad and its grad_fn")
def test_training_is_that_without_a_second_look_to_the_bit(make_trainer, kind, look):
    solver, callback = LOOKS[look]
    _, alone = trained(make_trainer, kind, None, [])
    module, watched = trained(make_trainer, kind, solver, [callback()])
    assert watched == alone
    if solver is not None:
        assert module.optimizers().refreshes == 4


@pytest.mark.parametrize("source", ["batch", "train"])
def test_the_second_look_sees_what_the_step_saw(make_trainer, source):
    """Weights of the directions from a step that normalises its batch in place are those of one that does not."""

    class Normalises(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step({"x": (batch["x"] - 0.5) / 2.0, "y": batch["y"]}, batch_idx)

    def weights(kind: type[Plain]) -> Any:
        module, _ = trained(
            make_trainer, kind, "gradients", [RefreshDirections(samples=8, group_size=2, source=source)]
        )
        return module.optimizers().weights

    assert weights(NormalisesInPlace) == weights(Normalises) != ()


def test_the_averages_hold_the_teacher_of_the_run_and_statistics_of_the_batches(make_trainer):
    writer = WriteAverages(calibration=64)
    module, _ = trained(make_trainer, TeacherInPlace, None, [writer])
    last = torch.load(writer.paths["last"], weights_only=True)["state_dict"]
    for name, value in module.named_parameters():
        assert torch.equal(last[name], value), name

    writer = WriteAverages(calibration=64)
    trained(make_trainer, NormalisesInPlace, None, [writer])
    kept = {name: torch.load(path, weights_only=True)["state_dict"] for name, path in writer.paths.items()}
    # Of the weights that each holds, on the set normalised once: the mean of the features of all batches alike.
    x = (torch.stack([row["x"] for row in Rows()]) - 0.5) / 2.0  # type: ignore[attr-defined]
    for state in kept.values():
        mean = F.linear(x, state["net.0.weight"], state["net.0.bias"]).mean(0)
        assert torch.allclose(state["net.1.running_mean"], mean, atol=1e-5)  # summed in another order


@pytest.mark.parametrize("what", ["generator", "open file"])
def test_a_batch_that_cannot_be_copied_is_refused_where_its_loss_is_taken_again(make_trainer, tmp_path, what):
    class Streams(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step({key: batch[key] for key in ("x", "y")}, batch_idx)

    (tmp_path / "notes").touch()
    x, y = classes(16).tensors
    with (tmp_path / "notes").open() as file:
        batch = {"x": x, "y": y, "more": file if what == "open file" else (i for i in range(3))}
        fit = partial(
            make_trainer(max_steps=1, callbacks=[RefreshDirections(samples=8, group_size=2)]).fit, Streams("gradients")
        )
        with pytest.raises(ValueError, match=r"expected a batch that can be copied.* got a dict .*read once only"):
            fit(DataLoader([batch], batch_size=None))
        # Products of the loss that training has computed need no copy.
        whole = RefreshDirections(samples=None)
        make_trainer(max_steps=1, callbacks=[whole]).fit(Streams("lanczos"), DataLoader([batch], batch_size=None))
