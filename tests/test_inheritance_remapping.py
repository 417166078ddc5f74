"""A calibrated schedule at another number of steps: what is carried over by σ, and where that is refused."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import FULL, Action, Inherit, conditional_only, cut
from asdm_compress.inheritance.attach import inheriting
from asdm_compress.inheritance.corrections import Correction
from asdm_compress.inheritance.forecast import LINEAR
from asdm_compress.inheritance.remapping import for_this_run, remap
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.schedule_file import save_schedule
from asdm_compress.inheritance.timeline import timeline_of
from asdm_compress.inheritance.validity import mark_of, validity_of
from asdm_compress.sampling.schedulers import make_scheduler

LIGHT, DEEPER = cut(0, LINEAR), cut(2, LINEAR)


def sigmas(count, first=14.0, last=0.03):
    return tuple(np.geomspace(first, last, count).tolist())


def periodic(count, period):
    return tuple(FULL if i % period == 0 else LIGHT for i in range(count))


@settings(deadline=None)
@given(st.lists(st.sampled_from([FULL, LIGHT, DEEPER, conditional_only(LINEAR)]), min_size=1, max_size=60))
def test_the_same_steps_are_left_as_they_are(rest):
    actions = (FULL, *rest)
    assert remap(actions, sigmas(len(actions)), sigmas(len(actions))) == actions


@pytest.mark.parametrize(
    ("before", "after", "period"), [(50, 25, 2), (50, 20, 5), (20, 50, 4), (25, 50, 5), (30, 20, 3)]
)
def test_a_period_stays_a_period_and_the_share_that_computes_stays(before, after, period):
    found = remap(periodic(before, period), sigmas(before), sigmas(after))
    assert found == periodic(after, period)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=3, max_size=60), st.integers(2, 80))
def test_any_schedule_keeps_its_share_and_begins_with_a_computed_step(computed, after):
    actions = (FULL, *(FULL if full else LIGHT for full in computed))
    found = remap(actions, sigmas(len(actions)), sigmas(after))
    share = sum(a == FULL for a in actions) / len(actions)
    assert len(found) == after
    assert found[0] == FULL
    assert abs(sum(a == FULL for a in found) - share * after) <= 2 + 2 * after / len(actions)


def test_it_is_dense_where_it_was_dense_on_the_axis_of_noise_levels():
    early = (*(FULL,) * 10, *(LIGHT,) * 10)
    # The new run takes nearly all of its steps where the old one computed nothing.
    late = tuple(np.concatenate((np.geomspace(14, 1, 4), np.geomspace(0.5, 0.03, 16))).tolist())
    found = remap(early, sigmas(20), late)
    assert found[:4] == (FULL,) * 4
    assert sum(a == FULL for a in found[4:]) <= 1


def test_what_stands_between_comes_from_the_same_noise_levels():
    actions = (FULL, *(DEEPER,) * 9, FULL, *(LIGHT,) * 9)
    found = remap(actions, sigmas(20), sigmas(40))
    # Where two values are as near as each other, either is right: the middle is left out.
    assert set(found[:18]) == {FULL, DEEPER}
    assert set(found[22:]) == {FULL, LIGHT}


def test_corrections_do_not_come_along():
    corrected = Action((Inherit("cut.0", "output", LINEAR, corrected=True),))
    assert set(remap((FULL, corrected, corrected), sigmas(3), sigmas(6))) == {FULL, LIGHT}


@pytest.mark.parametrize(
    ("made", "seen", "says"),
    [
        ((), sigmas(5), "only by σs"),
        (sigmas(4), (), "only by σs"),
        (sigmas(4), (9.0, 9.0, 1.0, 1.0, 0.1), "twice"),
        ((9.0, 9.0, 1.0, 0.1), sigmas(5), "twice"),
        (sigmas(4), sigmas(6, first=900.0), "calibrated for σ from 14 to 0.03"),
        (sigmas(4), sigmas(6, last=1e-5), "calibrated for σ from 14 to 0.03"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(made, seen, says):
    with pytest.raises(AsdmError, match=says):
        remap((FULL, LIGHT, LIGHT, LIGHT)[: len(made) or 4], made, seen)


@pytest.fixture
def make(pipeline):
    def new(kind=StableDiffusionPipeline, scheduler="ddim"):
        parts = {k: v for k, v in pipeline.components.items() if k != "scheduler"}
        found = kind(**parts, scheduler=make_scheduler(scheduler, pipeline), requires_safety_checker=False)
        found.set_progress_bar_config(disable=True)
        return found

    return new


def validity(pipe, steps):
    pipe.scheduler.set_timesteps(steps)
    pipe._guidance_scale = 4.0
    return validity_of(pipe, timeline_of(pipe.scheduler), torch.empty(2, 4, 16, 16), mark_of(pipe.unet), "mini-sd")


def latents(pipe, steps, **more):
    generator = torch.Generator().manual_seed(3)
    how = {"num_inference_steps": steps, "guidance_scale": 4.0, "output_type": "latent", **more}
    return pipe("a small red circle", generator=generator, **how).images


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "euler-a"])
def test_a_run_with_other_steps_says_so_once_and_does_what_the_carried_over_schedule_does(make, scheduler):
    pipe = make(scheduler=scheduler)
    made, seen = validity(pipe, 6), validity(pipe, 4)
    schedule = Schedule(periodic(6, 2), {}, made)
    carried, notice = for_this_run(schedule, made, seen)
    assert carried.actions[0] == FULL
    assert sorted(action.name for action in carried.actions) == [LIGHT.name] * 2 + [FULL.name] * 2
    with inheriting(pipe, Schedule(carried.actions)):
        expected = latents(pipe, 4)
    with inheriting(pipe, schedule):
        with pytest.warns(
            UserWarning, match="calibrated for 6 evaluations of the UNet and is carried over to 4"
        ) as told:
            found = latents(pipe, 4)
        assert [str(one.message) for one in told if "carried" in str(one.message)] == [notice]
        with warnings.catch_warnings(record=True) as again:
            warnings.simplefilter("always")
            latents(pipe, 4)
            latents(pipe, 6)
        assert not [one for one in again if "carried" in str(one.message)]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("plan", [{"mid_block": "drop"}, None], ids=["another architecture", "other weights"])
def test_a_schedule_of_another_model_is_refused(make, unet, plan):
    pipe = make()
    schedule = Schedule(periodic(4, 2), {}, validity(pipe, 4))
    other = copy.deepcopy(unet) if plan is None else assemble(unet, Plan(plan))
    if plan is None:
        for parameter in other.parameters():
            parameter.data = 1.1 * parameter
    pipe.register_modules(unet=other)
    with inheriting(pipe, schedule), pytest.raises(AsdmError, match="calibrated for another model: mini-sd"):
        latents(pipe, 4)


def test_a_sampler_that_evaluates_twice_and_another_scheduler_are_refused(make, unet):
    heun = make(scheduler="heun")
    made = validity(heun, 3)
    with inheriting(heun, Schedule(periodic(made.evaluations, 2), {}, made)):
        latents(heun, 3)
        with pytest.raises(AsdmError, match="twice"):
            latents(heun, 5)
    ddim = make()
    other = Schedule(periodic(made.evaluations, 2), {}, made)
    with inheriting(ddim, other), pytest.raises(AsdmError, match="another scheduler"):
        latents(ddim, 8)


def test_a_schedule_of_another_solver_of_the_same_kind_is_refused(make):
    pipe = make(scheduler="dpm++")
    schedule = Schedule(periodic(4, 2), {}, validity(pipe, 4))
    for changes in ({"algorithm_type": "sde-dpmsolver++"}, {"solver_order": 3}):
        other = make(scheduler="dpm++")
        other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
        with inheriting(other, schedule), pytest.raises(AsdmError, match="calibrated for another solver"):
            latents(other, 4)
    # Of a file from before this was kept, nothing is known.
    older = Schedule(schedule.actions, {}, replace(schedule.validity, solver=""))
    with inheriting(other, older):
        latents(other, 4)


def test_image_to_image_takes_its_part_of_the_schedule(make):
    """The last four of five evaluations, of which the first has nothing to inherit."""
    pipe = make(StableDiffusionImg2ImgPipeline)
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    more = {"image": image, "strength": 0.8}
    made = validity(pipe, 5)
    with inheriting(pipe, Schedule((FULL, DEEPER, LIGHT, FULL, LIGHT), {}, made)):
        found = latents(pipe, 5, **more)
    with inheriting(pipe, Schedule((FULL, FULL, LIGHT, FULL, LIGHT))):
        assert torch.equal(found, latents(pipe, 5, **more))
    with inheriting(pipe, Schedule((FULL, FULL, LIGHT, FULL, FULL))):
        assert not torch.equal(found, latents(pipe, 5, **more))


def test_a_correction_fitted_to_another_forecast_is_left_out_of_a_run_that_starts_mid_way(make, unet):
    """In the whole run step 2 is forecast from steps 0 and 1; a run that starts at 1 has only step 1 to hold, but at
    step 4 forecasts from 1 and 3 as the whole run does."""
    corrected = Action((Inherit("cut.0", "output", LINEAR, corrected=True),))
    width = unet.config["block_out_channels"][0]

    def shifted(step):
        return {(step, "cut.0"): Correction(torch.zeros(width, 3 * width), torch.full((width,), 0.5))}

    pipe = make(StableDiffusionImg2ImgPipeline)
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    more = {"image": image, "strength": 0.8}

    def found(corrections, **more):
        actions = (FULL, FULL, corrected, FULL, corrected)
        with inheriting(pipe, Schedule(actions, corrections)):
            return latents(pipe, 5, **more)

    plain = found({}, **more)
    assert torch.equal(found(shifted(2), **more), plain)
    assert not torch.equal(found(shifted(4), **more), plain)
    assert not torch.equal(found(shifted(2), image=image, strength=1.0), found({}, image=image, strength=1.0))


def test_generate_says_that_a_schedule_is_carried_over_and_refuses_what_cannot_be(make, cli, tmp_path):
    pipe = make(scheduler="dpm++")
    pipe.scheduler.set_timesteps(6)
    pipe._guidance_scale = 3.0
    made = validity_of(pipe, timeline_of(pipe.scheduler), torch.empty(2, 4, 16, 16), mark_of(pipe.unet), "mini-sd")
    save_schedule(Schedule(periodic(6, 2), {}, made), tmp_path / "inheritance.yaml")
    common = ("generate", "mini-sd", "a small red circle", "--inherit", "inheritance.yaml", "--guidance", "3")
    told = cli(*common, "--scheduler", "dpm++", "--steps", "4", "--out", "images")
    assert told.returncode == 0, told.stderr
    assert "carried over to 4" in told.stderr
    assert "Warning" not in told.stderr
    refused = cli(*common, "--scheduler", "heun", "--steps", "4", "--out", "others")
    assert (refused.returncode, "another scheduler" in refused.stderr) == (2, True), refused.stderr
