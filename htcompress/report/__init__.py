"""The report of a compression and its views."""

from htcompress.report.html import to_html
from htcompress.report.markdown import model_card, to_markdown
from htcompress.report.report import Latency, LayerReport, MatrixReport, Quality, Report, Timings, Totals, read_report

__all__ = [
    "Latency",
    "LayerReport",
    "MatrixReport",
    "Quality",
    "Report",
    "Timings",
    "Totals",
    "model_card",
    "read_report",
    "to_html",
    "to_markdown",
]
