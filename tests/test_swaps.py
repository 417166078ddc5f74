"""Exchanges of single steps: what forks of one run end in is what a pipeline samples by the exchanged schedule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.inheritance.actions import Action, conditional_only, cut, inherit
from asdm_compress.inheritance.forecast import LINEAR, parse_forecast
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scheduling.measure import sampler_timeline
from asdm_compress.scheduling.swaps import Bench
from asdm_compress.scheduling.switch_times import SKIP
from asdm_compress.switching.schedules import SwitchingSchedule, noise_of
from asdm_compress.switching.switched_unet import SwitchedUNet2DConditionModel

TEACHER, SMALL = Action(member="teacher"), Action(member="small")
PROMPTS = ("a small red circle", "a large blue square", "a green ring")
STEPS = 6


def of(member, action):
    return replace(action, member=member.member)


CUT = of(TEACHER, cut(0, LINEAR))
DEEP = of(TEACHER, cut(2, parse_forecast("order2")))
BRANCHES = of(TEACHER, inherit(["mid_block", "up_blocks.1.layers.0"]))
HALF = of(TEACHER, conditional_only(LINEAR))
HALF_CUT = of(TEACHER, conditional_only(LINEAR, cut(2, LINEAR)))
EVERY = (TEACHER, SMALL, CUT, DEEP, BRANCHES, HALF, HALF_CUT, of(SMALL, conditional_only(LINEAR)), SKIP)


@pytest.fixture(scope="module")
def switched(pipeline, unet):
    pipe = StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    pipe.scheduler = make_scheduler("ddim", pipeline)
    timeline = sampler_timeline(pipe, STEPS)
    schedule = SwitchingSchedule((TEACHER,) * STEPS, timeline.timesteps, noise_of(pipe.scheduler))
    small = assemble(unet, Plan({"mid_block": "drop", "down_blocks.3.resnets.1": "drop"}))
    pipe.unet = SwitchedUNet2DConditionModel.of({"teacher": unet, "small": small}, schedule)
    return pipe


@pytest.mark.parametrize(
    "around",
    [
        (TEACHER, CUT, TEACHER, HALF_CUT, SKIP, TEACHER),
        (TEACHER, SMALL, TEACHER, CUT, BRANCHES, SMALL),
    ],
    ids=["inheriting", "switching"],
)
def test_forks_end_where_whole_runs_do(switched, around):
    bench = Bench(switched, sampler_timeline(switched, STEPS), PROMPTS[:1], SamplingSettings(STEPS, 4.0))
    truth = bench.final_latents((TEACHER,) * STEPS)
    swaps = bench.measure(around, EVERY, truth)
    assert {option for _, option in swaps.moved} == set(EVERY)
    assert np.abs(swaps.error + truth - bench.final_latents(around)).max() < 1e-4
    for (step, option), moved in swaps.moved.items():
        actions = (*around[:step], option, *around[step + 1 :])
        alone = bench.final_latents(actions) - truth
        assert np.abs(swaps.error + moved - alone).max() < 2e-4, (step, option.name)


def test_what_is_known_is_not_measured_again_whatever_it_is_asked_for_with(switched, tmp_path, monkeypatch):
    bench = Bench(switched, sampler_timeline(switched, STEPS), PROMPTS, SamplingSettings(STEPS, 4.0), tmp_path, batch=2)
    around = (TEACHER,) * STEPS
    truth = bench.final_latents(around)

    class KilledError(Exception):
        pass

    def kill(done, total):
        if done == STEPS:  # in the middle of the first batch of two
            raise KilledError

    with pytest.raises(KilledError):
        bench.measure(around, (SMALL, SKIP), truth, kill)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(kept) == STEPS // 2
    swaps = bench.measure(around, (SMALL, SKIP), truth)
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}.items()
    more = bench.measure(around, (SMALL, CUT), truth)
    once = Bench(switched, bench.timeline, PROMPTS, bench.settings, None, 2).measure(around, (SMALL, CUT), truth)
    for pair, moved in once.moved.items():
        assert np.array_equal(moved, more.moved[pair])
    assert all(np.array_equal(swaps.moved[t, SMALL], more.moved[t, SMALL]) for t in range(STEPS))
    calls = []
    monkeypatch.setattr(SwitchedUNet2DConditionModel, "forward", lambda *a, **k: calls.append(a))
    assert np.array_equal(bench.measure(around, (CUT, SKIP, SMALL), truth).error, swaps.error)
    assert calls == []
