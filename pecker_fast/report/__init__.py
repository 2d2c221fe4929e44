"""What a run looks like: pictures of samples, curves, and a report to read. A leaf."""

from .grids import save_before_after, save_grid
from .text import comparison_table, write_comparison, write_run_report

__all__ = ["comparison_table", "save_before_after", "save_grid", "write_comparison", "write_run_report"]
