"""Plots of what `bench_frontier.py` has found: time of a whole image against fidelity, quality and latents' error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from asdm_compress.reporting.plots import as_svg

COLOURS: Final = {
    "full model": "#6b7280", "DeepCache": "#a16207", "guidance reuse": "#0891b2", "inheritance": "#16a34a",
    "switching": "#2563eb", "T-Stitch": "#7c3aed", "all together": "#dc2626",
}  # fmt: skip
RIVALS: Final = ("full model", "DeepCache", "T-Stitch")  # what is there without us
NEARNESS: Final = ("psnr", "latent_error")  # to the full run
MORE_IS_BETTER: Final = ("psnr", "right")
AXES: Final = {
    "psnr": ("psnr", "PSNR to the full run, dB"),
    "accuracy": ("right", "captions wholly right, of {count}"),
    "frechet": ("frechet", "Fréchet distance to rendered scenes"),
}
LATENTS: Final = ("switching", "T-Stitch")


def write_plots(content: Mapping[str, Any], folder: Path) -> None:
    """All of them, as far as there are rows."""
    for name, (key, label) in AXES.items():
        svg = _plot(content, key, label.format(count=content["reference"]["count"]))
        (folder / f"frontier_{name}.svg").write_text(svg, encoding="utf-8")
    if all(any(row["role"] == role for row in content["rows"]) for role in LATENTS):
        svg = _plot(content, "latent_error", "mean squared error of the final latents", LATENTS)
        (folder / "frontier_switching.svg").write_text(svg, encoding="utf-8")


def beaten(rows: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    """Those rows of ours that a rival's is at least as good as in no more time."""
    sign = 1 if key in MORE_IS_BETTER else -1
    rivals = [row for row in rows if row["role"] in RIVALS]
    return [
        row
        for row in rows
        if row["role"] not in RIVALS
        and any(other["image_share"] <= row["image_share"] and sign * other[key] >= sign * row[key] for other in rivals)
    ]


def _plot(content: Mapping[str, Any], key: str, title: str, roles: tuple[str, ...] = ()) -> str:
    figure = Figure(figsize=(7, 4.5))
    axes = figure.add_subplot()
    rows = [row for row in content["rows"] if not roles or row["role"] in roles]
    if key in NEARNESS:  # The full run against itself would leave no room for the rest.
        rows = [row for row in rows if row["latent_error"] and row["criterion"] == "fidelity"]
    for role, criterion in dict.fromkeys((row["role"], row["criterion"]) for row in rows):
        some = [row for row in rows if (row["role"], row["criterion"]) == (role, criterion)]
        points = sorted((row["image_share"], row[key]) for row in some)
        # Ways of the full model are of several samplers, between which there is no line.
        style = "o" if role == "full model" else "o-" if criterion == "fidelity" else "s--"
        label = role if criterion == "fidelity" else f"{role}, chosen for quality"
        axes.plot(*zip(*points, strict=True), style, label=label, color=COLOURS[role], markersize=4)
    everything = content["rows"] if key not in NEARNESS else [row for row in content["rows"] if row["latent_error"]]
    lost = [row for row in beaten(everything, key) if row in rows]
    if lost:
        places = [row["image_share"] for row in lost], [row[key] for row in lost]
        axes.plot(*places, "x", color="#111827", markersize=9, label="a rival is as good in no more time")
    reference = content["reference"].get(key)
    if reference is not None:
        axes.axhline(reference, color="#9ca3af", linewidth=1, linestyle="--")
        axes.annotate("the full run", (0.99, reference), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    if roles:
        axes.set_yscale("log")
    axes.set_xlabel("time of a whole image, over the full run's")
    axes.set_ylabel(title)
    axes.legend(frameon=False)
    return as_svg(figure)
