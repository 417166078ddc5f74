"""Runs of a switched UNet: whose step it is, forecasts, other samplers and sizes, and runs beside one another."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
)
from switched import call, pipe_of, schedule_of

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import FULL, Action, cut, skip
from asdm_compress.inheritance.attach import inheriting
from asdm_compress.inheritance.carrying import CarriedOver
from asdm_compress.inheritance.forecast import HOLD, LINEAR
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.switching.places import is_run
from asdm_compress.switching.switched_unet import SwitchedUNet2DConditionModel


def test_a_skipped_step_is_the_forecast_of_a_run_that_inherits(pipeline, unet, switch):
    switched = switch("explicit:teacher*2/skip/skip:hold")
    pipe = pipe_of(pipeline, unet)
    with inheriting(pipe, Schedule((FULL, FULL, skip(LINEAR), skip(HOLD)))):
        expected = call(pipe)
    assert torch.equal(call(pipe_of(pipeline, switched)), expected)
    assert not torch.equal(call(pipe_of(pipeline, unet)), expected)


@pytest.mark.parametrize("member", ["teacher", "small", "tiny"])
def test_a_rule_goes_before_the_schedule_of_a_compiled_unet(pipeline, switch, member):
    pipe = pipe_of(pipeline, switch("explicit:tiny/small/teacher/tiny"))
    rule = Schedule((Action(member=member),) * 4)
    with inheriting(pipe, rule):
        expected = call(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with inheriting(pipe, rule, {"backend": "eager", "fullgraph": True}):
        torch.testing.assert_close(call(pipe), expected, rtol=1e-4, atol=1e-4)


def test_runs_of_two_pipelines_and_threads_do_not_meet(pipeline, switch):
    switched = switch("explicit:teacher/small/skip/tiny")
    prompts = ["a small red circle", "a large blue square", "a green ring", "a white star"]
    expected = [call(pipe_of(pipeline, switched), prompt=prompt) for prompt in prompts]
    found = {}

    def work(prompt):
        pipe = pipe_of(pipeline, switched)
        # Fast tokenizers keep the padding of a call in themselves: a shared one gives threads one another's lengths.
        pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
        found[prompt] = [call(pipe, prompt=prompt) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt, image in zip(prompts, expected, strict=True):
        assert all(torch.equal(other, image) for other in found[prompt])


def test_runs_that_take_turns_in_one_thread_and_one_that_breaks_off_do_not_meet(pipeline, switch):
    switched = switch("explicit:teacher/small/skip/tiny")
    first, second = pipe_of(pipeline, switched), pipe_of(pipeline, switched)
    expected = call(first), call(second, prompt="a large blue square")
    inside = []

    def other_run(pipe, step, *_):
        if step == 1:
            inside.append(call(second, prompt="a large blue square"))
        return {}

    assert torch.equal(call(first, callback_on_step_end=other_run), expected[0])
    assert torch.equal(inside[0], expected[1])

    def fail(*_):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        call(first, callback_on_step_end=fail)
    assert torch.equal(call(first), expected[0])


def test_a_run_that_breaks_off_keeps_no_model_in_memory(pipeline, switch):
    def fail(*_):
        raise RuntimeError("stopped")

    switched = switch("explicit:teacher/small/skip/tiny")
    with pytest.raises(RuntimeError, match="stopped"):
        call(pipe_of(pipeline, switched), callback_on_step_end=fail)
    twin = copy.deepcopy(switched)  # which has no runs of its own
    assert torch.equal(call(pipe_of(pipeline, twin)), call(pipe_of(pipeline, switched)))
    gone = weakref.ref(switched)
    del switched
    gc.collect()
    assert gone() is None


def test_runs_that_were_cut_off_leave_nothing_behind(pipeline, switch):
    def fail(*_):
        raise RuntimeError("stopped")

    switched = switch("explicit:teacher/small/skip/tiny")
    pipe = pipe_of(pipeline, switched)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="stopped"):
            call(pipe, callback_on_step_end=fail)
    assert len(switched._runs._by_place) == 1  # whose sampler could still go on
    call(pipe)
    assert not switched._runs._by_place


@pytest.mark.parametrize("images", [1, 2])
def test_guidance_that_ends_on_the_way_is_seen(pipeline, switch, images):
    """As diffusers' own callback switches it off: from then on a run has the conditional rows alone."""

    def off(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    conditional = Action((), LINEAR, "small")
    ending = {"callback_on_step_end": off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    more = ending | {"num_images_per_prompt": images}
    teacher, small = Action(member="teacher"), Action(member="small")
    found = call(pipe_of(pipeline, switch((teacher, small, conditional, conditional))), **more)
    # Without an unconditional branch there is nothing to leave out: those steps are computed as they are.
    assert torch.equal(found, call(pipe_of(pipeline, switch((teacher, small, small, small))), **more))


def test_members_are_asked_for_by_name(switch):
    switched = switch("explicit:tiny/small/teacher/tiny")
    body, *others = switched.member_names
    assert all(switched.member(name) is not switched for name in others)
    for name, words in ((body, "own body"), ("none", "no member")):
        with pytest.raises(AsdmError, match=words):
            switched.member(name)


def test_a_schedule_that_skips_says_which_steps_it_is_for(pipeline, switch):
    pipe = pipe_of(pipeline, switch("explicit:teacher/tiny/skip/teacher"), scheduler=make_scheduler("heun", pipeline))
    with pytest.raises(AsdmError, match="for other steps") as refused:
        call(pipe)
    assert "about 4 steps" in str(refused.value.hint)


def test_a_timestep_of_a_batch_is_no_place_in_a_run():
    assert is_run([900.0, 500.0, 500.0, 100.0])
    for timesteps in ([500.0, 500.0], [100.0, 900.0], [900.0, -1.0], [900.0, 20_000.0]):
        assert not is_run(timesteps)


def test_batches_and_sizes_change_between_runs(pipeline, switch):
    switched = switch("explicit:teacher/small/skip/tiny")
    pipe = pipe_of(pipeline, switched)
    for more in ({}, {"height": 64, "width": 96}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 3}):
        fresh = pipe_of(pipeline, copy.deepcopy(switched))
        assert torch.equal(call(pipe, **more), call(fresh, **more))


def test_image_to_image_starts_mid_way(pipeline, students, switch):
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    pipe = pipe_of(pipeline, switch("large-first:2"), StableDiffusionImg2ImgPipeline)
    alone = pipe_of(pipeline, students["tiny"], StableDiffusionImg2ImgPipeline)
    assert torch.equal(call(pipe, image=image, strength=0.5), call(alone, image=image, strength=0.5))
    skipping = pipe_of(pipeline, switch("explicit:teacher*2/skip/tiny"), StableDiffusionImg2ImgPipeline)
    # There is nothing to forecast from where a run begins: the step is computed, by the body.
    computing = pipe_of(pipeline, switch("explicit:teacher*3/tiny"), StableDiffusionImg2ImgPipeline)
    expected = call(computing, image=image, strength=0.5)
    assert torch.equal(call(skipping, image=image, strength=0.5), expected)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "dpm++-karras", "unipc", "euler", "pndm", "heun"])
def test_other_samplers_and_steps_are_served_by_noise_level_with_a_notice(pipeline, switch, scheduler):
    switched = switch("large-first:2")
    seen = []
    for name in ("small", "tiny"):
        switched.member(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    pipe = pipe_of(pipeline, switched, scheduler=make_scheduler(scheduler, pipeline))
    with pytest.warns(CarriedOver, match="carried over by noise level"):
        call(pipe, num_inference_steps=9)
    evaluations = len(pipe.scheduler.timesteps)
    assert 0.2 * evaluations < len(seen) < 0.8 * evaluations
    assert set(seen) == {"tiny"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", CarriedOver)
        call(pipe, num_inference_steps=9)


def test_skipping_schedules_are_carried_over_too(pipeline, switch):
    switched = switch("explicit:teacher/tiny/skip/teacher")
    pipe = pipe_of(pipeline, switched)
    with pytest.warns(CarriedOver):
        assert call(pipe, num_inference_steps=8).isfinite().all()
    actions = switched.schedule.actions_at(switched.schedule.timeline_of(pipe.scheduler.timesteps.tolist()))
    assert actions[0] == Action(member="teacher")
    assert {action.name for action in actions} == {"full@teacher", "full@tiny", "skip:linear"}


def test_a_timestep_that_stands_alone_is_served_by_its_noise(unet, students, switch, inputs):
    switched = switch("explicit:teacher*2/skip/tiny")
    sample, _, text = inputs
    with torch.no_grad(), pytest.warns(CarriedOver, match="no part of a sampler's timesteps"):
        assert torch.equal(switched(sample, 990, text).sample, unet(sample, 990, text).sample)
        assert torch.equal(switched(sample, torch.tensor(3), text).sample, students["tiny"](sample, 3, text).sample)
        mixed = switched(sample, torch.tensor([990, 3]), text).sample
    with torch.no_grad():
        same = torch.tensor([3, 3])  # of a batch, and no run of two steps whose second is skipped
        assert torch.equal(switched(sample, same[1], text).sample, students["tiny"](sample, 3, text).sample)
        assert torch.allclose(mixed[:1], unet(sample[:1], 990, text[:1]).sample, atol=1e-5)
        assert torch.allclose(mixed[1:], students["tiny"](sample[1:], 3, text[1:]).sample, atol=1e-5)


def test_guidance_branches_in_calls_of_their_own_do_not_meet(pipeline, unet, members, inputs):
    """One call of the UNet per branch: what the first has kept is not the second's, which is computed."""
    actions = (Action(member="teacher"), skip(), Action(member="teacher"), Action(member="tiny"))
    made = SwitchedUNet2DConditionModel.of(members, schedule_of(pipeline, actions))
    scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(4)
    latents, texts = inputs[0][:1], [torch.randn(1, *inputs[2].shape[1:]) for _ in range(2)]
    found = []
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for timestep in scheduler.timesteps:
            found.append([made(latents, timestep, text).sample for text in texts])
        assert torch.equal(found[1][0], found[0][0]), "the first call's own run goes by the schedule"
        assert torch.equal(found[1][1], unet(latents, scheduler.timesteps[1], texts[1]).sample)
        assert torch.equal(found[3][1], members["tiny"](latents, scheduler.timesteps[3], texts[1]).sample)
    assert any("twice" in str(one.message) for one in told)


def test_inheritance_works_on_top_of_switching(pipeline, unet, students, switch):
    def inherited(unet, rule):
        pipe = pipe_of(pipeline, unet)
        with inheriting(pipe, rule):
            return call(pipe)

    rule = "uniform:2,branch=1"
    assert torch.equal(inherited(switch("small-first:0"), rule), inherited(unet, rule))
    assert torch.equal(inherited(switch("small-first:4"), rule), inherited(students["tiny"], rule))
    plain = pipe_of(pipeline, switch("small-first:2"))
    expected = call(plain)
    with inheriting(plain, "uniform:1"):
        assert torch.equal(call(plain), expected)
    assert torch.equal(call(plain), expected)
    # A step is skipped where the rule or the schedule says so.
    rule = Schedule((FULL, FULL, skip(), FULL))
    assert torch.equal(inherited(switch("small-first:0"), rule), inherited(unet, rule))
    # A step inherits from the member that computes it: where that has computed nothing yet, it computes all.
    actions = (
        Action(member="teacher"),
        Action(cut(0).inherits, None, "small"),
        Action(cut(0).inherits, None, "teacher"),
    )
    mixed = inherited(switch("small-first:0"), Schedule((*actions, Action(member="tiny"))))
    same = inherited(
        switch("small-first:0"), Schedule((actions[0], Action(member="small"), *actions[2:], Action(member="tiny")))
    )
    assert torch.equal(mixed, same)


def test_reused_guidance_needs_nothing_around_the_call(pipeline, members, switch):
    actions = (
        Action(member="teacher"), Action(cut(0, LINEAR).inherits, HOLD, "teacher"), Action((), LINEAR, "small"),
        Action(member="tiny"),
    )  # fmt: skip
    made = SwitchedUNet2DConditionModel.of(members, schedule_of(pipeline, actions))
    rows = []  # of every step: the first layer is one in all members
    made.conv_in.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    pipe, around = pipe_of(pipeline, made), pipe_of(pipeline, switch("small-first:0"))
    found = call(pipe, num_images_per_prompt=2)
    assert rows == [4, 2, 2, 4]
    with inheriting(around, Schedule(actions)):
        expected = call(around, num_images_per_prompt=2)
    assert torch.equal(found, expected)
    # Without guidance there is one branch.
    whole = (actions[0], Action(actions[1].inherits, None, "teacher"), Action(member="small"), actions[3])
    plain = pipe_of(pipeline, SwitchedUNet2DConditionModel.of(members, schedule_of(pipeline, whole)))
    assert torch.equal(call(pipe, guidance_scale=1.0), call(plain, guidance_scale=1.0))
    # Two prompts that begin with the same noise are no two branches: the run begins anew once they differ.
    plain = pipe_of(pipeline, switch("explicit:teacher*2/small/tiny"))
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2)).repeat(2, 1, 1, 1)
    more = {"prompt": ["a small red circle", "a large blue square"], "latents": latents, "guidance_scale": 1.0}
    assert torch.equal(call(pipe, **more), call(plain, **more))
