"""The report of a run: console table, plots, one self-contained HTML page."""

from ares_jax.reporting.html import build_report
from ares_jax.reporting.table import console_table

__all__ = ["build_report", "console_table"]
