"""The report of ``nsgd compare``."""
