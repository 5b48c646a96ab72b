"""What was measured, as JSON, table, plot and model card."""

from hf_robust.report.card import model_card
from hf_robust.report.plots import plot_report
from hf_robust.report.report import Measurement, Report
from hf_robust.report.table import format_table

__all__ = ["Measurement", "Report", "format_table", "model_card", "plot_report"]
