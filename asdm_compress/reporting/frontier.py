"""What was tried within budgets of time: nearness to the reference, or what pictures are worth, over time."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from rich.table import Table

from asdm_compress.reporting.plots import as_svg

Point = tuple[str, float, float]  # role, share of the time of a whole image, PSNR in dB or what is shown


def tried_table(rows: Sequence[tuple[bool, str, float, str, str]], what: str = "PSNR") -> Table:
    """The same as a table: whether it is the best within the time, the way, its time, and what chose it, twice."""
    table = Table(title="What was tried; validation prompts chose", title_justify="left")
    for name in ("", "way", "time", f"{what}, validation", f"{what}, test"):
        table.add_column(name, justify="left" if name in ("", "way") else "right")
    for is_best, way, share, validation, test in rows:
        table.add_row("best" if is_best else "", way, f"{share:.3f}x", validation, test)
    return table


def frontier_svg(
    points: Sequence[Point], share: float, what: str = "PSNR to the full run, dB", full: float | None = None
) -> str:
    """PSNR, or what else is given, over time by role; the budget is a line, and so is what the full run has."""
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    for role in dict.fromkeys(role for role, _, _ in points):
        some = sorted((x, y) for other, x, y in points if other == role)
        axes.plot([x for x, _ in some], [y for _, y in some], "o", label=role)
    axes.axvline(share, color="#9ca3af", linewidth=1)
    axes.set_xlabel("time of a whole image, over the full run's")
    axes.set_ylabel(what)
    if full is not None:
        axes.axhline(full, color="#9ca3af", linewidth=1, linestyle="--", label="full run")
    axes.set_title("What was tried", loc="left")
    axes.legend(frameon=False)
    return as_svg(figure)
