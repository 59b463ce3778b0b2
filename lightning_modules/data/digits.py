"""Scikit-learn's handwritten digits."""

from __future__ import annotations

import numpy as np
import torch

from lightning_modules.data.images import ImageData, Images


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
