"""Images: seeds, batches, schedulers, and how near two runs are."""

from __future__ import annotations

import warnings
from itertools import combinations

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler, PNDMScheduler
from PIL import Image

from asdm_compress.core.errors import AsdmError
from asdm_compress.evaluation import prompts
from asdm_compress.evaluation.distances import frechet_distance
from asdm_compress.evaluation.fidelity import compare
from asdm_compress.evaluation.prompts import choose_prompts, read_prompts, understands_scenes
from asdm_compress.models.loading import load_pipeline, with_parts
from asdm_compress.models.saving import save_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.reporting.grid import labelled_grid
from asdm_compress.sampling import images
from asdm_compress.sampling.images import sample
from asdm_compress.sampling.schedulers import SCHEDULERS, choose_scheduler, make_scheduler, sample_alike, scheduler_like
from asdm_compress.sampling.settings import SamplingSettings

SETTINGS = SamplingSettings(steps=3, guidance=4.0, seed=11)
PROMPTS = ["a small red circle", "a large blue square on a white background", "a green ring"]


def test_an_image_depends_on_its_seed_and_not_on_its_batch(pipeline):
    together = sample(pipeline, PROMPTS, SETTINGS, batch=3)
    one_by_one = sample(pipeline, PROMPTS, SETTINGS, batch=1)
    assert torch.allclose(together.latents, one_by_one.latents, atol=1e-3)
    other = sample(pipeline, PROMPTS, SamplingSettings(3, 4.0, 12))
    assert not torch.allclose(together.latents, other.latents, atol=1e-1)


def test_large_pictures_are_decoded_one_by_one(pipeline, monkeypatch):
    latents, rows = sample(pipeline, PROMPTS, SETTINGS).latents, []
    handle = pipeline.vae.post_quant_conv.register_forward_pre_hook(lambda _, x: rows.append(len(x[0])))
    together = images.decode(pipeline, latents)
    monkeypatch.setattr(images, "DECODED_PIXELS", 128**2 + 1)
    apart = images.decode(pipeline, latents)
    handle.remove()
    assert rows == [3, 1, 1, 1]
    for one, other in zip(together, apart, strict=True):  # rounded otherwise at most
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_scheduler_samples(pipeline, name):
    scheduler = pipeline.scheduler
    try:
        pipeline.scheduler = make_scheduler(name, pipeline)
        found = sample(pipeline, PROMPTS[:1], SamplingSettings(4, 4.0, 0))
    finally:
        pipeline.scheduler = scheduler
    assert torch.isfinite(found.latents).all()
    assert found.images[0].size == (128, 128)


@pytest.mark.parametrize("scheduler", ["ddim", "euler-a", "ddpm"])
def test_a_seed_draws_what_it_draws_in_diffusers(pipeline, scheduler):
    """Also where the sampler adds noise, which must not be the noise again that a run starts from."""
    own = pipeline.scheduler
    try:
        pipeline.scheduler = make_scheduler(scheduler, pipeline)
        found = sample(pipeline, PROMPTS, SETTINGS)
        generators = [torch.Generator().manual_seed(SETTINGS.seed + i) for i in range(len(PROMPTS))]
        wanted = pipeline(
            PROMPTS, num_inference_steps=SETTINGS.steps, guidance_scale=SETTINGS.guidance, generator=generators,
            output_type="latent",
        ).images  # fmt: skip
    finally:
        pipeline.scheduler = own
    torch.testing.assert_close(found.latents, wanted)


def test_a_negative_prompt_is_diffusers(pipeline):
    found = sample(pipeline, PROMPTS, SETTINGS, batch=2, negative="a large red circle")
    wanted = pipeline(
        PROMPTS, negative_prompt=["a large red circle"] * 3, num_inference_steps=3, guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(11 + i) for i in range(3)], output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(found.latents, wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found.latents, sample(pipeline, PROMPTS, SETTINGS).latents, atol=0.1)


def test_the_prompts_of_probes_reports_and_evaluations_are_others(pipeline, monkeypatch):
    """Those of the bundled world, and general ones, of which there are only so many."""
    for understood in (True, False):
        monkeypatch.setattr(prompts, "understands_scenes", lambda _, understood=understood: understood)
        sets = [
            set(choose_prompts(pipeline, None, 4, 24).held_out),
            set(prompts.probe_prompts(pipeline, 24)),
            set(prompts.evaluation_prompts(pipeline, 60)[0]),
        ]
        assert all(len(one) >= 23 for one in sets)
        assert not any(one & other for one, other in combinations(sets, 2))


def test_unknown_schedulers_and_zero_steps_are_refused(pipeline):
    with pytest.raises(AsdmError, match="unknown scheduler"):
        make_scheduler("magic", pipeline)
    with pytest.raises(AsdmError, match="make no image"):
        sample(pipeline, PROMPTS, SamplingSettings(0))


def test_fidelity_is_perfect_for_equal_runs_and_falls(pipeline):
    run = sample(pipeline, PROMPTS, SETTINGS)
    same = compare(run, run)
    assert (same.latent_mse, same.psnr, same.ssim) == (0, 100, pytest.approx(1, abs=1e-9))
    other = compare(sample(pipeline, PROMPTS, SamplingSettings(3, 4.0, 50)), run)
    assert other.psnr < 30
    assert other.ssim < 1
    # Oracle: the definition of PSNR, by numpy.
    a, b = (
        np.asarray(r.images[0], dtype=float) for r in (run, sample(pipeline, PROMPTS, SamplingSettings(3, 4.0, 50)))
    )
    one = compare(sample(pipeline, PROMPTS[:1], SamplingSettings(3, 4.0, 50)), sample(pipeline, PROMPTS[:1], SETTINGS))
    assert one.psnr == pytest.approx(10 * np.log10(255**2 / ((a - b) ** 2).mean()), abs=0.1)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(200_000, 2)) * (1.0, 2.0)
    second = rng.normal(size=(200_000, 2)) * (3.0, 2.0) + (1.0, 0.0)
    assert frechet_distance(first, second) == pytest.approx(1 + (3 - 1) ** 2, rel=0.03)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_prompts_are_split_and_held_out_ones_are_new(pipeline, tmp_path):
    assert understands_scenes(pipeline)
    split = choose_prompts(pipeline, None, 8, 8)
    assert not set(split.calibration) & set(split.held_out)
    assert split.captions is not None
    assert tuple(c.text for c in split.captions) == split.held_out
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\n\nthree\nfour\n")
    split = choose_prompts(pipeline, read_prompts(path), 16, 16)
    assert (split.calibration, split.held_out) == (("one", "two"), ("three", "four"))


@pytest.mark.parametrize(
    ("given", "kept_back"), [(2, 1), (7, 1), (20, 5), (50, 8), (100, 8), (264, 8), (528, 16), (600, 16)]
)
def test_of_own_prompts_enough_are_kept_back_for_a_report(pipeline, given, kept_back):
    """In the proportion of the two numbers alone it would be one of twenty."""
    own = [f"prompt {i}" for i in range(given)]
    split = choose_prompts(pipeline, own, 512, 16)
    assert len(split.held_out) == kept_back
    assert len(split.calibration) == min(given - kept_back, 512)
    assert not set(split.calibration) & set(split.held_out)
    assert f"of {given} prompts {len(split.calibration)} are measured" in split.of_own(given)
    assert ("not used" in split.of_own(given)) == (given > 528)
    assert len(choose_prompts(pipeline, own, 1, 100).calibration) == 1


def test_bad_prompt_files_are_named(tmp_path):
    path = tmp_path / "prompts.txt"
    with pytest.raises(AsdmError, match="cannot be read"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(AsdmError, match="not UTF-8"):
        read_prompts(path)
    path.write_text("\n\n")
    with pytest.raises(AsdmError, match="has 0 prompts"):
        read_prompts(path)


def test_the_grid_holds_every_image_in_its_place():
    rows = [("teacher", [Image.new("RGB", (32, 32), c) for c in ("red", "green")]),
            ("student\nfast", [Image.new("RGB", (32, 32), c) for c in ("blue", "black")])]  # fmt: skip
    grid = labelled_grid(rows, ["first", "second one with a long text"])
    seen = {grid.getpixel((x, y)) for x in range(grid.width) for y in range(grid.height)}
    assert {(255, 0, 0), (0, 128, 0), (0, 0, 255), (0, 0, 0)} <= seen


def test_ddim_steps_from_one_of_its_timesteps_to_the_next(pipeline):
    assert pipeline.scheduler.config.timestep_spacing == "linspace"
    for name in ("ddim", "pndm"):
        scheduler = make_scheduler(name, pipeline)
        scheduler.set_timesteps(5)
        steps = scheduler.timesteps.unique()  # PNDM takes one of them twice
        assert steps.diff().tolist() == [1000 // 5] * 4
        assert scheduler.timesteps[0] == 999


def test_a_sampler_of_two_calls_a_step_is_replaced_unless_it_is_named(pipeline):
    own = pipeline.scheduler
    try:
        assert choose_scheduler(pipeline, None, 5, 25) is None
        assert pipeline.scheduler is own
        pipeline.scheduler = make_scheduler("pndm", pipeline)
        assert "PNDMScheduler" in str(choose_scheduler(pipeline, None, 5))
        assert type(pipeline.scheduler) is DPMSolverMultistepScheduler
        assert choose_scheduler(pipeline, "heun", 5) is None
        assert type(pipeline.scheduler) is HeunDiscreteScheduler
    finally:
        pipeline.scheduler = own


def test_a_named_scheduler_has_nothing_of_the_pipelines_own_kind(pipeline):
    own = pipeline.scheduler
    try:
        pipeline.scheduler = type(own).from_config(own.config, use_karras_sigmas=True, algorithm_type="sde-dpmsolver++")
        for name in ("dpm++", "unipc", "euler", "heun", "lms"):
            assert not make_scheduler(name, pipeline).config.use_karras_sigmas
        assert make_scheduler("dpm++", pipeline).config.algorithm_type == "dpmsolver++"
        assert make_scheduler("dpm++-karras", pipeline).config.use_karras_sigmas
    finally:
        pipeline.scheduler = own


def test_what_nobody_chose_of_a_sampler_stays_unchosen_in_a_saved_folder(pipeline, tmp_path):
    """As of the folders of Stable Diffusion 1.x: PNDM's own spacing of steps is none of DPM++'s."""
    unsaid = PNDMScheduler(skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear")
    original = with_parts(pipeline, scheduler=unsaid)
    save_pipeline(original, tmp_path / "saved")
    saved = load_pipeline(str(tmp_path / "saved"), LoadOptions())
    kinds = [make_scheduler("dpm++", one).config.timestep_spacing for one in (original, saved)]
    assert kinds == ["linspace", "linspace"]
    assert sample_alike(saved.scheduler, unsaid)
    # What a folder says is kept, be it what its class has by itself.
    said = PNDMScheduler(skip_prk_steps=True, steps_offset=1, timestep_spacing="leading")
    save_pipeline(with_parts(pipeline, scheduler=said), tmp_path / "said")
    again = load_pipeline(str(tmp_path / "said"), LoadOptions())
    assert make_scheduler("dpm++", again).config.timestep_spacing == "leading"
    # Spread timesteps are handed on to DDIM, said or not.
    spread = with_parts(pipeline, scheduler=make_scheduler("dpm++", original))
    save_pipeline(spread, tmp_path / "spread")
    for one in (spread, load_pipeline(str(tmp_path / "spread"), LoadOptions())):
        assert make_scheduler("ddim", one).config.timestep_spacing == "trailing"


def test_what_a_pipeline_has_corrected_of_its_sampler_is_handed_on(pipeline):
    """diffusers corrects an offset that nobody chose, and forgets it again where another is made of the config."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        corrected = with_parts(pipeline, scheduler=PNDMScheduler(skip_prk_steps=True)).scheduler
    assert corrected.config.steps_offset == 1
    assert type(corrected).from_config(corrected.config).config.steps_offset == 0
    assert scheduler_like(corrected, pipeline.scheduler).config.steps_offset == 1
