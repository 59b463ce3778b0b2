"""Colours of the figures of measurements."""

from __future__ import annotations

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # Okabe and Ito
GREY = "#777777"
