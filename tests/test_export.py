"""Other programs' layouts: diffusers' own converters as the oracle, and collapsed experts beside the routed ones."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import find_recipe, load_recipe
from asdm_compress.models.collapse import collapse_experts
from asdm_compress.models.ldm import text_encoder_to_ldm, unet_to_ldm, vae_to_ldm

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


def test_what_cannot_be_collapsed_is_said(unet):
    with pytest.raises(AsdmError, match="no experts"):
        collapse_experts(assemble(unet, Plan({"mid_block": "conv1x1"})), [1], per_step=False)
    with pytest.raises(AsdmError, match="routed by the features"):
        collapse_experts(assemble(unet, Plan({"mid_block": "conv1x1*4@both"})), [1], per_step=False)


def test_the_command_writes_one_file_that_holds_everything(cli, pipeline, tmp_path):
    result = cli("export", "mini-sd", "--format", "ldm", "--out", "all.safetensors", "--json")
    assert result.returncode == 0, result.stderr
    found = load_file(tmp_path / "all.safetensors")
    assert json.loads(result.stdout)["tensors"] == len(found)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert len(found) == sum(len(part.state_dict()) for part in parts)
    assert {value.dtype for value in found.values()} == {torch.float16}
    for arguments, message in (
        (["--format", "onyx"], "Formats: ldm"),
        (["--format", "ldm", "--out", "all.ckpt"], "single file"),
        (["--format", "static", "--out", "folder"], "no experts to collapse"),
    ):
        refused = cli("export", "mini-sd", *arguments)
        assert refused.returncode == 2
        assert message in refused.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"all.safetensors"}
