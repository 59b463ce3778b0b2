"""Callbacks for any LightningModule: one refreshes the directions, the others measure or record."""

from lightning_modules.support.import_paths import moved

__getattr__ = moved("callbacks")
