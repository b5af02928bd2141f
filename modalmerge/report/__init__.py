"""Turn the cells of a study into a summary, a table for the terminal, Markdown, and one HTML page."""

from modalmerge.report.numbers import Number
from modalmerge.report.page import write_report
from modalmerge.report.summary import Position, Row, Summary, summarise
from modalmerge.report.text import markdown, table

__all__ = ["Number", "Position", "Row", "Summary", "markdown", "summarise", "table", "write_report"]
