"""Plots as SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

from matplotlib import rc_context
from matplotlib.figure import Figure

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
    return _svg(figure)


def options_svg(savings: Mapping[str, float], damages: Mapping[str, float], chosen: Sequence[str]) -> str:
    """Every option's damage over the share of latency that it saves; the chosen ones marked."""
    figure = Figure(figsize=(8, 4))
    axes = figure.add_subplot()
    for label, names, colour, size in (
        ("possible", [n for n in savings if n not in chosen], _GREY, 14),
        ("chosen", list(chosen), _ORANGE, 32),
    ):
        points = [(100 * savings[n], max(damages[n], 1e-9)) for n in names]
        axes.scatter([x for x, _ in points], [y for _, y in points], s=size, color=colour, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("saved share of latency, %")
    axes.set_ylabel("one-shot damage")
    axes.legend(frameon=False)
    axes.set_title("The edits that the search chose from", loc="left")
    return _svg(figure)


def _svg(figure: Any) -> str:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    # No date and fixed ids: the same numbers give the same file.
    with rc_context({"svg.hashsalt": "asdm-compress"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
