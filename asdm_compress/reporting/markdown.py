"""The report's figures as Markdown: whole, and as the part of a model card."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from asdm_compress.reporting.figures import Section, Table
from asdm_compress.reporting.report import Report

BEGIN: Final = "<!-- figures: written by `asdm-compress report` -->"
END: Final = "<!-- end of figures -->"
CARD_TABLES: Final = (
    "quality", "predictions", "bands", "eval-pairs", "eval-content", "eval-distances", "eval-speed",
    "eval-memory", "contestants", "probes",
)  # fmt: skip
_MOST_ROWS: Final = 12  # of a table in a card


def markdown_of(report: Report) -> str:
    """Every figure of the report."""
    lines = [f"# {_plain(report.title)}", "", *(f"{_plain(line)}\n" for line in report.verdict)]
    for section in report.sections:
        lines += [f"## {section.title}", "", _plain(section.lead), ""]
        for table in section.tables:
            lines += [f"### {table.title}", "", *_table(table), ""]
    if report.commands:
        lines += ["## Commands", ""]
        for command in report.commands:
            lines += [f"{command.what}:", "", "```bash", command.line, "```", ""]
    if report.missing:
        lines += ["## Not in this report", "", *(f"- {m.title}: `{m.command}`" for m in report.missing), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def card_figures(report: Report) -> str:
    """The part of a model card that the figures make, between its marks."""
    lines = [BEGIN, "## Figures", "", *(f"{_plain(line)}\n" for line in report.verdict)]
    for section in report.sections:
        for table in _for_card(section):
            lines += [f"### {table.title}", "", *_table(table), ""]
    return "\n".join([*lines, END])


def with_figures(card: str, report: Report) -> str:
    """A card with its figures brought up to date; as it is where it has no marks for them."""
    if BEGIN not in card or END not in card:
        return card
    before, _, rest = card.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + card_figures(report) + after


def _for_card(section: Section) -> Iterator[Table]:
    yield from (t for t in section.tables if t.key in CARD_TABLES and len(t.rows) <= _MOST_ROWS)


def _table(table: Table) -> list[str]:
    numbers = [any(row[i].is_number for row in table.rows) for i in range(len(table.columns))]
    lines = [
        f"| {' | '.join(_cell(name) for name in table.columns)} |",
        f"|{'|'.join('---:' if number else '---' for number in numbers)}|",
        *(f"| {' | '.join(_cell(cell.text) for cell in row)} |" for row in table.rows),
    ]
    return [*lines, *(["", _plain(table.note)] if table.note else [])]


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|").replace("\n", " ")


def _plain(text: str) -> str:
    """Text in which nothing is markup by accident: names of sites have underscores, notes may have angle brackets."""
    return text.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
