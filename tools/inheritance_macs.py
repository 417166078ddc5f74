"""The MACs of what `bench_inheritance.py` tries, beside those of the full run: what does not depend on the machine."""

from __future__ import annotations

import functools
import json
from typing import Any

from diffusers import StableDiffusionPipeline
from inheritance_results import Kept
from rival_schedules import encoder_schedules, gates

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import FULL
from asdm_compress.inheritance.costs import counts_alike, fitted_macs, run_macs
from asdm_compress.inheritance.evaluator import Evaluator
from asdm_compress.inheritance.modes import parse_mode
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.shapes import value_shapes
from asdm_compress.models.loading import load_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.profiling.counting import ModuleCounts, count
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scheduling.measure import sampler_timeline
from asdm_compress.scheduling.menu import cut_sources
from asdm_compress.scheduling.ways import Way


@functools.cache
def _counts(unet: Any, rows: int, tokens: int) -> ModuleCounts:
    size = int(unet.config["sample_size"])
    return count(unet, rows, size, size, tokens)


def planned_macs(pipeline: StableDiffusionPipeline, schedule: Schedule, settings: SamplingSettings) -> int:
    """The MACs of a run for one image."""
    unet, guided = pipeline.unet, settings.guidance > 1
    rows, size = (2 if guided else 1), int(unet.config["sample_size"])
    tokens = int(pipeline.tokenizer.model_max_length)
    plan = Evaluator(unet).plan(schedule.actions, sampler_timeline(pipeline, settings.steps), guided)
    planned = sum(run_macs(plan, counts_alike(_counts(unet, rows, tokens), _counts(unet, 1, tokens))))
    shapes = value_shapes(unet, cut_sources(unet), size, size) if schedule.corrections else {}
    return planned + sum(fitted_macs(plan, schedule.corrections, shapes, rows))


def macs_share(pipeline: StableDiffusionPipeline, way: Way, settings: SamplingSettings) -> float:
    """A way's planned MACs over those of the full run."""
    if way.rule is None:
        return way.steps / settings.steps
    schedule = way.rule if isinstance(way.rule, Schedule) else Schedule(way.rule.actions(settings.steps))
    full = Schedule((FULL,) * settings.steps)
    return planned_macs(pipeline, schedule, settings) / planned_macs(pipeline, full, settings)


def add_shares(kept: Kept) -> None:
    """Count the MACs of all rows on disk that lack them and whose way its name tells, whatever their settings."""
    kept.content = json.loads(kept.path.read_text(encoding="utf-8"))
    pipeline = load_pipeline("mini-sd", LoadOptions())
    for row in kept.content["rows"]:
        if "macs_share" in row or "way" not in row:
            continue
        pipeline.scheduler = make_scheduler(row["sampler"], pipeline)
        settings = SamplingSettings(row["steps"], kept.content["settings"]["guidance"])
        if "planned_macs" in row:
            full = planned_macs(pipeline, Schedule((FULL,) * row["steps"]), settings)
            row["macs_share"] = row["planned_macs"] / full
            continue
        way = _way_called(row["way"], row["steps"], pipeline.unet)
        if way is not None:
            row["macs_share"] = macs_share(pipeline, way, settings)
    kept.write()


def _way_called(name: str, steps: int, unet: Any) -> Way | None:
    """The way of a name; None where the name does not tell."""
    known = {way.name: way for way in (*encoder_schedules(unet, steps), *gates(unet, steps))}
    if name in known:
        return known[name]
    if " steps of " in name:
        return Way(name, int(name.split(maxsplit=1)[0]), 0.0)
    try:
        return Way(name, steps, 0.0, parse_mode(name))
    except AsdmError:
        return None
