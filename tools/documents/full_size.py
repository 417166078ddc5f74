"""What was measured at the sizes of published checkpoints: `apply`, `assemble`, and the recipes that ship."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from asdm_compress.core.recipe import load_recipe
from documents.figures import RESULTS, machine, minutes, results, share, source, table

RECIPES: Final = Path(__file__).parents[2] / "recipes"


def applied() -> str:
    """What `apply` takes at full size."""
    rows = results("apply")["rows"]
    return table(
        ("model", "recipe", "student", "peak memory", "1.25 of the student and the largest block", "seconds",
         "copying the student"),
        [
            [
                r["model"], f"`{r['recipe']}`", f"{r['student_gb']:.2f} GB", f"{r['peak_gb']:.2f} GB",
                f"{r['bound_gb']:.2f} GB", f"{r['seconds_beside_start']:.1f} s", f"{r['copy_seconds']:.1f} s",
            ]
            for r in rows
        ],
    )  # fmt: skip


def applied_setting() -> str:
    """What of the peak is not the student's, and of the time."""
    found = results("apply")
    return (
        f"on {machine(found)['device']}: starting, with everything that is imported, takes {found['start_gb']:.2f} GB "
        f"of the peak and {found['start_seconds']:.1f} s, which the table's seconds leave out"
    )


def assembled_at_full_size() -> str:
    """What the main job takes on Stable Diffusion 1.5, and a run of it that was killed and went on."""
    found, again = results("assemble_full_size"), results("assemble_full_size_resumed")
    kills = [f"after {minutes(run['seconds'])}, with {run['damages']} damages kept" for run in again["killed"]]
    where, of_again = (
        source(name, "bench_assemble_full_size") for name in ("assemble_full_size", "assemble_full_size_resumed")
    )
    return (
        f"{_assembled(found)}, channels-last ({where}). An older run, not so, killed {' and '.join(kills)}, went on "
        f"from there: {_assembled(again)} in all ({of_again})"
    )


def _assembled(found: Any) -> str:
    where = machine(found)
    threads = f"{where['threads']} thread{'s' if where['threads'] > 1 else ''}"
    peak = max(run["peak_gb"] for run in (found, *found["killed"]))
    return (
        f"{minutes(found['seconds'])} on {threads} of {where['device']} beside light work, where one pass of the "
        f"teacher took {found['evidence']['teacher']['latency']:.1f} s, {found['damages']} damages, "
        f"{peak:.1f} GB of memory at most"
    )


def latency_recipes() -> str:
    """The recipes that ship for Stable Diffusion at shares of its latency."""
    lines, rows = [], {}
    for path in sorted(p for p in RESULTS.glob("recipes*.json") if p.suffixes == [".json"]):
        measured = results(path.stem)
        rows |= {
            (r["model"], json.dumps(r["edits"], sort_keys=True)): (r, measured["device"]) for r in measured["rows"]
        }
    for path in sorted(
        RECIPES.glob("sd*-latency-*.yaml"), key=lambda path: (path.stem.split("-latency-")[0], -float(path.stem[-4:-1]))
    ):
        recipe = load_recipe(path)
        edits = recipe.as_edits()
        row, device = rows[recipe.base.model, json.dumps(dict(edits), sort_keys=True)]
        lines.append([f"`{path.stem}`", len(edits), share(row["latency_ratio"]), share(row["macs_ratio"]), device])
    return table(("recipe", "edits", "latency", "MACs", "measured on"), lines)
