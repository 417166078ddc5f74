"""Other programs' layouts: diffusers' own converters as the oracle, and collapsed experts beside the routed ones."""

from __future__ import annotations

import json
import re

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble, build, specify
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import find_recipe, load_recipe
from asdm_compress.models.collapse import collapse_experts
from asdm_compress.models.expert_conv import Moment
from asdm_compress.models.families import FAMILIES
from asdm_compress.models.ldm import UNET_PREFIX, text_encoder_to_ldm, unet_to_ldm, vae_to_ldm
from asdm_compress.models.loading import load_pipeline
from asdm_compress.models.programs import PROGRAMS, verdicts
from asdm_compress.models.saving import save_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.workflows.export import run_export
from asdm_compress.workflows.progress import Silent

ROUTED = Plan({"down_blocks.0.layers.1": "conv3x3*8@timestep", "mid_block": "conv1x1*4@timestep"})


def plan_of(name):
    return Plan(load_recipe(find_recipe(name)).as_edits())


@pytest.mark.parametrize("plan", [Plan({}), plan_of("bk-sdm-base-v1"), Plan({"levels.3": "drop"})])
def test_unet_names_are_those_that_diffusers_reads(unet, plan):
    """Oracle: diffusers' converter from the LDM layout gives every tensor back under its old name."""
    student = assemble(unet, plan)
    found = unet_to_ldm(student)
    assert all(tensor.is_contiguous() for tensor in found.values())
    config = dict(student.config)
    if student.mid_block is None:  # the converter knows no UNet without a mid block: it gets one, and it is ignored
        deepest = len(student.down_blocks) - 1
        with torch.device("meta"):
            whole = UNet2DConditionModel(**{**config, "mid_block_type": "UNetMidBlock2DCrossAttn"})
        assert deepest == 2
        found |= {k: v for k, v in unet_to_ldm(whole).items() if ".middle_block." in k}
    back = convert_ldm_unet_checkpoint(found, config)
    ours = student.state_dict()
    back = {key: value for key, value in back.items() if student.mid_block is not None or "mid_block" not in key}
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)


def test_blocks_are_renumbered_without_holes(unet):
    found = unet_to_ldm(assemble(unet, plan_of("bk-sdm-base-v1")))
    numbers = {key.split(".")[3] for key in found if ".input_blocks." in key}
    assert numbers == {str(i) for i in range(8)}
    numbers = {key.split(".")[3] for key in found if ".output_blocks." in key}
    assert numbers == {str(i) for i in range(8)}


def test_full_size_names(sd15_on_meta):
    """The names that the original checkpoints are known by."""
    names = set(unet_to_ldm(sd15_on_meta))
    assert len(names) == len(sd15_on_meta.state_dict())
    assert {
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
        "model.diffusion_model.out.2.bias",
    } <= names


@pytest.fixture(scope="module")
def tiny_on_meta(sd15_on_meta):
    spec = specify(sd15_on_meta, plan_of("bk-sdm-tiny-v1"))
    return build(spec.config, spec.edits)


def test_names_with_gaps_are_those_that_stable_diffusion_cpp_builds_for_a_tiny_unet(tiny_on_meta):
    """Oracle: the loop over blocks in its unet.hpp, written out."""
    names = unet_to_ldm(tiny_on_meta, with_gaps=True)
    places = {".".join(key.split(".")[2:5]) for key in names if "put_blocks." in key}
    assert places == {
        *(f"input_blocks.{place}" for place in ("0.0", "1.0", "1.1", "3.0", "4.0", "4.1", "6.0", "7.0", "7.1")),
        *(f"output_blocks.{i}.{j}" for i in (0, 1, 3, 4, 6, 7) for j in (0, 1)),
        "output_blocks.2.1", "output_blocks.5.2",
    }  # fmt: skip
    assert len(names) == len(tiny_on_meta.state_dict())
    shapes = [tuple(t.shape) for t in unet_to_ldm(tiny_on_meta).values()]
    assert shapes == [tuple(t.shape) for t in names.values()]


def comfy_reads(names):
    """What ComfyUI's detector makes of a UNet's names: layers per level, transformers on the way in and out, mid."""

    def transformers(place):
        found = (re.match(rf"{re.escape(place)}\.1\.transformer_blocks\.(\d+)\.", name) for name in names)
        return len({match[1] for match in found if match})

    def any_in(place):
        return any(name.startswith(f"{place}.") for name in names)

    count = next(i for i in range(99) if not any_in(f"input_blocks.{i}"))
    layers, way_in, way_out = [0], [], []
    for i in range(count):
        here, facing = f"input_blocks.{i}", f"output_blocks.{count - 1 - i}"
        if f"{here}.0.op.weight" in names:
            layers.append(0)
        elif f"{here}.0.in_layers.0.weight" in names:
            layers[-1] += 1
            way_in.append(transformers(here))
        if any_in(f"{facing}.0") or f"{here}.0.op.weight" in names:
            way_out.append(transformers(facing))
    mid = transformers("middle_block") if any_in("middle_block.1") else -1 if any_in("middle_block.0") else -2
    return layers, way_in, way_out, mid


def comfy_builds(layers, way_in, way_out, mid):
    """The places of the modules that its UNet then has."""
    places, way_in, way_out = {"input_blocks.0.0"}, list(way_in), list(way_out)
    number = 1
    for level, depth in enumerate(layers):
        for _ in range(depth):
            places |= {f"input_blocks.{number}.{j}" for j in range(2 if way_in.pop(0) else 1)}
            number += 1
        if level < len(layers) - 1:
            places.add(f"input_blocks.{number}.0")
            number += 1
    places |= {f"middle_block.{j}" for j in range({-2: 0, -1: 1}.get(mid, 3))}
    number = 0
    for level, depth in reversed(list(enumerate(layers))):
        for layer in range(depth + 1):
            parts = 2 if way_out.pop() else 1
            parts += bool(level and layer == depth)  # the upsampler
            places |= {f"output_blocks.{number}.{j}" for j in range(parts)}
            number += 1
    assert not way_in
    assert not way_out
    return places


@pytest.mark.parametrize("plan", [
    Plan({}), *(plan_of(f"{name}-v1") for name in ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny", "shallow-1-1-1-2")),
    Plan({"mid_block.attentions.0": "drop", "mid_block.resnets.1": "drop"}),
    Plan({f"down_blocks.0.attentions.{j}": "drop" for j in (0, 1)} | {
        f"up_blocks.3.attentions.{j}": "drop" for j in (0, 1, 2)}),
])  # fmt: skip
def test_names_keep_the_conventions_by_which_comfyui_reads_and_rebuilds_a_unet(sd15_on_meta, plan):
    """Oracles: its detector and its constructor, in short (comfy/model_detection.py, openaimodel.py)."""
    spec = specify(sd15_on_meta, plan)
    assert spec.is_stock
    student = build(spec.config, spec.edits)
    names = {name.removeprefix(UNET_PREFIX) for name in unet_to_ldm(student)}
    read = comfy_reads(names)
    depths = student.config["layers_per_block"]
    assert read[0] == ([depths] * len(student.down_blocks) if isinstance(depths, int) else list(depths))
    places = {".".join(name.split(".")[: 2 if name.startswith("middle") else 3]) for name in names if "_block" in name}
    assert comfy_builds(*read) == places


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_which_programs_open_which_students(family):
    """Rows are published students and one of ours, columns are programs that read single files."""
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**FAMILIES[family].unet_config)
    version = "v1" if family == "sd15" else "v2"
    columns = ("AUTOMATIC1111", "ComfyUI", "stable-diffusion.cpp", "asdm-compress")
    rows = {None: "++++", f"bk-sdm-base-{version}": "-+-+", f"bk-sdm-small-{version}": "-+-+",
            f"bk-sdm-tiny-{version}": "-+-+", f"shallow-1-2-2-2-{version}": "-+-+"}  # fmt: skip
    for recipe, marks in rows.items():
        spec = specify(teacher, plan_of(recipe) if recipe else Plan({}))
        student = build(spec.config, spec.edits)
        found = {v.program: v for v in verdicts(student, "ldm", is_whole=True)}
        assert "".join("+" if found[name].opens else "-" for name in columns) == marks, recipe
        assert all(found[name].why for name, mark in zip(columns, marks, strict=True) if mark == "-")
        assert ("ModelSamplingDiscrete" in found["ComfyUI"].why) == (version == "v2" and recipe is not None)
        [cpp] = verdicts(student, "sdcpp", is_whole=True)
        assert cpp.opens == (recipe is not None and "tiny" in recipe)
        assert verdicts(student, "folder", is_whole=True)[0].opens


def test_why_programs_do_not_open_other_unets(unet, sd15_on_meta, tiny_on_meta):
    def why(student, program="ComfyUI", layout="ldm", is_whole=True):
        [found] = [v for v in verdicts(student, layout, is_whole) if v.program == program]
        return "" if found.opens else found.why

    def changed(**change):
        with torch.device("meta"):
            return UNet2DConditionModel(**{**FAMILIES["sd15"].unet_config, **change})

    assert "320 channels" in why(unet)
    assert "full UNet" in why(unet, "AUTOMATIC1111")
    assert "whole checkpoints" in why(sd15_on_meta, "AUTOMATIC1111", is_whole=False)
    assert why(sd15_on_meta, is_whole=False) == ""
    assert "--format sdcpp" in why(tiny_on_meta, "stable-diffusion.cpp")
    for program in ("AUTOMATIC1111", "ComfyUI", "stable-diffusion.cpp"):
        assert "attention heads" in why(changed(attention_head_dim=4), program)
        assert "9 for inpainting" in why(changed(in_channels=5), program)
        assert why(changed(in_channels=9), program) == ""
    edited = assemble(unet, Plan({"mid_block": "conv1x1"}))
    assert "no place for convolutions" in why(edited)
    assert "import asdm_compress" in why(edited, "diffusers", "folder")
    assert why(edited, "diffusers with asdm-compress", "folder") == ""
    assert why(edited, "ONNX Runtime", "onnx", is_whole=False) == ""


def test_every_program_says_where_its_needs_were_read():
    assert all(program.source for program in PROGRAMS)


def test_vae_and_text_encoder_names_are_those_that_diffusers_reads(pipeline):
    vae = pipeline.vae
    assert isinstance(vae, AutoencoderKL)
    back = convert_ldm_vae_checkpoint(vae_to_ldm(vae), dict(vae.config))
    ours = vae.state_dict()
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key].reshape(ours[key].shape), ours[key]) for key in ours)
    encoder = pipeline.text_encoder
    back = convert_ldm_clip_checkpoint(text_encoder_to_ldm(encoder))
    ours = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    assert {key.removeprefix("text_model.") for key in back} == ours.keys()
    assert all(torch.equal(value, ours[key.removeprefix("text_model.")]) for key, value in back.items())


def test_a_text_encoder_of_sd_2_gets_open_clips_names():
    config = CLIPTextConfig(hidden_size=1024, num_hidden_layers=2, intermediate_size=64, vocab_size=50,
                            num_attention_heads=16)  # fmt: skip
    torch.manual_seed(0)
    encoder = CLIPTextModel(config)
    found = text_encoder_to_ldm(encoder)
    assert found["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"].shape == (3072, 1024)
    back = convert_open_clip_checkpoint(CLIPTextModel(config), found, prefix="cond_stage_model.model.")
    ours = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    same = {key.removeprefix("text_model."): value for key, value in back.items()}
    assert ours.keys() <= same.keys()
    assert all(torch.equal(same[key], ours[key]) for key in ours)


def test_slots_have_no_name_in_a_single_file(unet):
    with pytest.raises(AsdmError, match=r"no names for 2 edits of this UNet"):
        unet_to_ldm(assemble(unet, Plan({"down_blocks.0.resnets.0": "conv1x1", "mid_block.resnets.0": "narrow0.5"})))


@pytest.fixture
def routed(unet):
    student = assemble(unet, ROUTED)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in student.state_dict().items():
        if ".slot." in name and "router" not in name:
            tensor.copy_(0.02 * torch.randn(tensor.shape, generator=generator))
    return student


def test_a_kernel_per_step_changes_nothing_at_these_steps(routed, inputs):
    timesteps = [961, 700, 433, 250, 40]
    twin = collapse_experts(routed, timesteps, per_step=True)
    assert twin.config["edits"]["mid_block.resnets.0"] == "conv1x1*5@timestep"
    for timestep in timesteps:
        with torch.no_grad():
            one, other = (u(inputs[0], timestep, inputs[2]).sample for u in (routed, twin))
        assert torch.allclose(one, other, atol=1e-6)


def test_steps_that_lie_close_do_not_reach_into_one_another(routed, inputs):
    timesteps = [float(t) for t in range(995, 0, -5)]
    twin = collapse_experts(routed, timesteps, per_step=True)
    for timestep in timesteps[3::40]:
        with torch.no_grad():
            one, other = (u(inputs[0], timestep, inputs[2]).sample for u in (routed, twin))
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("edit", ["separable3x3*2@timestep", "conv3x3-rank8*2@timestep"])
def test_factors_are_not_averaged_one_by_one(unet, edit):
    """Of two experts that do the same by opposite factors, the one kernel does the same too."""
    student = assemble(unet, Plan({"mid_block.resnets.0": edit}))
    slot = student.get_submodule("mid_block.resnets.0.slot")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in slot.weights:
            weight[0].copy_(0.1 * torch.randn(weight[0].shape, generator=generator))
            weight[1].copy_(-weight[0])
        slot.bias.copy_(0.1 * torch.ones_like(slot.bias))
        single = collapse_experts(student, [950, 20], per_step=False)
        hidden, moment = (
            torch.randn(2, slot.in_channels, 8, 8, generator=generator),
            Moment(torch.tensor([950.0, 950.0])),
        )
        expected, found = slot(hidden, moment), single.get_submodule("mid_block.resnets.0.slot")(hidden, moment)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_one_kernel_is_the_mean_of_the_steps_kernels(routed, inputs, tmp_path):
    single = collapse_experts(routed, [700], per_step=False)
    with torch.no_grad():
        one, other = (u(inputs[0], 700, inputs[2]).sample for u in (routed, single))
        assert torch.allclose(one, other, atol=1e-6)
    assert single.config["edits"]["mid_block.resnets.0"] == "conv1x1"
    assert not any("router" in key for key in single.state_dict())
    mean = collapse_experts(routed, [950, 20], per_step=False)
    key = "mid_block.resnets.0.slot.weights.0"
    kernels = routed.state_dict()[key]
    assert torch.allclose(mean.state_dict()[key][0], (kernels[0] + kernels[3]) / 2, atol=1e-7)
    mean.save_pretrained(tmp_path)
    again = type(mean).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(*inputs).sample, mean(*inputs).sample)


@pytest.mark.parametrize("form", ["per-step", "static"])
def test_the_command_collapses_experts_for_a_named_sampler(cli, pipeline, routed, inputs, tmp_path, form):
    whole = StableDiffusionPipeline(**{**pipeline.components, "unet": routed}, requires_safety_checker=False)
    save_pipeline(whole, tmp_path / "student")
    sampler = ("--scheduler", "euler", "--steps", "5")
    result = cli("export", "student", "--format", form, "--out", "fixed", *sampler, "--json")
    assert result.returncode == 0, result.stderr
    fixed = load_pipeline(str(tmp_path / "fixed"), LoadOptions())
    timesteps = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    timesteps.set_timesteps(5)
    assert fixed.unet.config["edits"]["mid_block.resnets.0"] == (
        "conv1x1*5@timestep" if form == "per-step" else "conv1x1"
    )
    for timestep in timesteps.timesteps:
        with torch.no_grad():
            one, other = (unet(inputs[0], timestep, inputs[2]).sample for unet in (routed, fixed.unet))
        assert torch.allclose(one, other, atol=1e-6) == (form == "per-step")


def test_what_cannot_be_collapsed_is_said(unet):
    with pytest.raises(AsdmError, match="no experts"):
        collapse_experts(assemble(unet, Plan({"mid_block": "conv1x1"})), [1], per_step=False)
    with pytest.raises(AsdmError, match="routed by the features"):
        collapse_experts(assemble(unet, Plan({"mid_block": "conv1x1*4@both"})), [1], per_step=False)


def test_the_command_writes_one_file_that_holds_everything(cli, pipeline, tmp_path):
    result = cli("export", "mini-sd", "--format", "ldm", "--out", "all.safetensors", "--json")
    assert result.returncode == 0, result.stderr
    found = load_file(tmp_path / "all.safetensors")
    said = json.loads(result.stdout)
    assert said["tensors"] == len(found)
    assert not any(program["opens"] for program in said["programs"])  # its text is 96 wide
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert len(found) == sum(len(part.state_dict()) for part in parts)
    assert {value.dtype for value in found.values()} == {torch.float16}
    assert {path.name for path in tmp_path.iterdir()} == {"all.safetensors"}


@pytest.mark.parametrize(
    ("form", "out", "message"),
    [
        ("onyx", "out", "unknown format 'onyx'"),
        ("ldm", "all.ckpt", "no .safetensors file"),
        ("sdcpp", "tiny.safetensors", "does not open this UNet: under these names it builds BK-SDM-Tiny's"),
        ("static", "folder", "no experts to collapse"),
        ("portable", "folder", "needs no loader"),
    ],
)
def test_what_a_layout_cannot_express_is_refused_and_nothing_is_written(tmp_path, form, out, message):
    with pytest.raises(AsdmError, match=message):
        run_export("mini-sd", tmp_path / out, form, LoadOptions(dtype=None), 25, None, Silent())
    assert list(tmp_path.iterdir()) == []
