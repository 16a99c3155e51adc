"""The report of an evaluation, for people: Markdown, a web page, a comparison.

A report is the dictionary that ``report.json`` holds, see :func:`read_report`.
"""

from __future__ import annotations

from hrsam.report.cases import Case, draw_case, worst
from hrsam.report.comparison import compare
from hrsam.report.reading import FORMAT, read_report
from hrsam.report.text import markdown, table
from hrsam.report.webpage import page

__all__ = ["FORMAT", "Case", "compare", "draw_case", "markdown", "page", "read_report", "table", "worst"]
