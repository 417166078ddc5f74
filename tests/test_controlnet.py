"""ControlNets of teachers on students, and ControlNets made from students."""

from __future__ import annotations

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

import asdm_compress
from asdm_compress.assembly.controlnet import controlnet_from, remap_controlnet
from asdm_compress.assembly.other_starts import random_start
from asdm_compress.assembly.plan import Plan, edited
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import find_recipe, load_recipe

CONDITION = (4, 8, 8, 16)
PLANS = {
    "base": load_recipe(find_recipe("bk-sdm-base-v1")).as_edits(),
    "tiny": load_recipe(find_recipe("bk-sdm-tiny-v1")).as_edits(),
    "no mid block": {"mid_block": "drop"},
    "first layer": {"down_blocks.3.resnets.0": "drop", "up_blocks.0.resnets.2": "drop"},
    "unfolded": {"down_blocks.1.layers.1": "drop", "up_blocks.0.resnets.1": "drop", "up_blocks.3.attentions.0": "drop"},
    "other depths": {"down_blocks.0.layers.1": "drop", "up_blocks.3.layers.1": "drop"},
    "slots": {
        "down_blocks.1.layers.1": "conv1x1*4@timestep",
        "down_blocks.2.attentions.0.transformer_blocks.0.attn1": "narrow0.5",
        "mid_block.resnets.1": "conv1x1",
        "up_blocks.1.resnets.1": "drop",
    },
}


def with_random_zeros(controlnet):
    """Zero convolutions that are not zero, as after a training."""
    torch.manual_seed(0)
    for name, parameter in controlnet.named_parameters():
        if "controlnet_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return controlnet.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def controlnet(unet):
    return with_random_zeros(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=CONDITION))


@pytest.fixture(scope="module")
def condition():
    return torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))


def controlled(unet, residuals, inputs):
    skips, mid = residuals
    return unet(
        *inputs, down_block_additional_residuals=tuple(skips), mid_block_additional_residual=mid, return_dict=False
    )[0]


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in PLANS if name != "slots"])
def test_a_student_takes_of_the_teachers_controlnet_what_the_edited_teacher_takes(
    unet, controlnet, inputs, condition, name
):
    """Oracle: diffusers' own forward pass of the teacher with the edits in place, whose numbering is the teacher's."""
    plan = Plan(PLANS[name])
    reference, student = edited(unet, plan), assemble(unet, plan)
    skips, mid = controlnet(*inputs, condition, return_dict=False)
    if name == "tiny":  # the mid block's residual belongs to a level that is gone
        skips = skips[: sum(1 + len(block.resnets) for block in reference.down_blocks)]
        mid = torch.zeros_like(skips[-1])
    remapped = remap_controlnet(controlnet, unet, plan)
    given = remapped.controlnet(*inputs, condition, return_dict=False)
    found, expected = controlled(student, given, inputs), controlled(reference, (skips, mid), inputs)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, student(*inputs).sample, atol=1e-3)
    assert len(given[0]) == len(remapped.controlnet.config.get("skips") or skips)


def test_what_has_no_taker_is_named(unet, controlnet):
    assert remap_controlnet(controlnet, unet, Plan(PLANS["no mid block"])).left_out == ()
    tiny = remap_controlnet(controlnet, unet, Plan(PLANS["tiny"]))
    assert {"down_blocks.2.downsamplers.0", "down_blocks.3.resnets.0", "mid_block"} <= set(tiny.left_out)
    assert len(tiny.controlnet.down_blocks) == 3 and tiny.controlnet.mid_block is None
    unfolded = remap_controlnet(controlnet, unet, Plan({"up_blocks.0.resnets.1": "drop"}))
    assert unfolded.controlnet is controlnet
    assert unfolded.left_out == ("down_blocks.3.resnets.0",)


def test_a_controlnet_of_another_unet_is_refused(unet, controlnet):
    with pytest.raises(AsdmError, match="8 residuals do not fit the teacher's 12"):
        small = controlnet_from(assemble(unet, Plan(PLANS["base"])), conditioning_embedding_out_channels=CONDITION)
        remap_controlnet(small, unet, Plan(PLANS["base"]))
    tiny = remap_controlnet(controlnet, unet, Plan(PLANS["tiny"])).controlnet
    with pytest.raises(AsdmError, match="made for a student"):
        remap_controlnet(tiny, unet, Plan(PLANS["tiny"]))


@torch.no_grad()
@pytest.mark.parametrize("name", list(PLANS))
def test_a_controlnet_made_from_a_student_has_its_encoder(unet, inputs, condition, tmp_path, name):
    """Oracle: with identities for the zero convolutions, and nothing seen, the residuals are the encoder's outputs."""
    plan = Plan(PLANS[name])
    student = assemble(unet, plan, random_start(unet, plan))
    made = controlnet_from(student, conditioning_embedding_out_channels=CONDITION).eval()
    for convolution in [*made.controlnet_down_blocks, made.controlnet_mid_block]:
        torch.nn.init.dirac_(convolution.weight)
    seen = {}
    before = student.up_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(mid=kwargs["hidden_states"]), with_kwargs=True
    )
    skips = []
    hooks = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: skips.append(kwargs["res_hidden_states_tuple"]), with_kwargs=True
        )
        for block in student.up_blocks
    ]
    student(*inputs)
    for hook in (before, *hooks):
        hook.remove()
    expected = [skip for part in reversed(skips) for skip in part]
    residuals, mid = made(*inputs, condition, return_dict=False)
    assert len(residuals) == len(expected)
    for found, wanted in zip(residuals, expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(mid, seen["mid"], atol=1e-5)
    made.save_pretrained(tmp_path)
    again = type(made).from_pretrained(tmp_path)
    reopened, mid_again = again(*inputs, condition, return_dict=False)
    assert torch.equal(mid, mid_again)
    assert all(torch.equal(a, b) for a, b in zip(residuals, reopened, strict=True))


def test_a_stock_controlnet_is_made_where_diffusers_can(unet):
    stock = controlnet_from(assemble(unet, Plan(PLANS["base"])))
    assert type(stock) is ControlNetModel
    assert type(controlnet_from(assemble(unet, Plan(PLANS["no mid block"])))) is asdm_compress.AssembledControlNetModel


def test_pipelines_with_them_are_saved_and_opened(pipeline, unet, controlnet, tmp_path):
    plan = Plan(PLANS["tiny"])
    remapped = remap_controlnet(controlnet, unet, plan).controlnet
    parts = {**pipeline.components, "unet": assemble(unet, plan), "controlnet": remapped}
    whole = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    whole.save_pretrained(tmp_path)
    again = StableDiffusionControlNetPipeline.from_pretrained(tmp_path)
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    images = []
    for each in (whole, again):
        each.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        images.append(
            each("a red circle", image=image, num_inference_steps=2, generator=generator, output_type="pt").images
        )
    assert torch.equal(*images)
