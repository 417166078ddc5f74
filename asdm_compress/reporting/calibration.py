"""What is shown of a calibrated schedule: its steps as a picture and as a table, and what was tried beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.table import Table

from asdm_compress.core.units import format_seconds
from asdm_compress.inheritance.actions import Action
from asdm_compress.inheritance.forecast import Forecast
from asdm_compress.inheritance.graph import PREDICTION
from asdm_compress.reporting.plots import as_svg
from asdm_compress.scheduling.check_steps import StepCheck

_COMPUTED: Final = "#2563eb"
_HELD: Final = "#9ca3af"
_FORECAST: Final = "#ea580c"
_CORRECTED: Final = "#9f1239"
_OTHER: Final = "#16a34a"
_GUIDANCE: Final = "guidance difference"
Row = tuple[str, str, float, str, str]  # role, way, share of the time, validation, test
Point = tuple[str, str, float, float]  # role, way, share of the time, PSNR in dB
_ROLE_COLOURS: Final = {"schedule": _FORECAST, "DeepCache": _COMPUTED, "fewer steps": _HELD}


def steps_svg(actions: Sequence[Action], checks: Sequence[StepCheck]) -> str:
    """Places over steps: computed, held, forecast or corrected; below, where it was checked, each step's error."""
    places = list(dict.fromkeys(entry.place for action in actions for entry in action.inherits))
    rows = [_GUIDANCE, *places]
    figure = Figure(figsize=(8, 0.32 * len(rows) + (3.6 if checks else 1.6)))
    if checks:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[0.32 * len(rows) + 0.4, 1.6])
    else:
        axes = figure.add_subplot()
    for step, action in enumerate(actions):
        colours = {e.place: _CORRECTED if e.corrected else _colour(e.forecast) for e in action.inherits}
        if action.guidance is not None:
            colours[_GUIDANCE] = _colour(action.guidance)
        for number, place in enumerate(rows):
            axes.barh(number, 0.92, left=step - 0.46, height=0.85, color=colours.get(place, _COMPUTED))
    axes.set_yticks(range(len(rows)), ["skip" if place == PREDICTION else place for place in rows])
    axes.invert_yaxis()
    axes.set_title("What every step computes and inherits", loc="left")
    kinds = {"computed": _COMPUTED, "held": _HELD, "forecast": _FORECAST, "corrected": _CORRECTED}
    legend = [Patch(color=colour, label=kind) for kind, colour in kinds.items()]
    axes.legend(handles=legend, frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
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


def _colour(forecast: Forecast) -> str:
    return _FORECAST if forecast.order else _HELD


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
