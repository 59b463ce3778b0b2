"""Callbacks for any LightningModule: one refreshes the directions, the others measure or record."""
