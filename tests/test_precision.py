"""In which precision errors are measured, whatever a pipeline runs in."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import StableDiffusionPipeline

from asdm_compress.assembly.calibration import Effort
from asdm_compress.assembly.damage import measure_damages
from asdm_compress.core.errors import AsdmError
from asdm_compress.distillation.probe import Probe
from asdm_compress.inheritance.attachment import Attachment
from asdm_compress.inheritance.corrections import Correction
from asdm_compress.inheritance.modes import parse_mode
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.models.loading import LoadOptions, load_pipeline, with_parts
from asdm_compress.models.precision import measured_in, true_fp32
from asdm_compress.profiling.profile import ProfileSettings
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.workflows.plan import PlanSettings, plan

PROMPTS = tuple(f"a small {colour} circle" for colour in ("red", "blue", "green", "yellow", "purple", "white"))
ROUNDED = 1e-8  # what bf16 makes of the same function is far above, what fp32 does far below


@pytest.fixture
def half(monkeypatch, tmp_path):
    """The bundled pipeline in bf16."""
    monkeypatch.setenv("ASDM_COMPRESS_CACHE", str(tmp_path / "cache"))
    return load_pipeline("mini-sd", LoadOptions(dtype=torch.bfloat16))


def settings(dtype=None, refit="none"):
    return PlanSettings(
        ProfileSettings(repeats=2), SamplingSettings(2, 1.0), prompts=PROMPTS, calibration_prompts=4,
        held_out_prompts=2, bands=2, effort=Effort(6, 1), slot="none", narrow=(), finest="unit", refit=refit,
        neighbours_seconds=0, measure_dtype=dtype,
    )  # fmt: skip


def as_bf16(inputs):
    return replace(inputs, samples=inputs.samples.bfloat16(), texts=inputs.texts.bfloat16())


def test_errors_are_measured_in_fp32_and_times_in_what_runs(half):
    found = plan(half, "macs=0.9x", settings(torch.float32, "scale"))
    fitted = [tensor for own in found.verified.slot_weights.values() for tensor in own.values()]
    assert fitted
    assert {tensor.dtype for tensor in fitted} == {torch.float32}
    assert found.calibration.inputs.samples.dtype == torch.float32
    assert half.unet.dtype == found.verified.student.dtype == torch.bfloat16
    assert found.profile.fingerprint.dtype == "bfloat16"
    # Edits that compute the same function tell what is rounding.
    exact = [damage.total for name, damage in found.damages.items() if name.endswith("subpixel")]
    assert exact
    assert max(exact) < ROUNDED
    (edit, *_) = [name for name in found.damages if name.endswith("subpixel")]
    calibration = replace(found.calibration, inputs=as_bf16(found.calibration.inputs))
    (option,) = [option for option in found.options if option.name == edit]
    assert measure_damages(half.unet, [option], calibration)[edit].total > ROUNDED


def test_a_pipeline_is_copied_only_where_it_has_another_precision(pipeline, half):
    assert measured_in(pipeline) is pipeline
    assert measured_in(pipeline, torch.float32) is pipeline
    assert measured_in(half) is half
    exact = measured_in(half, torch.float32)
    assert (exact.unet.dtype, half.unet.dtype) == (torch.float32, torch.bfloat16)
    assert all(torch.equal(a, b.float()) for a, b in zip(exact.unet.parameters(), half.unet.parameters(), strict=True))
    assert exact.vae is half.vae


def test_tf32_is_left_as_it_was():
    before = torch.backends.cudnn.allow_tf32
    with pytest.raises(ValueError, match="out"), true_fp32():
        assert not torch.backends.cudnn.allow_tf32
        raise ValueError("out")
    assert torch.backends.cudnn.allow_tf32 == before


def test_a_teacher_in_half_precision_is_probed_in_fp32(pipeline):
    """Oracle: a student that is the teacher itself is not off at all."""
    rounded = with_parts(pipeline, unet=copy.deepcopy(pipeline.unet).to(torch.bfloat16))
    sampling = SamplingSettings(8, 4.0)
    probe = Probe(rounded, PROMPTS[:2], sampling, exact=pipeline.unet)
    found = probe.measure(pipeline.unet)
    assert (found.damage, found.latent_error) == (0.0, pytest.approx(1e-12))
    assert Probe(pipeline, PROMPTS[:2], sampling).measure(pipeline.unet).damage == 0.0


def test_a_unet_that_is_elsewhere_is_not_measured(pipeline):
    offloaded = StableDiffusionPipeline(
        **{**pipeline.components, "unet": copy.deepcopy(pipeline.unet)}, requires_safety_checker=False
    )
    add_hook_to_module(offloaded.unet, ModelHook())
    with pytest.raises(AsdmError, match="offloaded"):
        plan(offloaded, "macs=0.9x", settings())


def test_corrections_are_moved_once_for_all_runs(pipeline):
    weight = torch.zeros(2, 6)
    attachment = Attachment(pipeline, parse_mode("uniform:2"), None)
    rule = Schedule((), {(1, "cut.0"): Correction(weight, torch.zeros(2))})
    like = torch.zeros(1, dtype=torch.float16)
    moved = attachment.corrections_on(rule, like)
    assert moved[1, "cut.0"].weight.dtype == torch.float16
    assert attachment.corrections_on(rule, like) is moved
    assert attachment.corrections_on(rule, torch.zeros(1))[1, "cut.0"].weight is weight
