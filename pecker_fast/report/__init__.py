"""Pictures, curves and reports of runs. Only runs and commands import it."""

from .across import CLASSES, PROMPTS, Layout, read_across, text_table, write_across
from .card import card_note
from .cautions import cautions
from .comparison import comparison_table, write_comparison
from .concepts import write_concept_sequence
from .files import RunRecord
from .grids import PROMPT_WIDTH, save_before_after, save_grid, save_side_by_side
from .places import portable
from .relearning_cost import write_robustness_across
from .robustness import write_robustness_report
from .run_report import write_run_report
from .sequence import write_sequence
from .text_robustness import write_prompt_robustness_report

__all__ = [
    "CLASSES",
    "PROMPTS",
    "PROMPT_WIDTH",
    "Layout",
    "RunRecord",
    "card_note",
    "cautions",
    "comparison_table",
    "portable",
    "read_across",
    "save_before_after",
    "save_grid",
    "save_side_by_side",
    "text_table",
    "write_across",
    "write_comparison",
    "write_concept_sequence",
    "write_prompt_robustness_report",
    "write_robustness_across",
    "write_robustness_report",
    "write_run_report",
    "write_sequence",
]
