"""What a run looks like: pictures of samples, curves, and a report to read. A leaf."""

from .across import text_table, write_across
from .concepts import concept_table, write_concepts
from .files import Run
from .grids import save_before_after, save_grid, save_side_by_side
from .text import comparison_table, write_comparison, write_run_report

__all__ = [
    "Run",
    "comparison_table",
    "concept_table",
    "save_before_after",
    "save_grid",
    "save_side_by_side",
    "text_table",
    "write_across",
    "write_comparison",
    "write_concepts",
    "write_run_report",
]
