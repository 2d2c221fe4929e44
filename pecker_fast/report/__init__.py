"""What a run looks like: pictures of samples, curves, and a report to read. A leaf."""

from .across import read_across, text_table, write_across
from .comparison import comparison_table, write_comparison
from .concepts import concept_table, write_concepts
from .files import Run
from .grids import save_before_after, save_grid, save_side_by_side
from .places import portable
from .robustness import write_robustness_report
from .run_report import write_run_report
from .sequence import write_sequence

__all__ = [
    "Run",
    "comparison_table",
    "concept_table",
    "portable",
    "read_across",
    "save_before_after",
    "save_grid",
    "save_side_by_side",
    "text_table",
    "write_across",
    "write_comparison",
    "write_concepts",
    "write_robustness_report",
    "write_run_report",
    "write_sequence",
]
