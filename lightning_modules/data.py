"""Image data: decoded once into uint8 tensors, shuffled by seed and epoch, normalised and augmented in batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler

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


class EpochBatches(Sampler[list[int]]):
    """Batches of indices whose order is a function of the seed and the epoch alone, so that resuming repeats it."""

    def __init__(self, size: int, batch_size: int, *, shuffle: bool, seed: int = 0) -> None:
        self.size, self.batch_size, self.shuffle, self.seed = size, batch_size, shuffle, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        # A short last batch would be a noisier training step than the others; in evaluation every image counts.
        return self.size // self.batch_size if self.shuffle else -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)
        for i in range(len(self)):
            yield order[i * self.batch_size : (i + 1) * self.batch_size].tolist()


class ImageData(pl.LightningDataModule, ABC):
    """Base of the image data modules: a subclass says where the images come from.

    Args:
        batch_size: Images in a training batch.
        augment: Whether to shift by up to 4 pixels and flip training images.
        val_fraction: Share of the training images kept apart for validation.
        limit: Use so many training images only, drawn once and for all.

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
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"expected batch_size of at least 1, got {batch_size}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"expected val_fraction between 0 and 1, got {val_fraction}")
        if limit is not None and limit < 2:
            raise ValueError(f"expected limit of at least 2 images, got {limit}")
        self.batch_size, self.augment, self.val_fraction, self.limit = batch_size, augment, val_fraction, limit
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

            train, test = self.load()
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
            total, levels = counts.sum(1), torch.arange(256).double() / 255
            mean = counts @ levels / total  # (C,)
            variance = (counts * (levels - mean[:, None]).square()).sum(1) / (total - 1)
            self._mean, self._std = mean.float(), variance.sqrt().float().clamp(min=1e-3)
        return self._splits

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
        dataset = ImageDataset(self.splits[split])
        batches = EpochBatches(len(dataset), self.batch_size, shuffle=shuffle, seed=torch.initial_seed())
        return DataLoader(dataset, batch_size=None, sampler=batches)

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
        return (augmented(images) if self.augment and training else images), labels

    def normalise(self, pixels: Tensor) -> Tensor:
        """Stored pixels (N, C, H, W) as float images with the training images' mean 0 and standard deviation 1."""
        shape = (1, -1, 1, 1)
        return (pixels.float() / 255 - self._mean.to(pixels.device).view(shape)) / self._std.to(pixels.device).view(
            shape
        )


class Digits(ImageData):
    """The 1,797 handwritten 8 x 8 digits of scikit-learn: real and installed with it; a fifth is for testing."""

    def load(self) -> tuple[Images, Images]:
        """Training and test images, the same split always."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        pixels = torch.from_numpy(digits.images * 15).to(torch.uint8)[:, None]  # grey levels 0 to 16 -> 0 to 240
        labels = torch.from_numpy(digits.target).long()
        train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=digits.target)
        return Images(pixels[train], labels[train]), Images(pixels[test], labels[test])


class HuggingFace(ImageData):
    """Any labelled image data set that Hugging Face `datasets` reads: by its name on the hub, or a local folder.

    Needs the extra ``nsgd[data]``.

    Args:
        path: Name on the hub ("uoft-cs/cifar10"), or a folder of parquet files or of images in one folder a class.
        image_column: Column of the images; found by its type if not given.
        label_column: Column of the class labels; found by its type if not given.
        test_split: Name of the split for testing; if there is none of that name, "validation", or else a fifth of
            the training images.
        batch_size: Images in a training batch.
        augment: Whether to shift by up to 4 pixels and flip training images.
        val_fraction: Share of the training images kept apart for validation.
        limit: Use so many training images only, drawn once and for all.
    """

    def __init__(
        self,
        path: str,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        test_split: str = "test",
        batch_size: int = 128,
        augment: bool = False,
        val_fraction: float = 0.2,
        limit: int | None = None,
    ) -> None:
        if Path(path).expanduser().exists():
            path = str(Path(path).expanduser().resolve())  # a run of a study may start in another folder
        super().__init__(batch_size=batch_size, augment=augment, val_fraction=val_fraction, limit=limit)
        self.path, self.image_column, self.label_column, self.test_split = path, image_column, label_column, test_split

    def load(self) -> tuple[Images, Images]:
        """Training and test images."""
        splits = _load_dataset(self.path)
        train = splits.get("train")
        if train is None:
            raise ValueError(f"expected a split named train in {self.path}, got {', '.join(splits)}")
        for dataset in splits.values():
            self._columns(dataset)  # before anything is decoded
        test = splits.get(self.test_split, splits.get("validation"))
        if test is None:
            both = train.train_test_split(test_size=0.2, seed=0)
            train, test = both["train"], both["test"]
        if self.limit is not None and self.limit < len(train):
            train = train.shuffle(seed=0).select(range(self.limit))  # folders hold one class after the other
        try:
            return self._decode(train, "L"), self._decode(test, "L")
        except _ColourFoundError:
            return self._decode(train, "RGB"), self._decode(test, "RGB")

    def _decode(self, dataset: Any, mode: Literal["L", "RGB"]) -> Images:
        import datasets

        image, label = self._columns(dataset)
        if not isinstance(dataset.features[image], datasets.Image):
            dataset = dataset.cast_column(image, datasets.Image())  # parquet that lost its schema: bytes and path
        pixels: np.ndarray[Any, np.dtype[np.uint8]] | None = None
        for i, picture in enumerate(dataset[image]):
            if mode == "L" and picture.mode not in ("1", "L"):
                raise _ColourFoundError
            array = np.asarray(picture.convert(mode))
            if pixels is None:
                pixels = np.empty((len(dataset), *array.shape), dtype=np.uint8)
            if array.shape != pixels.shape[1:]:
                raise ValueError(
                    f"expected images of one size in {self.path}, got {pixels.shape[1:3]} and {array.shape[:2]}; "
                    "resize them first"
                )
            pixels[i] = array
        if pixels is None:
            raise ValueError(f"expected images in {self.path}, got an empty split")
        stacked = torch.from_numpy(pixels)  # (N, H, W) or (N, H, W, C)
        stacked = stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor(dataset[label][:], dtype=torch.int64)
        if int(labels.min()) < 0:
            raise ValueError(
                f"expected labels from 0 on in {self.path}, got {int(labels.min())}: a split without labels"
            )
        return Images(stacked, labels)

    def _columns(self, dataset: Any) -> tuple[str, str]:
        """Names of the image and the label column."""
        image = self._column(dataset.features, self.image_column, "image", _is_image)
        return image, self._column(dataset.features, self.label_column, "label", _is_label)

    def _column(self, columns: Any, name: str | None, kind: str, fits: Any) -> str:
        if name is not None:
            if name not in columns:
                raise ValueError(f"expected {kind}_column to be one of {', '.join(columns)}, got {name!r}")
            if not (fits(columns[name]) or (kind == "label" and "int" in str(getattr(columns[name], "dtype", "")))):
                raise ValueError(f"expected {kind}_column to hold {kind}s, got {name!r}, which holds {columns[name]}")
            return name
        found = [column for column, feature in columns.items() if fits(feature)]
        if len(found) != 1:
            way_out = "name it" if found or kind == "label" else "give a data set of images, or name it"
            raise ValueError(
                f"expected one {kind} column in {self.path}, got {len(found)} among {', '.join(columns)}; {way_out} "
                f"with {kind}_column"
            )
        return str(found[0])


def _is_image(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _is_label(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.ClassLabel)


class _ColourFoundError(Exception):
    """Not all images are grey."""


def _load_dataset(path: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError("Hugging Face data needs the extra: pip install 'nsgd[data]'") from None
    local = Path(path).expanduser()
    if path.startswith((".", "/", "~")) and not local.exists():
        raise ValueError(f"expected a folder of images or parquet files, got {path!r}, which does not exist")
    if local.is_dir() and not any(entry.is_file() for entry in local.rglob("*")):
        raise ValueError(f"expected images or parquet files in {path}, got an empty folder")
    try:
        return datasets.load_dataset(str(local) if local.exists() else path)
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ConnectionError, ValueError, OSError) as error:
        said = str(error).strip().splitlines()[0]
        raise ValueError(
            f"expected a data set on the Hugging Face hub or a local folder, got {path!r}, which could not be read "
            f"({type(error).__name__}: {said})"
        ) from error


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
