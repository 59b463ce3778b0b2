"""Image data: uint8 tensors, split once and for all, normalised and augmented in batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from lightning_modules.data.batches import EpochBatches

_PAD = 4  # pixels of shift on each side, the usual augmentation of 32 x 32 images


class Images(NamedTuple):
    """Images with labels, as they are stored."""

    pixels: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64


class ImageDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images by index: one index gives one image, a list of indices a whole batch."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, index: int | list[int]) -> tuple[Tensor, Tensor]:
        return self.images.pixels[index], self.images.labels[index]


class ImageData(pl.LightningDataModule, ABC):
    """Base of the image data modules: a subclass says where the images come from.

    Args:
        batch_size: Images in a training batch.
        augment: Whether to shift by up to 4 pixels and flip training images.
        val_fraction: Share of the training images kept apart for validation.
        limit: Use so many training images only, drawn once and for all.
        side: Shrink images to so many pixels a side, by averages over areas, once and for all; null for as they are.

    The split into training and validation images is always the same; the order of the batches follows the global
    seed, as set by ``seed_everything``, and the epoch.
    """

    def __init__(
        self,
        *,
        batch_size: int = 128,
        augment: bool = False,
        val_fraction: float = 0.2,
        limit: int | None = None,
        side: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"expected batch_size of at least 1, got {batch_size}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"expected val_fraction between 0 and 1, got {val_fraction}")
        if limit is not None and limit < 2:
            raise ValueError(f"expected limit of at least 2 images, got {limit}")
        if side is not None and side < 1:
            raise ValueError(f"expected side of at least 1 pixel, got {side}")
        self.batch_size, self.augment, self.val_fraction, self.limit = batch_size, augment, val_fraction, limit
        self.side = side
        self.save_hyperparameters()
        self._splits: dict[str, Images] | None = None

    @abstractmethod
    def load(self) -> tuple[Images, Images]:
        """Training and test images."""

    @property
    def splits(self) -> dict[str, Images]:
        """Images under "train", "val" and "test"; read on first use."""
        if self._splits is None:
            from sklearn.model_selection import train_test_split  # here: it takes a second to import

            train, test = (self._shrunk(images) for images in self.load())
            size = len(train.labels)
            indices = (
                np.arange(size) if self.limit is None else np.random.default_rng(0).permutation(size)[: self.limit]
            )
            kept, held_out = train_test_split(indices, test_size=self.val_fraction, random_state=0)
            if len(kept) < self.batch_size:
                raise ValueError(
                    f"expected batch_size of at most {len(kept)}, the number of training images, got {self.batch_size}"
                )
            self._splits = {
                "train": Images(train.pixels[kept], train.labels[kept]),
                "val": Images(train.pixels[held_out], train.labels[held_out]),
                "test": test,
            }
            # By grey level: a float copy of all pixels would take eight times their memory.
            channels = self._splits["train"].pixels.transpose(0, 1).flatten(1)  # (C, pixels)
            counts = torch.stack([torch.bincount(c, minlength=256) for c in channels]).double()
            total, levels = counts.sum(1), torch.arange(256, device="cpu").double() / 255
            mean = counts @ levels / total  # (C,)
            variance = (counts * (levels - mean[:, None]).square()).sum(1) / (total - 1)
            self._mean, self._std = mean.float(), variance.sqrt().float().clamp(min=1e-3)
        return self._splits

    def _shrunk(self, images: Images) -> Images:
        if self.side is None:
            return images
        if self.side > (least := min(images.pixels.shape[2:])):
            raise ValueError(f"expected side of at most {least}, the images' own, got {self.side}")
        parts = torch.split(images.pixels, 1024)  # as float, a part at a time
        pixels = [functional.adaptive_avg_pool2d(part.float(), self.side).round().to(torch.uint8) for part in parts]
        return Images(torch.cat(pixels), images.labels)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        _, channels, height, width = self.splits["train"].pixels.shape
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return 1 + max(int(images.labels.max()) for images in self.splits.values())

    def setup(self, stage: str) -> None:
        """Read and split the images."""
        _ = self.splits

    def _loader(self, split: str, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, Tensor]]:
        dataset = ImageDataset(self._near(self.splits[split]))
        batches = EpochBatches(len(dataset), self.batch_size, shuffle=shuffle, seed=torch.initial_seed())
        return DataLoader(dataset, batch_size=None, sampler=batches)

    def _near(self, images: Images) -> Images:
        """Images on a GPU that they are trained on, so that no batch has to be moved there; a copy for each loader."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        return images if device.type == "cpu" else Images(*(tensor.to(device) for tensor in images))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Shuffled batches of equal size."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """All validation images in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """All test images in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """All test images in order."""
        return self._loader("test")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalise, and in training augment, a batch of stored pixels on whatever device it is."""
        pixels, labels = batch
        if pixels.dtype != torch.uint8:
            return batch
        images = self.normalise(pixels)
        training = self.trainer is not None and self.trainer.training
        if self.trainer is not None:  # to which the stored pixels, being whole numbers, were nothing to convert
            images = self.trainer.precision_plugin.convert_input(images)
        return (augmented(images) if self.augment and training else images), labels

    def normalise(self, pixels: Tensor) -> Tensor:
        """Stored pixels (N, C, H, W) as float images with the training images' mean 0 and standard deviation 1."""
        shape = (1, -1, 1, 1)
        return (pixels.float() / 255 - self._mean.to(pixels.device).view(shape)) / self._std.to(pixels.device).view(
            shape
        )


def augmented(images: Tensor) -> Tensor:
    """Shift each image (B, C, H, W) by up to 4 pixels, zeros coming in, and flip it half the time (torch's RNG)."""
    batch, channels, height, width = images.shape
    device = images.device
    padded = functional.pad(images, (_PAD,) * 4)
    top, left = torch.randint(0, 2 * _PAD + 1, (2, batch, 1), device=device)
    rows = top + torch.arange(height, device=device)  # (B, H)
    columns = left + torch.arange(width, device=device)  # (B, W)
    flip = torch.rand(batch, 1, device=device) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    image = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
