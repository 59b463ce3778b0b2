"""LightningModules, and what is asked of any of them."""
