"""The MACs of what `bench_inheritance.py` tries, beside those of the full run: what does not depend on the machine."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from diffusers import StableDiffusionPipeline

from asdm_compress.inheritance.actions import FULL
from asdm_compress.inheritance.costs import counts_alike, fitted_macs, run_macs
from asdm_compress.inheritance.evaluator import Evaluator
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.shapes import value_shapes
from asdm_compress.profiling.counting import ModuleCounts, count
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
    schedule = way.rule if isinstance(way.rule, Schedule) else Schedule(way.rule.actions(way.steps))
    full = Schedule((FULL,) * settings.steps)
    own = planned_macs(pipeline, schedule, replace(settings, steps=way.steps))
    return own / planned_macs(pipeline, full, settings)
