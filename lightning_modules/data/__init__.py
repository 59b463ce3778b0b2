"""Data, and samples of them."""

from lightning_modules.support.import_paths import moved

__getattr__ = moved("data")
