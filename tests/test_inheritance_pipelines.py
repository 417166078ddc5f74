"""Inheritance under every kind of pipeline and call of the UNet: the same numbers as plain ones, and as fresh ones."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import subprocess
import sys

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from peft import LoraConfig

from asdm_compress.inheritance.actions import FULL, cut, inherit
from asdm_compress.inheritance.attach import inheriting
from asdm_compress.inheritance.forecast import LINEAR
from asdm_compress.inheritance.run import Run
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.sampling.schedulers import make_scheduler

RULE = "uniform:2,branch=1"
SUB_UNIT = "up_blocks.2.attentions.0.transformer_blocks.0.attn1"


def pictures(rows=1, channels=3, size=128, seed=0):
    return torch.rand(rows, channels, size, size, generator=torch.Generator().manual_seed(seed))


def mask():
    white = torch.zeros(1, 1, 128, 128)
    white[..., 32:96, 32:96] = 1
    return white


def call(pipe, seed=3, prompt="a small red circle", **more):
    settings = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "latent", **more}
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **settings).images


def predictions(pipe, **more):
    """All that the UNet has answered in one call of a pipeline."""
    found = []
    hook = pipe.unet.register_forward_hook(lambda _, __, answer: found.append(answer[0]))
    try:
        call(pipe, **more)
    finally:
        hook.remove()
    return found


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def controlnet(unet):
    torch.manual_seed(0)
    made = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 16))
    for name, parameter in made.named_parameters():
        if "controlnet_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def adapter(unet):
    torch.manual_seed(0)
    widths = list(unet.config["block_out_channels"])
    made = T2IAdapter(3, widths, num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter")
    return made.eval().requires_grad_(False)


def wider(unet, channels):
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config({**unet.config, "in_channels": channels}).eval().requires_grad_(False)


PICTURE = {"image": pictures()}
KINDS = {
    "text": (StableDiffusionPipeline, {}),
    "image": (StableDiffusionImg2ImgPipeline, {**PICTURE, "strength": 0.8, "num_inference_steps": 5}),
    "inpainting": (StableDiffusionInpaintPipeline, {**PICTURE, "mask_image": mask(), "strength": 1.0}),
    "inpainting mid-way": (
        StableDiffusionInpaintPipeline,
        {**PICTURE, "mask_image": mask(), "strength": 0.8, "num_inference_steps": 5},
    ),
    "inpainting UNet": (StableDiffusionInpaintPipeline, {**PICTURE, "mask_image": mask(), "strength": 1.0}),
    "ControlNet": (StableDiffusionControlNetPipeline, {**PICTURE, "control_guidance_end": 0.6}),
    "ControlNet guessing": (StableDiffusionControlNetPipeline, {**PICTURE, "guess_mode": True}),
    "ControlNet on image": (
        StableDiffusionControlNetImg2ImgPipeline,
        {**PICTURE, "control_image": pictures(seed=1), "strength": 0.8, "num_inference_steps": 5},
    ),
    "adapter": (StableDiffusionAdapterPipeline, {**PICTURE, "adapter_conditioning_scale": 0.5}),
    "perturbed attention": (StableDiffusionPAGPipeline, {"pag_scale": 2.0}),
    "instructions": (StableDiffusionInstructPix2PixPipeline, {**PICTURE, "image_guidance_scale": 1.5}),
}  # fmt: skip


@pytest.fixture
def make_kind(pipeline, controlnet, adapter):
    def new(name, unet=None, scheduler="ddim"):
        kind, _ = KINDS[name]
        known = inspect.signature(kind.__init__).parameters
        parts = {k: v for k, v in pipeline.components.items() if k in known}
        parts |= {"unet": unet or pipeline.unet, "scheduler": make_scheduler(scheduler, pipeline)}
        if name == "inpainting UNet":
            parts["unet"] = wider(pipeline.unet, 9)
        if name == "instructions":
            parts["unet"] = wider(pipeline.unet, 8)
        if "ControlNet" in name:
            parts["controlnet"] = controlnet
        if name == "adapter":
            parts["adapter"] = adapter
        if name == "perturbed attention":
            # This pipeline leaves its attention behind when it breaks off.
            parts |= {"pag_applied_layers": ["mid"], "unet": copy.deepcopy(pipeline.unet)}
        made = kind(**parts, requires_safety_checker=False)
        made.set_progress_bar_config(disable=True)
        return made

    yield new
    assert "forward" not in pipeline.unet.__dict__


@pytest.mark.parametrize("name", list(KINDS))
def test_every_kind_of_pipeline_computes_as_it_does_and_never_sees_another_run(make_kind, name):
    """Computed steps, whose features are recorded, are bit-identical to the plain pipeline's, others are not; and after
    another run, broken off half-way, all is as in a pipeline that has never run."""
    more = KINDS[name][1]
    pipe = make_kind(name)
    plain = predictions(pipe, **more)
    with inheriting(pipe, "uniform:1"):
        assert same(predictions(pipe, **more), plain)
    with inheriting(pipe, RULE):
        found = predictions(pipe, **more)
        assert torch.equal(found[0], plain[0])
        assert not torch.equal(found[1], plain[1])
        assert (found[1] - plain[1]).norm() < 0.5 * plain[1].norm()
        broken = pipe.unet.register_forward_hook(breaking_at(2))
        with pytest.raises(KeyboardInterrupt):
            call(pipe, seed=8, prompt="a large blue square", **more)
        broken.remove()
        assert same(predictions(pipe, **more), found)
    assert same(predictions(pipe, **more), plain)


def breaking_at(count):
    seen = []

    def hook(module, inputs, answer):
        seen.append(1)
        if len(seen) == count:
            raise KeyboardInterrupt

    return hook


@pytest.mark.parametrize("name", ["text", "ControlNet", "inpainting UNet"])
def test_a_step_for_one_guidance_branch_has_that_branch_of_everything(make_kind, name):
    """What the conditional rows get in a pass of their own is what they get beside the others."""
    more = KINDS[name][1]
    pipe = make_kind(name)
    plain = predictions(pipe, **more)
    with inheriting(pipe, "uniform:1,guidance=2,guidance-forecast=hold"):
        found = predictions(pipe, **more)
    assert torch.equal(found[0], plain[0])
    unconditional, conditional = found[1].chunk(2)
    assert torch.allclose(conditional, plain[1].chunk(2)[1], atol=1e-4)
    first = found[0].chunk(2)
    assert torch.allclose(conditional - unconditional, first[1] - first[0], atol=1e-5)


def with_lora(unet):
    unet.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "conv_in", "conv_shortcut", "proj_in", "ff.net.2"])
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


CHANGES = {
    "LoRA": with_lora,
    "dtype": lambda unet: unet.to(torch.bfloat16),
    "channels last": lambda unet: unet.to(memory_format=torch.channels_last),
    "attention": lambda unet: unet.set_default_attn_processor(),
    "fused": lambda unet: unet.fuse_qkv_projections(),
    "another attention module": lambda unet: setattr(
        unet.get_submodule(SUB_UNIT.rpartition(".")[0]),
        "attn1",
        copy.deepcopy(unet.get_submodule(SUB_UNIT.replace("2.attentions.0", "2.attentions.1"))),
    ),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_happens_to_the_unet_between_runs_is_seen_by_the_next(make_kind, change):
    """Against a pipeline enabled only after the change; the schedule has whole units and opened transformers."""
    rule = Schedule((FULL, inherit([SUB_UNIT], "branch"), FULL, cut(1, LINEAR)))
    unet = copy.deepcopy(make_kind("text").unet)
    pipe, fresh = make_kind("text", unet), make_kind("text", unet)
    pipe.text_encoder = fresh.text_encoder = copy.deepcopy(pipe.text_encoder)
    more = {"cross_attention_kwargs": {"scale": 0.5}} if change == "LoRA" else {}
    with inheriting(pipe, rule):
        before = predictions(pipe)
        CHANGES[change](unet)
        if change == "dtype":
            pipe.text_encoder.to(torch.bfloat16)
        found = predictions(pipe, **more)
        plain = predictions(fresh, **more)
        with inheriting(fresh, rule):
            assert same(found, predictions(fresh, **more))
        assert found[0].dtype == unet.dtype
        assert torch.equal(found[0], plain[0])
        assert not torch.equal(found[1], plain[1])
        if change in ("LoRA", "dtype", "another attention module"):
            assert not torch.equal(found[0].float(), before[0].float())


def test_sizes_and_rows_that_change_within_a_run_begin_anew(make_kind):
    """A callback may cut the batch; what was kept for other rows is not used."""
    pipe = make_kind("text")
    with inheriting(pipe, RULE):
        wide = predictions(pipe, prompt=["a cross"] * 3, height=64, width=128)
        assert same(predictions(pipe, prompt=["a cross"] * 3, height=64, width=128), wide)
        narrow = predictions(pipe, prompt="a cross", height=64, width=64, guidance_scale=1.0)
    assert narrow[0].shape == (1, 4, 8, 8)
    assert wide[0].shape == (6, 4, 8, 16)


def live_bytes():
    """Of all tensors that Python knows of, each storage once."""
    gc.collect()
    # Not those without memory that the compiler leaves behind, which are subclasses.
    plain = (torch.Tensor, torch.nn.Parameter)
    tensors = [found for found in gc.get_objects() if type(found) in plain and found.device.type == "cpu"]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def runs():
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is Run]


@pytest.fixture
def few_objects():
    """Leave what is there already out of `gc.get_objects`, which takes a second for a session's objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("rule", [RULE, "uniform:2,branch=8,guidance=2", Schedule((FULL, inherit([SUB_UNIT]), FULL))])
def test_only_the_inherited_tensors_are_held_and_nothing_at_the_end(make_kind, few_objects, rule):
    """Oracle: what a plain pipeline holds after the same step."""
    pipe = make_kind("text")
    steps = 3

    def measured(rule):
        seen = []

        def note(pipe, step, timestep, tensors):
            seen.append((live_bytes(), [run.held_bytes for run in runs()]))
            return tensors

        if rule is None:
            call(pipe, num_inference_steps=steps, callback_on_step_end=note)
        else:
            with inheriting(pipe, rule):
                call(pipe, num_inference_steps=steps, callback_on_step_end=note)
        return seen

    measured(None)
    plain, found = measured(None), measured(rule)
    assert [held for _, held in plain] == [[]] * steps
    assert found[0][1][0] > 0
    for (without, _), (bytes_now, held) in zip(plain, found, strict=True):
        assert len(held) == 1
        assert bytes_now - without == held[0]
    assert found[-1][1] == [0]
    assert not runs()


def test_a_run_that_breaks_off_holds_nothing_even_while_its_error_is_kept(make_kind):
    pipe = make_kind("text")
    hook = pipe.unet.register_forward_hook(breaking_at(2))
    with inheriting(pipe, RULE):
        with pytest.raises(KeyboardInterrupt) as kept:
            call(pipe)
        hook.remove()
        assert [run.held_bytes for run in runs()] in ([], [0])
    assert kept.value is not None


def test_a_busy_pipeline_ends_where_a_fresh_process_does(make_kind, tmp_path):
    script = """
import json, sys, torch
from asdm_compress.inheritance.attach import inheriting
from asdm_compress.models.loading import load_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.sampling.schedulers import make_scheduler
torch.set_num_threads(int(sys.argv[2]))
pipe = load_pipeline("mini-sd", LoadOptions())
pipe.scheduler = make_scheduler("ddim", pipe)
with inheriting(pipe, sys.argv[1]):
    found = pipe("a small red circle", generator=torch.Generator().manual_seed(3), num_inference_steps=4,
                 guidance_scale=4.0, output_type="latent").images
print(json.dumps(found.tolist()))
"""
    rule = "uniform:2,branch=1,guidance=3"
    command = [sys.executable, "-c", script, rule, str(torch.get_num_threads())]
    fresh = subprocess.run(command, capture_output=True, text=True, check=False)
    assert fresh.returncode == 0, fresh.stderr
    pipe, other = make_kind("text"), make_kind("image")
    with inheriting(pipe, rule), inheriting(other, "uniform:3"):
        call(pipe, seed=9, prompt=["a cross", "a green ring"], guidance_scale=1.0, height=64)
        call(other, **KINDS["image"][1])
        found = call(pipe)
    assert torch.equal(found, torch.tensor(json.loads(fresh.stdout.splitlines()[-1])))
