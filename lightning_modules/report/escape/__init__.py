"""The report of ``nsgd escape``."""
