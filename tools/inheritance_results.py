"""What `bench_inheritance.py` has measured: kept on disk cell by cell, summed up, and drawn."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from matplotlib.figure import Figure
from measuring import RESULTS, Resumable, code_hash
from mini_sd.weights import bundled_weights

from asdm_compress.inheritance.actions import FULL, Action, Inherit
from asdm_compress.inheritance.forecast import parse_forecast
from asdm_compress.inheritance.graph import PREDICTION
from asdm_compress.inheritance.places import Thing
from asdm_compress.models.loading import load_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.reporting.calibration import steps_svg
from asdm_compress.reporting.plots import as_svg

SLACK: Final = 1.02  # by which a time may be over the budget
CACHES: Final = ("DeepCache", "DeepCache, not uniform", "Faster Diffusion", "T-GATE", "Block Caching")
CACHE_IN_FEWER_STEPS: Final = "DeepCache in fewer steps"  # which nobody has published, but anybody could try
# What rows come from, beside the weights.
PACKAGES: Final = ("inheritance", "scheduling", "sampling")
TOOLS: Final = ("bench_inheritance", "inheritance_ablations", "inheritance_results", "rival_schedules")
LINES: Final = {
    "calibrated": ("calibrated (ours)", "#ea580c", "o"),
    "DeepCache": ("DeepCache", "#2563eb", "s"),
    "DeepCache, not uniform": ("DeepCache, not uniform", "#60a5fa", "D"),
    "DeepCache in fewer steps": ("DeepCache in fewer steps", "#0891b2", "p"),
    "Block Caching": ("Block Caching", "#16a34a", "^"),
    "Faster Diffusion": ("Faster Diffusion", "#a16207", "v"),
    "T-GATE": ("T-GATE", "#9333ea", "P"),
    "fewer steps": ("fewer steps", "#9ca3af", "X"),
    "fewer steps, best sampler": ("fewer steps, best sampler", "#4b5563", "x"),
}
Rows = list[dict[str, Any]]


def summary(rows: Rows) -> Rows:
    """For every cell: ours over the best of each kind of rival, in dB, and when ours is as good as the best cache."""
    found = []
    cells = dict.fromkeys((r["sampler"], r["steps"], r["budget"]) for r in rows if r["role"] == "calibrated")
    for sampler, steps, budget in cells:
        here = [r for r in rows if (r["sampler"], r["steps"], r.get("budget")) == (sampler, steps, budget)]
        own = next(r for r in here if r["role"] == "calibrated")
        cache = max((r for r in here if r["role"] in CACHES), key=lambda r: r["psnr"], default=None)
        fewer = max((r for r in here if r["role"].startswith("fewer steps")), key=lambda r: r["psnr"], default=None)
        line = sorted(
            (r["psnr"], r["share"])
            for r in rows
            if (r["sampler"], r["steps"], r["role"]) == (sampler, steps, "calibrated")
        )
        row = {"sampler": sampler, "steps": steps, "budget": budget, "ours": own["psnr"], "share": own["share"]}
        row["within_budget"] = own["share"] <= budget * SLACK
        if cache is not None:
            row |= {"best_cache": cache["role"], "its_share": cache["share"]}
            row["over_best_cache"], row["over_best_cache_interval"] = own["gains"][cache["role"]]
            if line[0][0] <= cache["psnr"] <= line[-1][0]:
                same = float(np.interp(cache["psnr"], [p for p, _ in line], [s for _, s in line]))
                row["time_for_the_same_psnr"] = same / cache["share"]
            elif cache["psnr"] < line[0][0]:  # even our fastest schedule is better
                row["time_for_the_same_psnr_below"] = line[0][1] / cache["share"]
        if CACHE_IN_FEWER_STEPS in own["gains"]:
            over, interval = own["gains"][CACHE_IN_FEWER_STEPS]
            row |= {"over_cache_in_fewer_steps": over, "over_cache_in_fewer_steps_interval": interval}
        if fewer is not None:
            row["fewer_steps"] = fewer["way"]
            row["over_fewer_steps"], row["over_fewer_steps_interval"] = own["gains"][fewer["role"]]
        if own["predicted_share"]:
            row["time_off"] = own["predicted_share"] / own["share"] - 1
        row["macs_as_planned"] = own["planned_macs"] == own["executed_macs"]
        found.append(row)
    return found


def picture(rows: Rows) -> str:
    """PSNR over measured time, one panel for every sampler and number of steps."""
    rows = [row for row in rows if row["role"] in LINES]
    shown = {role: line for role, line in LINES.items() if any(row["role"] == role for row in rows)}
    panels = list(dict.fromkeys((row["sampler"], row["steps"]) for row in rows))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3.4 * lines + 0.7), layout="constrained")
    every = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    for axes, (sampler, steps) in zip(every, panels, strict=False):
        for role, (label, colour, marker) in shown.items():
            points = sorted(
                (row["share"], row["psnr"])
                for row in rows
                if (row["role"], row["sampler"], row["steps"]) == (role, sampler, steps)
            )
            ours = role == "calibrated"
            style = {"linewidth": 2.4 if ours else 1.2, "markersize": 6 if ours else 4, "zorder": 3 if ours else 2}
            # Where there are none, too: the legend is that of all panels.
            axes.plot([x for x, _ in points], [y for _, y in points], color=colour, marker=marker, label=label, **style)
        axes.set_title(f"{sampler}, {steps} steps", loc="left", fontsize=10)
        axes.set_xlabel("time of the full run")
        axes.set_ylabel("PSNR to the full run, dB")
        axes.grid(alpha=0.25)
    figure.legend(
        *every[0].get_legend_handles_labels(),
        frameon=False,
        fontsize=8,
        ncols=2 * min(columns, 2),
        loc="outside upper center",
    )
    return as_svg(figure)


def actions_called(names: str) -> tuple[Action, ...]:
    """The actions of these names, as rows hold them; see `Action.name`."""
    return tuple(_action(name) for name in names.split())


def _action(name: str) -> Action:
    found = FULL
    # "+fit" marks what stands before it; "+" goes between places.
    for part in [] if name == "full" else name.replace("+fit", "!").split("+"):
        where, _, how = part.rstrip("!").partition(":")
        if where == "conditional":
            found = replace(found, guidance=parse_forecast(how))
            continue
        things: tuple[Thing, ...] = ("branch", "denoised")
        thing = next((thing for thing in things if where.endswith(f".{thing}")), "output")
        place = where.removesuffix(f".{thing}")
        place = PREDICTION if place == "skip" else place
        entry = Inherit(place, thing, parse_forecast(how), part.endswith("!"))
        found = replace(found, inherits=(*found.inherits, entry))
    return found


def shown_row(rows: Rows) -> dict[str, Any] | None:
    """The first sampler's schedule for the middle one of the times that are done."""
    ours = [row for row in rows if row["role"] == "calibrated"]
    of_first = sorted(
        (row for row in ours if (row["sampler"], row["steps"]) == (ours[0]["sampler"], ours[0]["steps"])),
        key=lambda row: row["budget"],
    )
    return of_first[len(of_first) // 2] if of_first else None


def _name(cell: Sequence[Any]) -> str:
    return " ".join(map(str, cell))


def _code() -> str:
    return code_hash(*TOOLS, packages=PACKAGES)


def _is_of(row: Mapping[str, Any], cell: Sequence[Any]) -> bool:
    """Whether a row is a cell's; those without a budget are the ablations'."""
    sampler, steps, budget = cell
    alone = row["role"].startswith("search alone") or "budget" not in row
    if (row["sampler"], row["steps"]) != (sampler, steps):
        return False
    return alone if budget == "ablations" else not alone and row["budget"] == budget


@dataclass(slots=True)
class Kept(Resumable):
    """The results so far, on disk after every cell; runs for different samplers add to one file.

    With `renews` cells that other code has measured are not done, and what is there of them is replaced.
    """

    renews: bool = False

    @staticmethod
    def of(arguments: argparse.Namespace, about: str, folder: Path = RESULTS) -> Kept:
        """For what is asked for."""
        names = ("prompts", "validation_prompts", "test_prompts", "guidance", "repeats")
        setting = {"mini_sd": bundled_weights(), "settings": {name: getattr(arguments, name) for name in names}}
        device = torch.device("cpu")
        kept = Kept("inheritance", about, device, folder, setting=setting, writes=not arguments.quick)
        kept.renews = arguments.renew
        kept.begin(arguments.fresh)
        return kept

    def has(self, cell: Sequence[Any]) -> bool:
        """Whether a cell is done."""
        if self.renews and self.facts.get("code_by_cell", {}).get(_name(cell)) != _code():
            return False
        return list(cell) in self.facts.get("cells", [])

    def add_cell(self, cell: Sequence[Any], rows: Rows, seconds: float, load: float) -> None:
        """Write a cell that is done; `load` is how many cores other processes used meanwhile."""
        if not self.reload():
            raise SystemExit(f"{self.path} is of another setting by now: another process has begun it anew")
        if list(cell) not in self.facts.setdefault("cells", []):
            self.facts["cells"].append(list(cell))
        self.rows = [row for row in self.rows if not _is_of(row, cell)] + rows
        name = _name(cell)
        self.facts.setdefault("seconds", {})[name] = round(seconds, 1)
        self.facts.setdefault("code_by_cell", {})[name] = _code()
        self.facts.setdefault("load_by_cell", {})[name] = round(load, 2)
        self.facts["summary"] = summary(self.rows)
        self.write()

    def write(self) -> None:
        """To disk, with the pictures, unless nothing is to be written."""
        Resumable.write(self)
        shown = shown_row(self.rows) if self.writes else None
        if shown is not None:
            self.path.with_suffix(".svg").write_text(picture(self.rows), encoding="utf-8")
            drawn = steps_svg(load_pipeline("mini-sd", LoadOptions()).unet, actions_called(shown["steps_of_it"]), ())
            self.path.with_name(f"{self.path.stem}_steps.svg").write_text(drawn, encoding="utf-8")
