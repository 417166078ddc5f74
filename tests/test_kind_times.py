"""What every kind of step takes is timed once, for all samplers that have the same kinds."""

from __future__ import annotations

from dataclasses import replace

from asdm_compress.core.units import parse_budget
from asdm_compress.models.loading import with_parts
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scheduling.goals import Goal
from asdm_compress.workflows.calibrate import CalibrateSettings, prepare, timed_batch
from asdm_compress.workflows.calibrated import own_splits
from asdm_compress.workflows.progress import Silent

PROMPTS = ("a small red circle", "a large blue square", "a green ring")


def test_known_times_are_taken_for_the_same_kinds_and_no_others(pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("ASDM_COMPRESS_CACHE", str(tmp_path))
    settings = CalibrateSettings(
        Goal(limit=parse_budget(["latency=0.7x"])[0]), SamplingSettings(3, 1.0), None, PROMPTS, 1, 1, 1, repeats=2,
        corrections=False, curve=0,
    )  # fmt: skip
    splits = own_splits(PROMPTS, 1, 1, 1)
    batch = timed_batch(pipeline, splits, settings)

    def times(sampler, known=None):
        here = with_parts(pipeline, scheduler=make_scheduler(sampler, pipeline))
        return prepare(here, settings, splits, batch, Silent(), known).every_times

    first = times("ddim")
    assert times("dpm++", first).seconds == first.seconds
    others = replace(first, lights=first.lights[::-1])
    anew = times("dpm++", others)
    assert anew.seconds != first.seconds
    assert anew.lights == first.lights
