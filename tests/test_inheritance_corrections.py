"""Fitted corrections at run time: what they are fitted from, and that they do what they say on actual runs."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline

from asdm_compress.inheritance.actions import FULL, Action, Inherit, cut
from asdm_compress.inheritance.attach import inheriting
from asdm_compress.inheritance.corrections import Correction, corrected, regressors
from asdm_compress.inheritance.evaluator import Evaluator
from asdm_compress.inheritance.forecast import LINEAR
from asdm_compress.inheritance.run import Run
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.schedule_file import load_schedule, save_schedule
from asdm_compress.inheritance.timeline import Timeline, timeline_of
from asdm_compress.models.call import UNetCall
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.scenes.captions import sample_captions

STEPS = 6
CUT = Action((Inherit("cut.1", "output", LINEAR, corrected=True),))
ACTIONS = (FULL, FULL, CUT, CUT, FULL, CUT)
LIGHT = (2, 3, 5)


@pytest.fixture
def pipe(pipeline):
    parts = {**pipeline.components, "scheduler": make_scheduler("ddim", pipeline)}
    found = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    found.set_progress_bar_config(disable=True)
    return found


def latents(pipe, prompts, seed=3, **more):
    how = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent", **more}
    return pipe(prompts, generator=torch.Generator().manual_seed(seed), **how).images


@torch.no_grad()
def trajectory(pipe, prompts, actions, corrections=None, fit=None, seed=3):
    """A pipeline's loop by hand around one run; `fit` makes each step's corrections from what the run inspects."""
    pipe.scheduler.set_timesteps(STEPS)
    text = torch.cat(pipe.encode_prompt(prompts, "cpu", 1, True)[::-1])
    found = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    known = {} if corrections is None else dict(corrections)
    run = Run(Evaluator(pipe.unet), actions, timeline_of(pipe.scheduler), guided=True, corrections=known)
    for t in pipe.scheduler.timesteps:
        call = UNetCall(torch.cat((found, found)), t, text)
        if fit is not None:
            for seen in run.inspect(call):
                known[run.step, seen.feature.name] = fit(seen)
        unconditional, conditional = run.evaluate(call).chunk(2)
        found = pipe.scheduler.step(unconditional + 3.0 * (conditional - unconditional), t, found).prev_sample
    return found, known


def ridge(seen):
    """The map from what a correction looks at to the error of the forecast, by least squares."""
    given = regressors(seen.source, seen.source_forecast, seen.source_last, seen.last).transpose(0, 1).flatten(1).T
    given = torch.cat((given, torch.ones(len(given), 1)), dim=1).double()
    error = (seen.truth - seen.forecast).transpose(0, 1).flatten(1).T.double()
    gram = given.T @ given
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solved = torch.linalg.solve(gram, given.T @ error).float()
    return Correction(solved[:-1].T.contiguous(), solved[-1].contiguous())


def test_corrections_fitted_along_a_run_bring_other_runs_nearer(pipe, tmp_path):
    """Through the file that people have, on prompts and noise that they were not fitted to."""
    prompts = [caption.text for caption in sample_captions(16, 21)]
    seen, unseen = prompts[:10], prompts[10:]
    _, fitted = trajectory(pipe, seen, ACTIONS, fit=ridge)
    assert {key[0] for key in fitted} == set(LIGHT)
    full = latents(pipe, unseen, seed=8)
    save_schedule(Schedule(ACTIONS, fitted), tmp_path / "inheritance.yaml")
    save_schedule(Schedule(ACTIONS), tmp_path / "without.yaml")

    def error(name):
        with inheriting(pipe, tmp_path / name):
            return float((latents(pipe, unseen, seed=8) - full).square().mean())

    assert 0 < error("inheritance.yaml") < 0.8 * error("without.yaml")


def test_a_pipeline_does_what_the_run_by_hand_does(pipe):
    prompts = ["a small red circle", "a cross"]
    by_hand, fitted = trajectory(pipe, prompts, ACTIONS, fit=ridge, seed=4)
    again, _ = trajectory(pipe, prompts, ACTIONS, fitted, seed=4)
    assert torch.equal(by_hand, again)
    with inheriting(pipe, Schedule(ACTIONS, fitted)):
        found = latents(pipe, prompts, seed=4)
    assert torch.allclose(found, by_hand, atol=1e-4)
    assert not torch.allclose(latents(pipe, prompts, seed=4), by_hand, atol=1e-3)


def test_corrections_of_nothing_change_nothing_and_missing_ones_neither(pipe, unet):
    width = unet.config["block_out_channels"][0]
    nothing = {(i, "cut.1"): Correction(torch.zeros(width, 3 * width), torch.zeros(width)) for i in LIGHT}
    plain = tuple(cut(1, LINEAR) if action == CUT else action for action in ACTIONS)
    with inheriting(pipe, Schedule(plain)):
        expected = latents(pipe, "a cross")
    for corrections in (nothing, {}, {(3, "cut.1"): nothing[3, "cut.1"]}):
        with inheriting(pipe, Schedule(ACTIONS, corrections)):
            assert torch.equal(latents(pipe, "a cross"), expected)


def test_the_formula_is_what_it_says():
    torch.manual_seed(0)
    source, source_forecast, source_last = torch.randn(3, 2, 5, 4, 4).unbind(0)
    last, forecast = torch.randn(2, 2, 3, 4, 4).unbind(0)
    correction = Correction(torch.randn(3, 13), torch.randn(3))
    seen = regressors(source, source_forecast, source_last, last)
    found = corrected(forecast, seen, correction.weight, correction.bias)
    at = torch.cat((source - source_forecast, source - source_last, last), dim=1)[1, :, 2, 3]
    assert torch.allclose(found[1, :, 2, 3], forecast[1, :, 2, 3] + correction.weight @ at + correction.bias, atol=1e-5)


UPSTREAM = Action(
    (
        Inherit("down_blocks.0.resnets.0", "branch", LINEAR),
        Inherit("cut.1", "output", LINEAR, corrected=True),
    )
)


@torch.no_grad()
def test_a_correction_is_fitted_to_what_its_step_will_see(unet):
    """The step inherits something upstream of the skip connection that the correction looks at. Oracle: hooks on the
    layers themselves, in the step and in the plain pass."""
    actions = (FULL, FULL, UPSTREAM)
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 40, unet.config["cross_attention_dim"], generator=generator)
    sample = torch.randn(2, 4, 16, 16, generator=generator)
    pipe_timeline = timeline(actions)
    run = Run(Evaluator(unet), actions, pipe_timeline)
    for t in pipe_timeline.timesteps[:2]:
        run.evaluate(UNetCall(sample, torch.tensor(t), text))
        sample = 0.9 * sample
    last = UNetCall(sample, torch.tensor(pipe_timeline.timesteps[2]), text)
    before = dict(run._kept)
    seen = {one.feature.value: one for one in run.inspect(last)}
    assert run._kept == before
    layer, deep = unet.down_blocks[0].attentions[0], unet.up_blocks[3].attentions[0]
    outputs = {}
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: outputs.setdefault(name, []).append(output[0]))
        for name, module in (("layer", layer), ("deep", deep))
    ]
    run.evaluate(last)
    unet(**last.arguments())
    for handle in handles:
        handle.remove()
    in_the_step, in_full = outputs["layer"]
    assert torch.equal(seen["cut.1"].source, in_the_step)
    assert not torch.allclose(in_the_step, in_full, atol=1e-3)
    # What is inherited has its truth from the full pass all the same; the second last layer of the decoder feeds it.
    assert torch.allclose(seen["cut.1"].truth, outputs["deep"][-1], atol=1e-5)


def timeline(actions):
    return Timeline(tuple(float(600 - 100 * i) for i in range(len(actions))))


def test_corrections_have_the_type_of_the_run(pipeline):
    parts = {**pipeline.components, "scheduler": make_scheduler("ddim", pipeline)}
    parts |= {name: copy.deepcopy(parts[name]).to(torch.bfloat16) for name in ("unet", "text_encoder")}
    half = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    half.set_progress_bar_config(disable=True)
    width = half.unet.config["block_out_channels"][0]
    bias = {(i, "cut.1"): Correction(torch.zeros(width, 3 * width), torch.full((width,), 0.2)) for i in LIGHT}
    with inheriting(half, Schedule(ACTIONS)):
        plain = latents(half, "a cross")
    with inheriting(half, Schedule(ACTIONS, bias)):
        found = latents(half, "a cross")
    assert found.dtype == torch.bfloat16
    assert torch.isfinite(found).all()
    assert not torch.equal(found, plain)


def test_an_edited_schedule_goes_without_corrections_that_were_fitted_along_another(tmp_path):
    corrections = {(i, "cut.1"): Correction(torch.zeros(2, 6), torch.zeros(2)) for i in LIGHT}
    path = tmp_path / "inheritance.yaml"
    save_schedule(Schedule(ACTIONS, corrections), path)
    assert set(load_schedule(path).corrections) == set(corrections)
    text = path.read_text(encoding="utf-8")
    edited = text.rsplit("- full", 1)
    assert len(edited) == 2
    path.write_text(f"- {CUT.name}".join(edited), encoding="utf-8")
    with pytest.warns(UserWarning, match="other steps than those that its corrections were fitted along"):
        found = load_schedule(path)
    assert found.corrections == {}
    assert found.actions[4] == CUT
