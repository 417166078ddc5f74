"""Steps that inherit the denoised latent in place of the prediction: by hand, in every parametrisation, as priced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from asdm_compress.assembly.damage import sketch
from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import FULL, Action, Inherit, conditional_only, skip
from asdm_compress.inheritance.attach import inheriting
from asdm_compress.inheritance.evaluator import Evaluator
from asdm_compress.inheritance.forecast import HOLD, LINEAR
from asdm_compress.inheritance.run import Run
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.schedule_file import load_schedule, save_schedule
from asdm_compress.inheritance.timeline import Timeline
from asdm_compress.models.call import UNetCall
from asdm_compress.models.loading import load_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.sampling.run import SamplingRun
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.sampling.settings import SamplingSettings, encode
from asdm_compress.scheduling.guided_unet import GuidedUNet
from asdm_compress.scheduling.measure import sampler_timeline
from asdm_compress.scheduling.menu import Choice, menu_of
from asdm_compress.scheduling.responses import measure_responses
from asdm_compress.scheduling.surrogate import Surrogate

PROMPTS = ["a small red circle", "a large blue square above a green triangle"]


def denoised_of(prediction_type, latents, predicted, alpha_bar):
    """diffusers' own formula."""
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    scheduler.alphas_cumprod[500] = alpha_bar
    scheduler.set_timesteps(1000)
    return scheduler.step(predicted, 500, latents).pred_original_sample


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_denoised_latent_is_diffusers(prediction_type):
    generator = torch.Generator().manual_seed(0)
    latents, predicted = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    timeline = Timeline((500.0,), (1.7,), prediction_type)
    of_input, of_prediction = timeline.denoised(0)
    ours = of_input * latents + of_prediction * predicted
    torch.testing.assert_close(ours, denoised_of(prediction_type, latents, predicted, 1 / (1 + 1.7**2)))


def test_nothing_is_denoised_where_nobody_tells():
    for timeline in (Timeline((3.0, 1.0)), Timeline((3.0, 1.0), (2.0, 1.0), "flow_prediction")):
        assert not timeline.tells_denoised
        with pytest.raises(AsdmError, match="denoised"):
            timeline.denoised(0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guided", [False, True])
def test_a_step_makes_its_prediction_of_what_it_inherits(unet, prediction_type, guided):
    """Held from the last step that computed, drawn on from the last two, whole rows or branches apart."""
    actions = (FULL, FULL, skip(HOLD, "denoised"), conditional_only(HOLD), skip(LINEAR, "denoised"))
    timeline = Timeline((900.0, 700.0, 500.0, 300.0, 100.0), (9.0, 4.0, 2.0, 1.0, 0.5), prediction_type)
    run = Run(Evaluator(unet), actions, timeline, guided)
    generator, predictions, latents = torch.Generator().manual_seed(1), [], []
    for timestep in timeline.timesteps:
        one = torch.randn(1, 4, 8, 8, generator=generator)
        latents.append(torch.cat([one, one]))
        texts = torch.randn(2, 5, unet.config["cross_attention_dim"], generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            predictions.append(run.evaluate(UNetCall(latents[-1], torch.tensor(timestep), texts)))
    denoised = [
        a * latent + b * predicted
        for latent, predicted, (a, b) in zip(latents, predictions, map(timeline.denoised, range(5)), strict=True)
    ]
    torch.testing.assert_close(denoised[2], denoised[1], rtol=1e-4, atol=1e-4)
    conditional = slice(1, 2) if guided else slice(None)
    drawn = denoised[3] + (denoised[3] - denoised[1]) / 2  # from steps 3 and 1 to step 4
    torch.testing.assert_close(denoised[4][conditional], drawn[conditional], rtol=1e-4, atol=1e-4)
    if guided:  # the branch without the prompt was not computed at step 3
        torch.testing.assert_close(
            denoised[4][:1], (denoised[1] + 3 * (denoised[1] - denoised[0]))[:1], rtol=1e-4, atol=1e-4
        )
    assert run.held_bytes == 0


@pytest.fixture
def own_pipeline():
    found = load_pipeline("mini-sd", LoadOptions())
    found.set_progress_bar_config(disable=True)
    return found


def test_a_schedule_keeps_it_and_other_places_have_none(own_pipeline, tmp_path):
    own_pipeline.scheduler = make_scheduler("dpm++", own_pipeline)
    schedule = Schedule((FULL, skip(HOLD, "denoised"), FULL, skip(LINEAR, "denoised")))
    save_schedule(schedule, tmp_path / "inheritance.yaml")
    again = load_schedule(tmp_path / "inheritance.yaml")
    assert [action.name for action in again.actions] == ["full", "skip.denoised:hold", "full", "skip.denoised:linear"]

    def latents():
        return own_pipeline(
            PROMPTS[0], num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent"
        ).images

    with inheriting(own_pipeline, again):
        held = latents()
    with inheriting(own_pipeline, Schedule((FULL, skip(), FULL, skip(LINEAR)))):
        other = latents()
    assert not torch.equal(held, other)
    elsewhere = Schedule((FULL, Action((Inherit("cut.0", "denoised"),)), FULL, FULL))
    with pytest.raises(AsdmError, match="no denoised latent"), inheriting(own_pipeline, elsewhere):
        latents()


@pytest.mark.parametrize("sampler", ["dpm++", "euler"])
def test_the_surrogate_knows_what_a_step_does(own_pipeline, sampler):
    """Against a run that goes on from the full run's own latents: the prediction is an affine map of what is held."""
    own_pipeline.scheduler = make_scheduler(sampler, own_pipeline)
    settings, steps = SamplingSettings(5, 4.0, 7), 5
    timeline = sampler_timeline(own_pipeline, steps)
    menu = menu_of(own_pipeline.unet, (skip(), skip(thing="denoised")), (HOLD, LINEAR), True)
    responses = measure_responses(own_pipeline, menu, timeline, PROMPTS, settings)
    surrogate = Surrogate(menu, responses, np.ones(steps), timeline, settings.guidance)
    evaluator, calls, full = Evaluator(own_pipeline.unet), [], []

    def evaluate(call):
        calls.append(call)
        full.append(evaluator.unet(**call.arguments(), return_dict=False)[0])
        return full[-1]

    run = SamplingRun(
        own_pipeline,
        encode(own_pipeline, PROMPTS, settings.guidance),
        settings,
        GuidedUNet(own_pipeline.unet.dtype, 2, evaluate),
    )
    with torch.no_grad():
        while not run.finished:
            run.advance()
        for step, forecast, light in ((2, HOLD, 1), (3, LINEAR, 1), (3, LINEAR, 0)):
            choices = [Choice()] * steps
            choices[step] = Choice(light, False, forecast)
            twin = Run(evaluator, [menu.action(choice) for choice in choices], timeline, True)
            error = [twin.evaluate(call) for call in calls][step] - full[step]
            unconditional, conditional = error.chunk(2)
            guided = unconditional + settings.guidance * (conditional - unconditional)
            found = surrogate.errors(choices)[step]
            np.testing.assert_allclose(found, sketch(guided).numpy(), rtol=2e-3, atol=2e-3 * np.abs(found).max())
