"""What is shown of a calibrated schedule: its steps as a picture and as a table, and what was tried beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import numpy as np
from diffusers import UNet2DConditionModel
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from asdm_compress.core.units import format_seconds
from asdm_compress.inheritance.actions import Action
from asdm_compress.reporting.plots import as_svg
from asdm_compress.reporting.schedule_map import MEANINGS, Kind, map_on
from asdm_compress.scheduling.check_steps import StepCheck

_COMPUTED: Final = "#2563eb"
_HELD: Final = "#9ca3af"
_FORECAST: Final = "#ea580c"
_CORRECTED: Final = "#9f1239"
_OTHER: Final = "#16a34a"
_CELLS: Final[dict[Kind, str]] = {"computed": _COMPUTED, "part": "#93c5fd", "held": "#d1d5db", "forecast": "#fdba74"}
Row = tuple[str, str, float, str, str]  # role, way, share of the time, validation, test
Point = tuple[str, str, float, float]  # role, way, share of the time, PSNR in dB
_ROLE_COLOURS: Final = {"schedule": _FORECAST, "DeepCache": _COMPUTED, "fewer steps": _HELD}


def steps_svg(unet: UNet2DConditionModel, actions: Sequence[Action], checks: Sequence[StepCheck]) -> str:
    """Parts of the UNet over steps: computed, held or forecast, and where a fitted correction is added; below, where
    it was checked, each step's error. Raises AsdmError for places that the UNet does not have."""
    found = map_on(unet, actions)
    height = 0.19 * (len(found.rows) + 1) + 0.5
    figure = Figure(
        figsize=(max(6.5, 0.24 * len(actions) + 2.5), height + (2 if checks else 0.8)), layout="constrained"
    )
    if checks:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[height, 1.6])
    else:
        axes = figure.add_subplot()
    for kind, colour in _CELLS.items():
        here = [(i, row) for row, cells in enumerate(found.cells) for i, cell in enumerate(cells) if cell == kind]
        if here:  # one shape for all of them keeps the file small
            axes.add_patch(PathPatch(_boxes(here), facecolor=colour, edgecolor="none", label=MEANINGS[kind]))
    rows = [_short(row) for row in found.rows]
    fitted = [i for i, action in enumerate(actions) if any(entry.corrected for entry in action.inherits)]
    if fitted:
        axes.plot(fitted, [len(rows)] * len(fitted), linestyle="", marker="D", markersize=4, color=_CORRECTED)
        rows.append("fitted correction")
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-0.6, len(actions) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(handles=axes.patches, frameon=False, ncols=4, loc="outside upper center", fontsize=8)
    if checks:
        if all(c.predicted_error is not None for c in checks):
            below.plot([c.predicted_error for c in checks], color=_HELD, label="predicted")
        below.plot([c.measured_error for c in checks], color=_FORECAST, label="measured")
        below.set_ylabel("error (RMS)")
        below.legend(frameon=False)
        below.set_xlabel("step")
    else:
        axes.set_xlabel("step")
    return as_svg(figure)


def _boxes(cells: Sequence[tuple[int, int]]) -> Outline:
    """Boxes around cells, each a step and a row, as one path."""
    corners = np.array([[-0.47, -0.44], [0.47, -0.44], [0.47, 0.44], [-0.47, 0.44], [-0.47, -0.44]])
    return Outline.make_compound_path(*(Outline(corners + cell, closed=True) for cell in cells))


def _short(path: str) -> str:
    """A part's name that fits beside a row: `down 0 attention 1` for `down_blocks.0.attentions.1`."""
    singular = re.sub(r"s\.(\d+)$", r" \1", re.sub(r"_blocks?\b", "", path))
    return re.sub(r"(sampler) 0$", r"\1", singular).replace(".", " ")


def time_psnr_svg(points: Sequence[Point]) -> str:
    """PSNR to the full run over the share of its time, a line for each role."""
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    for role in dict.fromkeys(point[0] for point in points):
        line = sorted((share, psnr) for known, _, share, psnr in points if known == role)
        colour, dashes = (_ROLE_COLOURS[role], "-") if role in _ROLE_COLOURS else (_OTHER, "--")
        axes.plot([x for x, _ in line], [y for _, y in line], marker="o", label=role, color=colour, linestyle=dashes)
    axes.set_xlabel("time of the full run")
    axes.set_ylabel("PSNR to the full run, dB")
    axes.set_title("On validation prompts", loc="left")
    axes.legend(frameon=False)
    return as_svg(figure)


def steps_table(checks: Sequence[StepCheck]) -> Table:
    """Every step's action, and its error and time as predicted and as measured."""
    table = Table(title="Schedule", title_justify="left")
    for name in ("step", "action", "error, predicted", "measured", "time, predicted", "measured"):
        table.add_column(name, justify="left" if name == "action" else "right")
    for number, check in enumerate(checks):
        table.add_row(
            str(number),
            check.action,
            "–" if check.predicted_error is None else f"{check.predicted_error:.3g}",
            f"{check.measured_error:.3g}",
            format_seconds(check.predicted_seconds),
            format_seconds(check.measured_seconds),
        )
    return table


def contestants_table(rows: Sequence[Row]) -> Table:
    """The schedule and what else fits into its time."""
    table = Table(title="In the same time", title_justify="left")
    for name in ("", "way", "time", "PSNR, validation", "PSNR, test"):
        table.add_column(name, justify="left" if name in ("", "way") else "right")
    for role, way, share, validation, test in rows:
        table.add_row(role, way, f"{share:.3f}x", validation, test)
    return table
