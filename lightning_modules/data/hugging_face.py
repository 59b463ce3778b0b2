"""Labelled images that Hugging Face `datasets` reads, decoded once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lightning_modules.data.images import ImageData, Images


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
        side: Shrink images to so many pixels a side, by averages over areas, once and for all; null for as they are.
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
        side: int | None = None,
    ) -> None:
        if os.path.exists(os.path.expanduser(path)):
            path = str(Path(path).expanduser().resolve())  # a run of a study may start in another folder
        super().__init__(batch_size=batch_size, augment=augment, val_fraction=val_fraction, limit=limit, side=side)
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
        labels = torch.tensor(dataset[label][:], dtype=torch.int64, device="cpu")
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
        matches = [column for column, feature in columns.items() if fits(feature)]
        if len(matches) != 1:
            way_out = "name it" if matches or kind == "label" else "give a data set of images, or name it"
            raise ValueError(
                f"expected one {kind} column in {self.path}, got {len(matches)} among {', '.join(columns)}; {way_out} "
                f"with {kind}_column"
            )
        return str(matches[0])


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
    if path.startswith((".", "/", "~")) and not os.path.exists(local):
        raise ValueError(f"expected a folder of images or parquet files, got {path!r}, which does not exist")
    if os.path.isdir(local) and not any(entry.is_file() for entry in local.rglob("*")):
        raise ValueError(f"expected images or parquet files in {path}, got an empty folder")
    try:
        return datasets.load_dataset(str(local) if os.path.exists(local) else path)
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ConnectionError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"expected a data set on the Hugging Face hub or a local folder, got {path!r}, which could not be read "
            f"({type(error).__name__}: {reason})"
        ) from error
