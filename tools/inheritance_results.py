"""What `bench_inheritance.py` has measured: kept on disk cell by cell, summed up, and drawn."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from measuring import fingerprint

from asdm_compress.reporting.plots import as_svg

RESULTS: Final = Path(__file__).parent / "results"
SLACK: Final = 1.02  # by which a time may be over the budget
CACHES: Final = ("DeepCache", "DeepCache, not uniform", "Faster Diffusion", "T-GATE", "Block Caching")
Rows = list[dict[str, Any]]


def summary(rows: Rows) -> Rows:
    """For every cell: ours over the best cache and over fewer steps in dB, and the time at which ours is as good."""
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
            if line[0][0] <= cache["psnr"]:
                same = float(np.interp(cache["psnr"], [p for p, _ in line], [s for _, s in line]))
                row["time_for_the_same_psnr"] = same / cache["share"]
            else:  # even our fastest schedule is better
                row["time_for_the_same_psnr_below"] = line[0][1] / cache["share"]
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
    rows = [row for row in rows if "psnr" in row and not row["role"].startswith("search alone")]
    panels = list(dict.fromkeys((row["sampler"], row["steps"]) for row in rows))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * lines), layout="constrained")
    every = figure.subplots(lines, columns, squeeze=False).flat
    for axes in list(every)[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(figure.axes, panels, strict=False):
        for role in dict.fromkeys(row["role"] for row in rows):
            points = sorted(
                (row["share"], row["psnr"])
                for row in rows
                if row["role"] == role and (row["sampler"], row["steps"]) == panel
            )
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=role)
        axes.set_title(f"{panel[0]}, {panel[1]} steps", loc="left")
        axes.set_xlabel("time of the full run")
        axes.set_ylabel("PSNR to the full run, dB")
    figure.axes[0].legend(frameon=False, fontsize=7)
    return as_svg(figure)


class Kept:
    """The results so far, on disk after every cell; those of other settings are begun anew."""

    def __init__(self, path: Path, arguments: argparse.Namespace, fresh: bool) -> None:
        self.path, self.writes = path, not arguments.quick
        names = ("prompts", "test_prompts", "guidance", "repeats")
        self.content: dict[str, Any] = {
            "machine": fingerprint(),
            "settings": {name: getattr(arguments, name) for name in names},
            "cells": [],
            "rows": [],
        }
        if self.writes and path.exists() and not fresh:
            before = json.loads(path.read_text(encoding="utf-8"))
            same = all(before.get(key) == self.content[key] for key in ("machine", "settings"))
            if same:
                self.content = before
            else:
                print("the results there are of other settings: beginning anew", flush=True)

    def has(self, cell: Sequence[Any]) -> bool:
        """Whether a cell is done."""
        return list(cell) in self.content["cells"]

    def add(self, cell: Sequence[Any], rows: Rows, seconds: float, load: float) -> None:
        """Write a cell that is done; `load` is how many cores other processes used meanwhile."""
        self.content["cells"].append(list(cell))
        self.content["rows"] += rows
        name = " ".join(map(str, cell))
        self.content.setdefault("seconds", {})[name] = round(seconds, 1)
        self.content.setdefault("other_load_cores", {})[name] = round(load, 2)
        self.content["summary"] = summary(self.content["rows"])
        self.write()

    def write(self) -> None:
        """To disk, unless nothing is to be written."""
        if self.writes:
            RESULTS.mkdir(exist_ok=True)
            self.path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
            if self.content["rows"]:
                (RESULTS / "inheritance.svg").write_text(picture(self.content["rows"]), encoding="utf-8")
