"""The report: one HTML file with everything in it, that opens without a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL.Image import Image

from asdm_compress.core.recipe import Recipe
from asdm_compress.core.units import format_bytes, format_count, format_seconds


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One edit: where, which, the share of the teacher's latency that it saves, and its one-shot damage."""

    site: str
    edit: str
    saved: float
    damage: float


@dataclass(frozen=True, slots=True)
class ReportContent:
    """What the report shows besides the recipe; `quality` are rows of name, value and meaning."""

    title: str
    recipe: Recipe
    summary: Sequence[str]
    plan: Sequence[PlanRow]
    quality: Sequence[tuple[str, str, str]]
    grid: Image
    plots: Sequence[str]
    notes: Sequence[str]


def render_report(content: ReportContent) -> str:
    """The whole file as text."""
    environment = Environment(
        loader=PackageLoader("asdm_compress.reporting"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters.update(seconds=format_seconds, count=format_count, bytes=format_bytes)
    template = environment.get_template("report.html.j2")
    values: dict[str, Any] = {"content": content, "recipe": content.recipe, "grid": _data_url(content.grid)}
    return template.render(**values)


def _data_url(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
