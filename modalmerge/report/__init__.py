"""Turn the cells of a study into a summary, a table for the terminal, Markdown, and one HTML page."""

from modalmerge.report.markdown_page import markdown
from modalmerge.report.numbers import Number
from modalmerge.report.page import write_report
from modalmerge.report.rows import Position, Row, Summary
from modalmerge.report.summary import summarise
from modalmerge.report.text import table

__all__ = ["Number", "Position", "Row", "Summary", "markdown", "summarise", "table", "write_report"]
