"""Drawing in SVG by hand: elements, scales and axes. Colours are classes, so that a page's light and dark apply."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape


def tag(name: str, *content: str | Markup, **attributes: object) -> Markup:
    """An element; in attribute names `_` stands for `-`, `class_` for `class`; those that are None are left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(escape(part) for part in content)
    return Markup(f"<{name}{written}>{inside}</{name}>") if content else Markup(f"<{name}{written}/>")


def drawing(width: float, height: float, title: str, *content: Markup, class_: str = "", role: str = "img") -> str:
    """A whole SVG element that scales with its place. A drawing with things to pick in it has the role `group`."""
    return str(
        tag(
            "svg", *content, viewBox=f"0 0 {_text(width)} {_text(height)}", class_=f"drawing {class_}".strip(),
            role=role, aria_label=title, data_width=_text(width),
        )
    )  # fmt: skip


def pickable(label: str, lines: Sequence[str], *content: Markup, class_: str = "", opens: str | None = None) -> Markup:
    """Something that tells more when it is pointed at or focused: `label`, then lines of figures.

    `opens` is the id of a part of the page that picking it shows. Arrow keys go from one to the next (see report.js).
    """
    told = ". ".join([label, *lines])
    return tag(
        "g", tag("title", "\n".join([label, *lines])), *content, class_=f"pick {class_}".strip(), role="button",
        tabindex="-1", aria_label=told, data_label=label, data_lines="\n".join(lines), data_opens=opens,
        aria_pressed="false" if opens else None,
    )  # fmt: skip


def text(x: float, y: float, words: str, class_: str = "", anchor: str | None = None) -> Markup:
    """A line of text."""
    return tag("text", words, x=x, y=y, class_=class_ or None, text_anchor=anchor)


def box(x: float, y: float, width: float, height: float, class_: str, round_by: float = 0) -> Markup:
    """A rectangle."""
    return tag("rect", x=x, y=y, width=max(width, 0), height=max(height, 0), class_=class_, rx=round_by or None)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to places: `low`, which may be the larger, is drawn at `start`, `high` at `stop`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where a value is drawn."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(max(value, self.low)) if self.log else value
        share = (at - low) / (high - low) if high != low else 0.5
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values for an axis, about five."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            found = [10.0**p for p in powers]
            every = max(1, math.ceil(len(found) / 6))
            return found[::every]
        span = (self.high - self.low) or 1.0
        step = 10.0 ** math.floor(math.log10(span / 4))
        step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= 5.5)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def spanning(values: Sequence[float], start: float, stop: float, log: bool = False) -> Scale:
    """A scale for values; a logarithmic one to the powers of ten around them, another from zero or near them."""
    if log:
        positive = [v for v in values if v > 0] or [1.0]
        low, high = 10.0 ** math.floor(math.log10(min(positive))), 10.0 ** math.ceil(math.log10(max(positive)))
        return Scale(low, high if high > low else low * 10, start, stop, log=True)
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.5
    return Scale(low - margin, high + margin, start, stop)


def axes(x: Scale, y: Scale, x_title: str, y_title: str, x_format: str = "{:g}", y_format: str = "{:g}") -> Markup:
    """Grid lines with their numbers, and what they are numbers of."""
    parts: list[Markup] = []
    for value in y.ticks():
        parts += [
            line(x.start, y(value), x.stop, y(value), "grid"),
            text(x.start - 6, y(value) + 4, _number(value, y_format), "tick", "end"),
        ]
    for value in x.ticks():
        parts += [
            line(x(value), y.start, x(value), y.start + 4, "axis"),
            text(x(value), y.start + 17, _number(value, x_format), "tick", "middle"),
        ]
    return Markup("").join(
        [
            *parts,
            line(x.start, y.start, x.stop, y.start, "axis"),
            text((x.start + x.stop) / 2, y.start + 34, x_title, "axis-title", "middle"),
            text(x.start, y.stop - 10, y_title, "axis-title"),
        ]
    )


def path(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """A line through points."""
    if not points:
        return Markup("")
    return tag("path", d="M" + "L".join(f"{_text(x)} {_text(y)}" for x, y in points), class_=class_)


def _number(value: float, form: str) -> str:
    return form.format(0.0 if abs(value) < 1e-12 else value)


def _text(value: object) -> str:
    """Numbers with two digits after the point: the same drawing for the same figures."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".") or "0"
    return str(value)
