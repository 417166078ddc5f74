"""The charts of a report: points, lines, heat maps and strips, drawn by hand so that they follow the page's colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from markupsafe import Markup

from asdm_compress.reporting.svg import Scale, axes, box, drawing, line, path, pickable, spanning, tag, text

_WIDTH: Final = 720.0
_LEFT: Final = 64.0
_LEAST: Final = 1e-9
_HUES: Final = 8  # of the page's categorical colours, which repeat beyond


@dataclass(frozen=True, slots=True)
class Dot:
    """A point of a chart, what it is called, and what it tells; `opens` is the part of the page that it shows."""

    x: float
    y: float
    label: str
    lines: tuple[str, ...] = ()
    opens: str | None = None
    kind: str = "dot"


def points_chart(
    dots: Sequence[Dot],
    title: str,
    x_title: str,
    y_title: str,
    x_format: str = "{:g}",
    joined: str | None = "dot",
    log: bool = True,
) -> str:
    """Dots, with a logarithmic ordinate if `log`; those of the kind `joined` are joined by a line from left to right.

    Around those that open something a wide invisible ring makes them easy to hit with a finger.

    On a logarithmic one values of 0, and those that are nothing beside the largest, are drawn at the lower edge.
    """
    height, bottom = 340.0, 290.0
    x = spanning([dot.x for dot in dots], _LEFT, _WIDTH - 16)
    least = max(dot.y for dot in dots) * _LEAST if log else -np.inf
    y = spanning([max(dot.y, least) for dot in dots], bottom, 26, log=log)
    places = sorted((x(d.x), y(d.y)) for d in dots if d.kind == joined)
    drawn = []
    for dot in dots:
        at = (x(dot.x), y(dot.y))
        rings = (
            tag("circle", cx=at[0], cy=at[1], r=14 if dot.opens else 7, class_="target"),
            tag("circle", cx=at[0], cy=at[1], r=3 if dot.kind == "faint" else 6, class_=f"point {dot.kind}"),
        )
        drawn.append(pickable(dot.label, dot.lines, *rings, opens=dot.opens))
    return drawing(
        _WIDTH, height, title, axes(x, y, x_title, y_title, x_format, "{:.0e}" if log else "{:g}"),
        path(places, "series front"), *drawn, role="group",
    )  # fmt: skip


def lines_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    x_title: str,
    y_title: str,
    log: bool = True,
) -> str:
    """Lines with their names at the right end; a series of one point is a dot."""
    height, bottom, stop = 300.0, 250.0, _WIDTH - 150
    everything = [point for points in series.values() for point in points]
    low, high = min(x for x, _ in everything), max(x for x, _ in everything)
    x = Scale(low, high if high > low else low + 1, _LEFT, stop)
    log = log and all(y > 0 for _, y in everything)
    y = spanning([y for _, y in everything], bottom, 26, log=log)
    parts = [axes(x, y, x_title, y_title, "{:,.0f}", "{:.0e}" if log else "{:.3g}")]
    labels = _apart({name: y(points[-1][1]) for name, points in series.items()}, 15, 26, bottom)
    for number, (name, points) in enumerate(series.items()):
        hue = f"hue{number % _HUES}"
        places = [(x(a), y(b)) for a, b in points]
        if len(places) == 1:
            parts.append(tag("circle", cx=places[0][0], cy=places[0][1], r=4, class_=f"point {hue}"))
        parts += [path(places, f"series {hue}"), text(stop + 8, labels[name] + 4, name, f"name {hue}")]
    return drawing(_WIDTH, height, title, *parts)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[tuple[str, str]]],
    title: str,
    column_title: str,
    left: float = 210.0,
) -> str:
    """Cells, each a class and a line to tell, rows from the top. Columns' names are thinned to fit."""
    width = (_WIDTH - left) / len(columns)
    row_height = 17.0
    every = max(1, round(26 / width + 0.49))
    parts: list[Markup] = []
    for i, row in enumerate(rows):
        y = i * row_height
        parts.append(text(left - 6, y + 12.5, _shortened(row, 34), "tick", "end"))
        for j, column in enumerate(columns):
            kind, told = cells[i][j]
            rect = box(left + j * width, y, width - 1, row_height - 1, f"heat {kind}", 2)
            parts.append(pickable(f"{row}, {column_title} {column}", [told], rect))
    bottom = len(rows) * row_height
    for j, column in enumerate(columns):
        if j % every == 0:
            parts.append(text(left + (j + 0.5) * width, bottom + 14, column, "tick", "middle"))
    parts.append(text((left + _WIDTH) / 2, bottom + 32, column_title, "axis-title", "middle"))
    return drawing(_WIDTH, bottom + 40, title, *parts, role="group")


def log_class(value: float, low: float, high: float) -> str:
    """One of the classes `level0` to `level8` for a value on a logarithmic scale; `none` for nothing."""
    if value <= 0:
        return "none"
    if high <= low:
        return "level4"
    share = (np.log(value) - np.log(low)) / (np.log(high) - np.log(low))
    return f"level{int(np.clip(round(8 * float(share)), 0, 8))}"


def routing_chart(shares: Mapping[str, np.ndarray], timesteps: np.ndarray, title: str) -> str:
    """For every convolution a strip over the timesteps, noise at the left: which expert answers, and how they mix.

    `shares` are (T, E) at `timesteps` (T,), falling.
    """
    strip, step = 34.0, 62.0
    x = Scale(float(timesteps[0]), float(timesteps[-1]), 8, _WIDTH - 8)
    places = [x(float(t)) for t in timesteps]
    parts: list[Markup] = []
    for number, (name, of) in enumerate(shares.items()):
        top = number * step + 20
        whole = of / of.sum(axis=1, keepdims=True)
        edges = np.concatenate([np.zeros((len(of), 1)), np.cumsum(whole, axis=1)], axis=1)
        parts.append(text(8, top - 6, name, "name"))
        for expert in range(of.shape[1]):
            upper = [(p, top + strip * (1 - edges[i, expert + 1])) for i, p in enumerate(places)]
            lower = [(p, top + strip * (1 - edges[i, expert])) for i, p in enumerate(places)]
            reigns = timesteps[whole[:, expert] > 0.5]
            told = f"timesteps {reigns.max():.0f} to {reigns.min():.0f}" if len(reigns) else "never the larger share"
            points = " ".join(f"{a:.1f},{b:.1f}" for a, b in [*upper, *reversed(lower)])
            shape = tag("polygon", points=points, class_=f"area hue{expert % _HUES}")
            parts.append(pickable(f"{name}, expert {expert + 1}", [told], shape))
            if len(reigns):
                middle = x(float((reigns.max() + reigns.min()) / 2))
                parts.append(text(middle, top + strip / 2 + 4, str(expert + 1), "on-area", "middle"))
    bottom = len(shares) * step + 4
    for value in (1000, 800, 600, 400, 200, 0):
        at = x(float(np.clip(value, timesteps[-1], timesteps[0])))
        anchor = {1000: "start", 0: "end"}.get(value, "middle")
        parts += [line(at, bottom - 8, at, bottom - 3, "axis"), text(at, bottom + 10, str(value), "tick", anchor)]
    parts.append(
        text(_WIDTH / 2, bottom + 26, "timestep: noise at the left, the image at the right", "axis-title", "middle")
    )
    return drawing(_WIDTH, bottom + 34, title, *parts, role="group")


def _apart(places: Mapping[str, float], distance: float, low: float, high: float) -> dict[str, float]:
    """Places of labels moved so that none lies on another."""
    order = sorted(places, key=lambda name: places[name])
    moved: dict[str, float] = {}
    last = low - distance
    for name in order:
        last = moved[name] = max(places[name], last + distance)
    over = last - high
    return {name: place - max(0.0, over) for name, place in moved.items()}


def _shortened(name: str, most: int) -> str:
    name = name.replace(".transformer_blocks.0", "").replace(".transformer_blocks", "")
    return name if len(name) <= most else "…" + name[1 - most :]
