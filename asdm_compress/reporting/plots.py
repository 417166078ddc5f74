"""Plots as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Final

from matplotlib import rc_context
from matplotlib.figure import Figure

from asdm_compress.assembly.frontier import Frontier
from asdm_compress.profiling.profile import Profile

_BLUE: Final = "#2563eb"
_ORANGE: Final = "#ea580c"
_GREY: Final = "#9ca3af"


def profile_svg(profile: Profile) -> str:
    """Shares of latency, MACs and parameters by block, side by side."""
    blocks = [s for s in profile.sites if s.level == "block"]
    figure = Figure(figsize=(8, 0.35 * len(blocks) + 1.4))
    axes = figure.add_subplot()
    series: tuple[tuple[str, Sequence[float], str], ...] = (
        ("latency", [s.share for s in blocks], _BLUE),
        ("MACs", [s.macs / profile.macs for s in blocks], _ORANGE),
        ("parameters", [s.parameters / profile.parameters for s in blocks], _GREY),
    )
    for offset, (label, values, colour) in enumerate(series):
        places = [i + 0.27 * (offset - 1) for i in range(len(blocks))]
        axes.barh(places, [100 * v for v in values], height=0.25, label=label, color=colour)
    axes.set_yticks(range(len(blocks)), [s.path for s in blocks])
    axes.invert_yaxis()
    axes.set_xlabel("share of the whole UNet, %")
    axes.legend(frameon=False)
    axes.set_title(f"{profile.fingerprint.model}: where the costs sit", loc="left")
    return as_svg(figure)


def frontier_svg(frontier: Frontier) -> str:
    """Damage over the resource that was limited: as predicted, and as measured where plans were built."""
    figure = Figure(figsize=(8, 4))
    axes = figure.add_subplot()
    shares = [frontier.share(point) for point in frontier.points]
    floor = 1e-9  # a logarithmic axis has no zero
    axes.plot(shares, [max(p.predicted_damage, floor) for p in frontier.points], "o-", color=_BLUE, label="predicted")
    measured = [(s, p.measured_damage) for s, p in zip(shares, frontier.points, strict=True) if p.measured_damage]
    if measured:
        axes.plot(*zip(*measured, strict=True), "s", color=_ORANGE, label="measured")
    axes.set_yscale("log")
    axes.set_xlabel(f"{frontier.resource}, share of the teacher's")
    axes.set_ylabel("damage")
    axes.legend(frameon=False)
    axes.set_title(f"{frontier.model}: the plan of least damage for every budget", loc="left")
    return as_svg(figure)


def as_svg(figure: Any) -> str:
    """A figure as one svg element, the same for the same numbers."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    # No date and fixed ids: the same numbers give the same file.
    with rc_context({"svg.hashsalt": "asdm-compress"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
