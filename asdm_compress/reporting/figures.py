"""Figures: what every form of a report shows. HTML, Markdown and JSON are made of the same sections and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asdm_compress.core.units import format_count, format_seconds

Value = float | int | str | bool | None


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure as a program reads it, and as a person does. `bars` are shares of a full bar, one for each quantity."""

    value: Value
    text: str
    bars: tuple[float, ...] = ()

    @property
    def is_number(self) -> bool:
        """Whether it stands on the right of its column."""
        return isinstance(self.value, (int, float)) and not isinstance(self.value, bool)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of figures; every row has a cell per column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    key: str = ""

    def as_json(self) -> dict[str, Any]:
        """Rows by column, as values."""
        rows = [{name: cell.value for name, cell in zip(self.columns, row, strict=True)} for row in self.rows]
        return {"title": self.title, "rows": rows, **({"note": self.note} if self.note else {})}


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report: `lead` says in a sentence or two what it shows; `drawings` are SVG elements by name.

    In HTML the tables of a section with drawings are folded away, unless `open_tables`.
    """

    key: str
    title: str
    lead: str
    tables: tuple[Table, ...] = ()
    drawings: tuple[tuple[str, str], ...] = ()
    open_tables: bool = False

    def drawing(self, name: str) -> str:
        """The drawing of a name, or nothing."""
        return dict(self.drawings).get(name, "")

    def as_json(self) -> dict[str, Any]:
        """Without drawings."""
        return {"title": self.title, "lead": self.lead, "tables": [table.as_json() for table in self.tables]}


@dataclass(frozen=True, slots=True)
class Missing:
    """A section that is not there, and what would make it."""

    title: str
    command: str


def words(text: str) -> Cell:
    """A text."""
    return Cell(text, text)


def nothing() -> Cell:
    """A figure that does not exist."""
    return Cell(None, "–")


def seconds(value: float, bars: Sequence[float] = ()) -> Cell:
    """A time."""
    return Cell(value, format_seconds(value) if value > 0 else "0 s", tuple(bars))


def counted(value: float, bars: Sequence[float] = ()) -> Cell:
    """A number of MACs or parameters."""
    return Cell(value, format_count(value), tuple(bars))


def times(value: float) -> Cell:
    """A ratio, as in 0.703x."""
    return Cell(value, f"{value:.3f}x")


def percent(value: float, bars: Sequence[float] = ()) -> Cell:
    """A share."""
    return Cell(value, f"{value:.1%}", tuple(bars))


def signed_percent(value: float) -> Cell:
    """A difference as a share."""
    return Cell(value, f"{value:+.1%}".replace("-0.0%", "+0.0%"))


def plain(value: float, bars: Sequence[float] = ()) -> Cell:
    """Any other number, with three or four digits."""
    return Cell(value, f"{value:.4g}", tuple(bars))


def whole(value: int) -> Cell:
    """A count of things."""
    return Cell(value, f"{value:,}")


def decibels(value: float) -> Cell:
    """A level."""
    return Cell(value, f"{value:.1f} dB")


def score(split: Mapping[str, Any]) -> Cell:
    """The mean PSNR of a split of prompts, as files have it, with half the width of its interval."""
    value, interval = split.get("psnr"), split.get("psnr_interval")
    if not isinstance(value, (int, float)):
        return nothing()
    around = f" ± {interval:.2f}" if isinstance(interval, (int, float)) else ""
    return Cell(float(value), f"{value:.2f}{around} dB")
