"""Text as windows of characters: any text, by default the documentation of Python itself."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules.data.batches import EpochBatches

_UNKNOWN = 0  # token of a character that the training text does not hold
_BOUNDS = {"train": (0.0, 0.8), "val": (0.8, 0.9), "test": (0.9, 1.0)}  # shares of the text


class Characters(pl.LightningDataModule):
    """The characters of a text, in windows that do not overlap: the first 80 % train, 10 % validate, 10 % test.

    The default text is the documentation that ``help()`` of Python shows, some 460,000 characters; it differs a little
    between versions of Python. The order of the batches follows the global seed, as set by ``seed_everything``, and the
    epoch. A character that only the last 20 % hold is one token, "unknown".

    Args:
        path: A text file in UTF-8; by default Python's own documentation.
        context: Characters in a window: what the model sees at once.
        batch_size: Windows in a training batch.

    Raises:
        ValueError: If an option is out of range, or on first use, if the text cannot be read or is too short.
    """

    def __init__(self, path: str | None = None, *, context: int = 64, batch_size: int = 64) -> None:
        super().__init__()
        for name, count in (("context", context), ("batch_size", batch_size)):
            if count < 1:
                raise ValueError(f"expected {name} of at least 1, got {count}")
        self.path, self.context, self.batch_size = path, context, batch_size
        self.save_hyperparameters()
        self._splits: dict[str, TensorDataset] | None = None

    @property
    def splits(self) -> dict[str, TensorDataset]:
        """Windows and their targets, (N, context) int64 each, under "train", "val" and "test"; read on first use."""
        if self._splits is None:
            text = _read(self.path)
            parts = {name: text[round(a * len(text)) : round(b * len(text))] for name, (a, b) in _BOUNDS.items()}
            for name, windows in (("train", self.batch_size), ("val", 1), ("test", 1)):
                least = windows * self.context + 1
                if len(parts[name]) < least:
                    raise ValueError(
                        f"expected a text with at least {least} characters for {name}, got {len(parts[name])} of "
                        f"{len(text)} in all; give a longer text, or lower context or batch_size"
                    )
            self._tokens = {c: i for i, c in enumerate(sorted(set(parts["train"])), start=_UNKNOWN + 1)}
            self._splits = {name: self._windows(part) for name, part in parts.items()}
        return self._splits

    def _windows(self, text: str) -> TensorDataset:
        tokens = torch.tensor([self._tokens.get(c, _UNKNOWN) for c in text], device="cpu")
        used = (len(tokens) - 1) // self.context * self.context  # the last character is a target only
        return TensorDataset(tokens[:used].view(-1, self.context), tokens[1 : used + 1].view(-1, self.context))

    @property
    def vocabulary(self) -> int:
        """Number of different characters of the training text, and one for those that it does not hold."""
        _ = self.splits
        return _UNKNOWN + 1 + len(self._tokens)

    def setup(self, stage: str) -> None:
        """Read and split the text."""
        _ = self.splits

    def _loader(self, split: str, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        windows = self.splits[split]
        batches = EpochBatches(len(windows), self.batch_size, shuffle=shuffle, seed=torch.initial_seed())
        return DataLoader(windows, batch_size=None, sampler=batches)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled batches of equal size."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """All validation windows in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """All test windows in order."""
        return self._loader("test")


def _read(path: str | None) -> str:
    if path is None:
        from pydoc_data.topics import topics  # as long as a book: read only where it is used

        return "\n".join(topics[name] for name in sorted(topics))
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"expected path to be a text file, got {path!r} ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected a text in UTF-8, got {path!r}, which is not from byte {error.start} on; convert it first"
        ) from error
