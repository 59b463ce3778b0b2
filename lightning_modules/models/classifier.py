"""An image classifier as a LightningModule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_modules.models.base import Split, Stages
from lightning_modules.models.nets.named import make_net

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W) float, labels (B,)


class Classifier(Stages):
    """Cross-entropy on images, with accuracy logged as ``train_``, ``val_`` and ``test_accuracy``.

    Without an optimizer from the command line it trains with NSGD at its defaults.

    Args:
        net: Name of the network (simple-cnn is that of the NSGD paper, resnet-32-plain its ResNet without BatchNorm),
            or module:name of a function of your own from (channels, height, width) and the number of classes to one.
        input_shape: Channels, height and width of an image; on the command line taken from the data.
        num_classes: Number of classes; on the command line taken from the data.
        lr: Learning rate of the default optimizer.
        sizes: Sizes in place of the network's own, by name, such as {"hidden": [32, 32]} of mlp.

    Raises:
        ValueError: If the network or a size is unknown, the images do not fit the network, or there are fewer than 2
            classes; in training, if a batch
            is of another kind.
    """

    def __init__(
        self,
        net: str = "mlp",
        input_shape: Sequence[int] = (1, 8, 8),
        num_classes: int = 10,
        lr: float = 0.1,
        *,
        sizes: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        input_shape = tuple(input_shape)
        if num_classes < 2:
            raise ValueError(f"expected num_classes of at least 2, got {num_classes}")
        self.save_hyperparameters()
        self.lr, self._shape = lr, input_shape
        self.net = make_net(net, input_shape, num_classes, sizes)
        self.loss = nn.CrossEntropyLoss()
        self.accuracy = nn.ModuleDict(
            {
                # Without a check of its own, which waits for the device at every step; the loss refuses what it would.
                stage: MulticlassAccuracy(num_classes, average="micro", validate_args=False)
                for stage in ("on_train", "on_val", "on_test")
            }
        )

    def on_fit_start(self) -> None:
        """Keep channels last on a GPU, whose convolutions are fastest so."""
        if self.device.type == "cuda":
            self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        logits: Tensor = self.net(images)
        return logits

    def curvature_loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch and nothing else: what refreshes and measurements take, in place of a step."""
        images, labels = self._checked(batch)
        loss: Tensor = self.loss(self._logits(images), labels)
        return loss

    def evaluate(self, batch: Batch, stage: Split) -> Tensor:
        """The mean loss of the batch, logged with its accuracy."""
        images, labels = self._checked(batch)
        logits = self._logits(images)
        loss: Tensor = self.loss(logits, labels)
        accuracy: Any = self.accuracy[f"on_{stage}"]
        accuracy(logits, labels)
        self.log_loss(loss, stage, len(labels))
        in_bar = stage != "train"
        self.log(f"{stage}_accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=in_bar, batch_size=len(labels))
        return loss

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Class probabilities (B, classes)."""
        return torch.softmax(self(batch[0]), dim=1)

    def _checked(self, batch: Any) -> Batch:
        """Images and labels of a batch, by their shapes and kinds alone: no value is looked at.

        Raises:
            ValueError: If it is another kind of batch.
        """
        expected, mend = self._expected()
        pair = isinstance(batch, list | tuple) and len(batch) == 2
        if not pair or not all(isinstance(part, Tensor) for part in batch):
            raise ValueError(f"{expected}, got a {type(batch).__name__}{'' if pair else ' that is no pair'}; {mend}")
        images, labels = batch
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{expected}, got images {tuple(images.shape)}, labels {tuple(labels.shape)}; {mend}")
        if labels.is_floating_point():
            kind = f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"expected labels (B,) that are whole numbers, got {kind}; {mend}")
        return images, labels

    def _logits(self, images: Tensor) -> Tensor:
        """What the network, which may be another by now, makes of images.

        Raises:
            ValueError: If it cannot take them, and they are not of the shape that it was made for.
        """
        try:
            logits: Tensor = self(images)
        except RuntimeError as error:
            if images.shape[1:] == self._shape:
                raise
            expected, mend = self._expected()
            raise ValueError(f"{expected}, got images {tuple(images.shape)}; {mend}") from error
        return logits

    def _expected(self) -> tuple[str, str]:
        """What batches have to be, and what to do where they are not."""
        shape = ", ".join(map(str, self._shape))
        mend = "give --data whose batches are (images, labels), or a --model that takes these"
        return f"expected batches of images (B, {shape}) and labels (B,)", mend
