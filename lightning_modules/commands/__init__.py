"""The ``nsgd`` command, a file for each of its commands."""
