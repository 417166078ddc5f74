"""Damage and calibration on the trained model: reuse changes nothing, kills lose nothing."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

from asdm_compress.assembly.calibration import Calibration, Effort, _pick_steps, measure_band_weights, record
from asdm_compress.assembly.damage import (
    SKETCH,
    compare_predictions,
    measure_damages,
    measure_plan,
    predictions,
    sketch,
    summarise,
)
from asdm_compress.assembly.duration import PART_OF_PASS, measuring_time
from asdm_compress.assembly.options import find_options
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.store import measurement_folder, recorded, weights_hash
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.edits import edited_copy
from asdm_compress.sampling.images import sample
from asdm_compress.sampling.run import GuidedInputs, SamplingRun
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.sampling.settings import SamplingSettings, encode
from asdm_compress.scenes.captions import sample_captions

PROMPTS = [c.text for c in sample_captions(3, 9)]
SETTINGS = SamplingSettings(steps=8, guidance=4.0, seed=3)


@pytest.fixture(scope="module")
def calibration(pipeline):
    return record(pipeline, PROMPTS, SETTINGS, bands=4)


@pytest.fixture(scope="module")
def few_options(unet, mini_profile):
    wanted = ("mid_block", "levels.3", "down_blocks.0.layers.1", "up_blocks.3.resnets.2", "up_blocks.1.upsamplers.0",
              "down_blocks.1.attentions.0.transformer_blocks.0.attn2")  # fmt: skip
    return [o for o in find_options(unet, mini_profile) if o.site in wanted]


def test_triples_are_one_moment_per_prompt_and_band(calibration):
    inputs = calibration.inputs
    assert len(calibration) == len(inputs) == len(PROMPTS) * 4
    assert torch.bincount(calibration.bands).tolist() == [3, 3, 3, 3]
    order = inputs.timesteps[torch.argsort(calibration.bands, stable=True)].reshape(4, 3)
    assert (order[:-1].amin(dim=1) > order[1:].amax(dim=1)).all()
    assert inputs.texts.shape[1] == 2
    assert sum(calibration.band_weights) == pytest.approx(1)
    assert all(w > 0 for w in calibration.band_weights)


@pytest.mark.parametrize("weights", [(0.25, 0.25, 0.25, 0.25), (0.15, 0.05, 0.1, 0.7)])
@pytest.mark.parametrize(("prompts", "moments"), [(256, 512), (32, 64), (18, 36), (9, 27)])
def test_half_of_the_moments_go_by_what_bands_weigh(prompts, moments, weights):
    """Among the prompts that are kept out of fits too, which are few, and of those that a fit is thinned to."""
    picks = _pick_steps(prompts, SamplingSettings(25), weights, moments)
    bands, who = (picks >= 0).nonzero(as_tuple=True)
    inputs = GuidedInputs(torch.zeros(len(who), 1), torch.zeros(len(who)), torch.zeros(len(who), 1), 1.0)
    whole = Calibration(inputs, bands, who, weights, ())
    for part in (whole, *whole.parts(), *whole.for_plans()):
        counts = torch.bincount(part.bands, minlength=4)
        most = len(set(part.prompts.tolist()))  # one per prompt and band
        for count, weight in zip(counts.tolist(), weights, strict=True):
            fair = min(most, len(part) * (0.5 * weight + 0.125))
            assert count >= 1
            assert 0.75 * fair - 2 <= count <= 1.25 * fair + 2
        if len(set(weights)) == 1:
            assert counts.max() - counts.min() <= 0.25 * len(part) / 4 + 3
        assert part.bands_without_moments() == []
    thinned = whole.thinned(prompts)
    assert len(thinned) == prompts
    last = (thinned.bands == 3).float().mean().item()
    assert last == pytest.approx(0.5 * weights[3] + 0.125, abs=3 / prompts)  # of four parts, each rounded
    few = whole.thinned(prompts // 3)
    assert len(few) == len(set(few.prompts.tolist())) == prompts // 3
    assert whole.thinned(len(whole)) is whole
    for thin in (thinned, whole.thinned(len(whole) // 2)):  # those that choose a fit's ridge have all of its bands
        chooses = thin.prompts % 4 == 3
        if chooses.sum() >= 8:
            assert set(thin.bands[chooses].tolist()) == set(thin.bands[~chooses].tolist()) == {0, 1, 2, 3}
    assert whole.only(bands < 3).bands_without_moments() == [3]


def test_a_band_without_moments_is_taken_to_be_as_the_others(calibration):
    few = calibration.only(calibration.bands < 3)
    errors = np.arange(1.0, 1 + len(few))
    found = summarise(errors, np.ones(len(few)), few)
    assert found.bands[3] == pytest.approx(found.total)
    weights = np.array(few.band_weights[:3])
    assert found.total == pytest.approx(float(weights @ found.bands[:3] / weights.sum()))


def test_recorded_runs_are_the_pipelines_own(pipeline):
    """Oracle: diffusers' pipeline call from the same noise, in double precision, where rounding does not grow."""
    twin = StableDiffusionPipeline(**copy.deepcopy(pipeline.components), requires_safety_checker=False)
    twin.to(torch.float64)
    with torch.no_grad():
        run = SamplingRun(twin, encode(twin, PROMPTS, SETTINGS.guidance), SETTINGS)
        while not run.finished:
            run.advance()
    expected = sample(twin, PROMPTS, SETTINGS).latents
    assert torch.allclose(run.latents, expected, rtol=0, atol=1e-9)


def test_reused_activations_give_the_damage_of_whole_passes(unet, calibration, few_options):
    damages = measure_damages(unet, few_options, calibration)
    for option in few_options:
        whole = measure_plan(unet, option.plan, calibration)
        assert damages[option.name].bands == pytest.approx(whole.bands, rel=1e-5), option.name
        assert damages[option.name].total == pytest.approx(whole.total, rel=1e-5)
        assert whole.total > 0


@pytest.mark.parametrize(
    ("dtype", "which"),
    [
        (torch.float32, "few"),
        (torch.bfloat16, "few"),
        pytest.param(torch.float32, "all", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "all", marks=pytest.mark.slow),
    ],
)
def test_reuse_changes_no_bit(unet, mini_profile, calibration, few_options, dtype, which):
    options = few_options if which == "few" else find_options(unet, mini_profile)
    twin, inputs = copy.deepcopy(unet).to(dtype), calibration.inputs
    inputs = replace(inputs, samples=inputs.samples.to(dtype), texts=inputs.texts.to(dtype))
    rounded = replace(calibration, inputs=inputs)
    reused, whole = (measure_damages(twin, options, rounded, reuse=reuse) for reuse in (True, False))
    assert reused == whole
    for name, damage in whole.items():
        assert np.array_equal(reused[name].sketch, damage.sketch)


def test_no_edit_does_no_damage_and_a_student_does_its_plans(unet, calibration):
    assert measure_plan(unet, Plan(), calibration).total == 0
    plan = Plan({"mid_block": "drop", "up_blocks.2.layers.1": "drop"})
    student = assemble(unet, plan)
    kept = predictions(unet, calibration)
    assert measure_plan(unet, plan, calibration, None, kept) == measure_plan(unet, plan, calibration)
    assert compare_predictions(unet, student, calibration).total == pytest.approx(
        measure_plan(unet, plan, calibration).total, rel=1e-5
    )


def test_a_kill_half_way_loses_only_the_chunk_in_work(unet, calibration, few_options, tmp_path, monkeypatch):
    store = tmp_path / "damages.jsonl"
    monkeypatch.setattr("asdm_compress.assembly.damage.CHUNK", 4)
    expected = measure_damages(unet, few_options, calibration)

    class KilledError(Exception):
        pass

    def killed_after(calls):
        def progress(done, total):
            if done == calls:
                raise KilledError

        return progress

    with pytest.raises(KilledError):
        measure_damages(unet, few_options, calibration, store, killed_after(2 * len(few_options) + 1))
    with store.open("a") as file:
        file.write('{"chunk": 2, "energy": [1.0, ')
    assert len([line for line in store.read_text().splitlines() if line.startswith("{")]) == 3
    calls: list[int] = []
    again = measure_damages(unet, few_options, calibration, store, lambda done, total: calls.append(done))
    assert again == expected
    # Two chunks were taken from the store: only one was measured, after a word on what was known of it.
    assert len(calls) == 2 + 1 + len(few_options)
    assert measure_damages(unet, few_options, calibration, store) == expected


def test_what_a_model_is_told_beside_its_weights_is_another_measurement(pipeline):
    own = StableDiffusionPipeline(**{**pipeline.components, "unet": copy.deepcopy(pipeline.unet)},
                                  requires_safety_checker=False)  # fmt: skip
    key = lambda: measurement_folder(own, PROMPTS, SETTINGS, 4)  # noqa: E731
    found = [key()]
    own.enable_freeu(0.9, 0.2, 1.2, 1.4)
    found.append(key())
    own.disable_freeu()
    assert key() == found[0]
    own.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]), "drawn")
    found.append(key())
    own.set_adapters("drawn", 0.3)
    found.append(key())
    own.unet.disable_adapters()
    found.append(key())
    assert len(set(found)) == len(found)


def test_a_kill_within_a_chunk_that_takes_long_loses_little(unet, calibration, few_options, tmp_path, monkeypatch):
    store = tmp_path / "damages.jsonl"
    monkeypatch.setattr("asdm_compress.assembly.damage.KEPT_EVERY", 0.0)

    class KilledError(Exception):
        pass

    def killed(done, total):
        if done == 3:
            raise KilledError

    with pytest.raises(KilledError):
        measure_damages(unet, few_options, calibration, store, killed)
    calls: list[int] = []
    again = measure_damages(unet, few_options, calibration, store, lambda done, total: calls.append(done))
    assert calls[0] == 3
    assert again == measure_damages(unet, few_options, calibration)


def test_a_store_without_an_option_is_measured_again(unet, calibration, few_options, tmp_path):
    store = tmp_path / "damages.jsonl"
    measure_damages(unet, few_options[:1], calibration, store)
    found = measure_damages(unet, few_options, calibration, store)
    assert set(found) == {o.name for o in few_options}


def test_recordings_are_kept_by_content(pipeline, unet, tmp_path, monkeypatch):
    monkeypatch.setenv("ASDM_COMPRESS_CACHE", str(tmp_path))
    folder = measurement_folder(pipeline, PROMPTS, SETTINGS, 4)
    assert folder == measurement_folder(pipeline, PROMPTS, SETTINGS, 4)
    assert folder != measurement_folder(pipeline, PROMPTS[:2], SETTINGS, 4)
    assert folder != measurement_folder(pipeline, PROMPTS, SamplingSettings(8, 4.5, 3), 4)
    path = folder / "triples.pt"
    first = recorded(path, lambda: record(pipeline, PROMPTS[:1], SETTINGS, 4))
    second = recorded(path, lambda: pytest.fail("recorded twice"))
    assert torch.equal(first.inputs.samples, second.inputs.samples)
    assert first.band_weights == second.band_weights
    changed = edited_copy(unet, {"mid_block.attentions.0": "drop"})
    assert weights_hash(changed) != weights_hash(unet)


@pytest.mark.parametrize("name", ["dpm++", "euler-a", "ddpm"])
def test_a_fork_goes_on_as_its_original_would(pipeline, name):
    scheduler = pipeline.scheduler
    prompts = [c.text for c in sample_captions(9, 4)]
    try:
        pipeline.scheduler = make_scheduler(name, pipeline)
        with torch.no_grad():
            run = SamplingRun(pipeline, encode(pipeline, prompts, 4.0), SETTINGS)
            run.advance()
            run.advance()
            fork = run.fork()
            while not run.finished:
                run.advance()
            while not fork.finished:
                fork.advance()
    finally:
        pipeline.scheduler = scheduler
    assert torch.equal(run.latents, fork.latents)


def test_band_weights_do_not_depend_on_the_precision_of_the_model(pipeline, calibration):
    """The other components stay as they are: only the UNet's rounding could change what is measured."""
    half = edited_copy(pipeline.unet, {})
    texts = encode(pipeline, PROMPTS, SETTINGS.guidance)
    exact = measure_band_weights(pipeline, texts, SETTINGS, 4)
    assert exact == pytest.approx(calibration.band_weights)
    twin = type(pipeline)(
        **{**pipeline.components, "unet": copy.deepcopy(half).to(torch.bfloat16)}, requires_safety_checker=False
    )
    rounded = measure_band_weights(twin, texts, SETTINGS, 4)
    assert rounded == pytest.approx(exact, rel=0.3, abs=0.03)


@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler", "euler-a", "unipc", "lms"])
def test_calibration_works_with_every_kind_of_sampler(pipeline, name):
    scheduler = pipeline.scheduler
    try:
        pipeline.scheduler = make_scheduler(name, pipeline)
        found = record(pipeline, PROMPTS[:2], SETTINGS, bands=2)
    finally:
        pipeline.scheduler = scheduler
    assert torch.isfinite(found.inputs.samples).all()
    assert sum(found.band_weights) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "words"),
    [("heun", "HeunDiscreteScheduler calls the UNet 15 times in"), ("pndm", "PNDMScheduler calls the UNet 9 times in")],
)
def test_samplers_with_two_evaluations_per_step_are_named(pipeline, name, words):
    scheduler = pipeline.scheduler
    try:
        pipeline.scheduler = make_scheduler(name, pipeline)
        with pytest.raises(AsdmError, match=f"{words} 8 steps"):
            record(pipeline, PROMPTS, SETTINGS, bands=2)
    finally:
        pipeline.scheduler = scheduler


def test_guidance_off_needs_one_branch(pipeline):
    found = record(pipeline, PROMPTS[:1], SamplingSettings(4, 1.0, 0), bands=2)
    assert found.inputs.texts.shape[1] == 1


def test_what_cannot_be_calibrated_is_refused(pipeline):
    with pytest.raises(AsdmError, match="at least one prompt"):
        record(pipeline, [], SETTINGS)
    with pytest.raises(AsdmError, match="cannot be split"):
        record(pipeline, PROMPTS, SamplingSettings(4), bands=8)


def test_the_store_is_plain_json_lines(unet, calibration, few_options, tmp_path):
    store = tmp_path / "damages.jsonl"
    measure_damages(unet, few_options, calibration, store)
    lines = [json.loads(line) for line in store.read_text().splitlines() if line]
    assert [line["chunk"] for line in lines] == list(range(len(lines)))


def test_sketches_keep_scalar_products():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(64, 4, 16, 16, generator=generator)
    a, b = (shared + torch.randn(64, 4, 16, 16, generator=generator) for _ in range(2))
    found = (sketch(a) * sketch(b)).sum()
    assert sketch(a).shape == (64, SKETCH)
    assert found == pytest.approx(float((a * b).sum()), rel=0.1)
    assert sketch(a).square().sum() == pytest.approx(float(a.square().sum()), rel=0.1)
    assert sketch(torch.zeros(2, 4, 3, 3)).shape == (2, SKETCH)


def test_errors_that_add_up_are_foreseen(unet, mini_profile, calibration):
    """Two small edits in places that do not feed each other's errors much."""
    options = {o.name: o for o in find_options(unet, mini_profile)}
    a, b = (options[f"up_blocks.1.attentions.{i}.transformer_blocks.0.ff:drop"] for i in (0, 1))
    damages = measure_damages(unet, [a, b], calibration)
    together = measure_plan(unet, Plan({a.site: a.edit, b.site: b.edit}), calibration).total
    one, other = damages[a.name], damages[b.name]
    foreseen = one.total + other.total + one.interaction(other)
    assert foreseen == pytest.approx(together, rel=0.25)
    assert np.square(one.sketch).sum() == pytest.approx(one.total, rel=0.5)


@pytest.mark.parametrize(("guidance", "prompts", "bands"), [(4.0, 3, 2), (1.0, 2, 4)])
def test_how_long_a_recording_takes_is_known_before(pipeline, mini_profile, guidance, prompts, bands):
    """Oracle: the rows that go through the UNet."""
    rows = []
    hook = pipeline.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    sampling, effort = SamplingSettings(4, guidance), Effort(6, 2)
    try:
        record(pipeline, PROMPTS[:prompts], sampling, bands, effort=effort)
    finally:
        hook.remove()
    one = mini_profile.latency / mini_profile.fingerprint.batch
    expected = measuring_time(mini_profile, prompts, sampling, effort, bands, [])
    assert expected.recording == pytest.approx(sum(rows) * one)
    assert expected.total == expected.recording


@pytest.mark.parametrize(("is_fitted", "prompts"), [(True, 3), (True, 14), (False, 3)])
def test_how_long_damages_take_goes_by_the_moments_that_they_are_measured_on(
    pipeline, unet, mini_profile, few_options, is_fitted, prompts
):
    sampling, effort = SamplingSettings(2, 4.0), Effort(20, 1)
    captions = [c.text for c in sample_captions(prompts, 9)]
    recorded = replace(record(pipeline, captions, sampling, 2, effort=effort), held_out=is_fitted)
    moments = len(recorded.for_options()[1])
    one = 2 * mini_profile.latency / mini_profile.fingerprint.batch
    expected = measuring_time(mini_profile, prompts, sampling, effort, 2, few_options, is_fitted, refits=False)
    assert expected.measuring == pytest.approx(len(few_options) * moments * PART_OF_PASS * one, rel=0.35)
    twice = measuring_time(mini_profile, prompts, sampling, effort, 2, few_options, is_fitted, refits=True)
    assert twice.measuring == 2 * expected.measuring  # of cuts with and without what makes up for them
