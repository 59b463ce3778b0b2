"""The report of measurements along a training path, a file for each of them."""
