"""Data, and samples of them."""
