"""Students: pure functions of teacher and plan, saved and opened again without a difference."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from asdm_compress.assembly.options import find_options
from asdm_compress.assembly.plan import Plan, edited
from asdm_compress.assembly.surgery import assemble, removed_tensors, specify
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.assembled_unet import AssembledUNet2DConditionModel
from asdm_compress.models.families import FAMILIES

# BK-SDM's three students of SD 1.x, as plans (Kim et al., 2305.15798).
BK_BASE = {
    **{f"down_blocks.{i}.layers.1": "drop" for i in range(3)},
    "down_blocks.3.resnets.1": "drop",
    "up_blocks.0.resnets.1": "drop",
    **{f"up_blocks.{i}.layers.1": "drop" for i in (1, 2, 3)},
}
BK_SMALL = {**BK_BASE, "mid_block": "drop"}
BK_TINY = {
    **{site: edit for site, edit in BK_BASE.items() if not site.startswith(("down_blocks.3", "up_blocks.0"))},
    "levels.3": "drop",
}
MIXED = {
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1": "drop",
    "down_blocks.1.layers.1": "drop",
    "up_blocks.2.layers.1": "drop",
    "up_blocks.1.resnets.2": "drop",
    "up_blocks.3.resnets.0": "shortcut",
    "down_blocks.2.downsamplers.0": "drop",
    "up_blocks.1.upsamplers.0": "drop",
}


@torch.no_grad()
def predict(unet, inputs):
    return unet(*inputs, return_dict=False)[0]


def test_an_empty_plan_is_bit_identical_and_stock(unet, inputs):
    student = assemble(unet, Plan())
    assert type(student) is UNet2DConditionModel
    assert torch.equal(predict(student, inputs), predict(unet, inputs))


def test_the_teacher_is_neither_touched_nor_shared(unet, inputs):
    before = predict(unet, inputs)
    student = assemble(unet, Plan(MIXED))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert torch.equal(predict(unet, inputs), before)


def test_what_else_a_config_says_is_left_out(unet):
    """Training scripts write how they have averaged into the config of what they save."""
    odd = UNet2DConditionModel.from_config({**unet.config, "decay": 0.9999, "power": 0.75})
    assert odd.config["decay"] == 0.9999
    student = assemble(odd, Plan({"mid_block": "drop"}))
    assert "decay" not in student.config
    assert student.mid_block is None


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_the_student_of_any_plan_is_the_edited_teacher(unet, mini_profile, inputs, data):
    options = find_options(unet, mini_profile)
    # Whole layers often, so that encoder and decoder fold into a smaller stock config.
    layers = [o for o in options if ".layers." in o.site or o.site in ("mid_block", "levels.3")]
    chosen, taken = [], set()
    for option in data.draw(st.lists(st.one_of(st.sampled_from(layers), st.sampled_from(options)), max_size=16)):
        if not option.atoms & taken:
            chosen.append(option)
            taken |= option.atoms
    plan = Plan({o.site: o.edit for o in chosen})
    student = assemble(unet, plan)
    assert torch.equal(predict(student, inputs), predict(edited(unet, plan), inputs))
    spec = specify(unet, plan)
    assert set(spec.weight_map) == set(student.state_dict())
    assert len(spec.weight_map) + len(removed_tensors(unet, spec)) == len(unet.state_dict())


@pytest.mark.parametrize(
    ("plan", "parameters"),
    [(BK_BASE, 579_384_964), (BK_SMALL, 482_346_884), (BK_TINY, 323_384_964)],
    ids=["base", "small", "tiny"],
)
def test_bk_sdm_students_are_stock_and_have_the_published_size(unet, inputs, sd15_on_meta, plan, parameters):
    full = specify(sd15_on_meta, Plan(plan))
    assert full.is_stock
    with torch.device("meta"):
        student = UNet2DConditionModel(**full.config)
    assert sum(p.numel() for p in student.parameters()) == parameters
    mini = assemble(unet, Plan(plan))
    assert type(mini) is UNet2DConditionModel
    assert torch.equal(predict(mini, inputs), predict(edited(unet, Plan(plan)), inputs))


@pytest.mark.parametrize(
    ("plan", "parameters"),
    [(BK_BASE, 583_480_964), (BK_SMALL, 485_787_524), (BK_TINY, 326_825_604)],
    ids=["base", "small", "tiny"],
)
def test_bk_sdm_v2_students_have_the_published_size_and_their_own_heads(plan, parameters):
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**FAMILIES["sd21-base"].unet_config)
        spec = specify(teacher, Plan(plan))
        student = UNet2DConditionModel(**spec.config)
    assert spec.is_stock
    assert sum(p.numel() for p in student.parameters()) == parameters
    assert list(spec.config["attention_head_dim"]) == [5, 10, 20, 20][: len(student.down_blocks)]


@pytest.mark.parametrize("family", ["sd15", "sd21-base"])
@pytest.mark.parametrize(
    ("plan", "dropped_levels"), [(BK_BASE, 0), (BK_SMALL, 0), (BK_TINY, 1)], ids=["base", "small", "tiny"]
)
def test_bk_sdm_weight_maps_are_the_published_ones(family, plan, dropped_levels):
    """Its copying: a decoder block's second layer is the teacher's third, and of Tiny its blocks are one further up."""
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**FAMILIES[family].unet_config)

    def theirs(name: str) -> str:
        decoder = re.match(r"up_blocks\.(\d)\.(.*)", name)
        if decoder is None:
            return name
        within = re.sub(r"^(resnets|attentions)\.1\.", r"\1.2.", decoder[2])
        return f"up_blocks.{int(decoder[1]) + dropped_levels}.{within}"

    spec = specify(teacher, Plan(plan))
    with torch.device("meta"):
        names = list(UNet2DConditionModel(**spec.config).state_dict())
    assert spec.weight_map == {name: theirs(name) for name in names}


@pytest.mark.parametrize(("plan", "stock"), [(BK_TINY, True), (MIXED, False)], ids=["stock", "assembled"])
def test_saving_and_opening_in_a_fresh_process_makes_no_difference(reloaded_difference, unet, tmp_path, plan, stock):
    """A stock student opens without this package."""
    printed = reloaded_difference(assemble(unet, Plan(plan)), tmp_path / "student", with_package=not stock)
    assert "DIFFERENCE 0.0" in printed
    config = json.loads((tmp_path / "student" / "unet" / "config.json").read_text())
    assert (config["_class_name"] == "UNet2DConditionModel") == stock


def test_a_student_with_missing_weights_does_not_open(unet, tmp_path):
    assemble(unet, Plan(MIXED)).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    removed = weights.pop("up_blocks.3.resnets.0.conv_shortcut.weight")
    save_file(weights, path)
    with pytest.raises(AsdmError, match=r"1 missing keys.*up_blocks\.3\.resnets\.0\.conv_shortcut\.weight"):
        AssembledUNet2DConditionModel.from_pretrained(tmp_path)
    save_file({**weights, "up_blocks.3.resnets.0.conv_shortcut.weight": removed, "strange": removed.clone()}, path)
    with pytest.raises(AsdmError, match="unexpected"):
        AssembledUNet2DConditionModel.from_pretrained(tmp_path)


def test_a_student_is_no_teacher(unet):
    with pytest.raises(AsdmError, match="assembled student"):
        assemble(assemble(unet, Plan(MIXED)), Plan())


def test_half_precision_and_channels_last_students_run(unet, inputs):
    student = assemble(unet, Plan(MIXED)).to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    found = predict(student, (inputs[0].bfloat16(), inputs[1], inputs[2].bfloat16())).float()
    reference = predict(assemble(unet, Plan(MIXED)), inputs)
    assert (found - reference).norm() < 0.05 * reference.norm()


def test_students_train_with_gradient_checkpointing(unet, inputs):
    student = assemble(unet, Plan(MIXED)).train().requires_grad_(True)
    student.enable_gradient_checkpointing()
    student(*inputs).sample.square().mean().backward()
    assert all(p.grad is not None for p in student.parameters())


@pytest.fixture(autouse=True)
def _stay_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
