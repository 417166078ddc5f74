"""What is shown of a calibrated switching schedule: each member's damage per step, and what was tried beside it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from asdm_compress.inheritance.actions import Action
from asdm_compress.reporting.plots import as_svg
from asdm_compress.scheduling.swaps import Swaps

Row = tuple[str, str, float, float | None, str]  # role, way, share of the time, final-latent error, test


def damages_svg(swaps: Swaps, chosen: Sequence[Action]) -> str:
    """The mean squared error of the final latent when one step is taken by each option; what was chosen is filled."""
    figure = Figure(figsize=(8, 3.4))
    axes = figure.add_subplot()
    for option in dict.fromkeys(option for _, option in swaps.moved):
        steps = [step for step, other in swaps.moved if other == option]
        errors = [float(np.square(swaps.moved[step, option], dtype=np.float64).mean()) for step in steps]
        (line,) = axes.plot(steps, errors, marker="o", markerfacecolor="none", label=option.name)
        taken = [(step, error) for step, error in zip(steps, errors, strict=True) if chosen[step] == option]
        axes.plot(*zip(*taken, strict=True) if taken else ([], []), "o", color=line.get_color())
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("error of the final latent")
    axes.set_title("What each step does when another takes it (filled: chosen)", loc="left")
    axes.legend(frameon=False)
    return as_svg(figure)


def entrants_table(rows: Sequence[Row]) -> Table:
    """What was tried in the same time."""
    table = Table(title="In the same time", title_justify="left")
    for column in ("", "way", "time", "final-latent error", "PSNR on test prompts"):
        table.add_column(column)
    for role, way, share, error, test in rows:
        table.add_row(role, way, f"{share:.3f}x", "" if error is None else f"{error:.3g}", test)
    return table
