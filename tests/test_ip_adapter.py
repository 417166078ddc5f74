"""A teacher's IP-Adapter on students: the same as cutting the teacher with the adapter in it."""

from __future__ import annotations

import copy

import pytest
import torch

from asdm_compress.assembly.ip_adapter import remap_ip_adapter
from asdm_compress.assembly.plan import Plan, edited
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import find_recipe, load_recipe
from asdm_compress.inheritance.validity import mark_of
from asdm_compress.models.loading import with_parts
from asdm_compress.models.slots import IdentityTransformer
from asdm_compress.workflows.calibrate import calibrate

IMAGE_WIDTH = 24
NARROWED = "up_blocks.2.attentions.0.transformer_blocks.0.attn2"
PLANS = {
    "tiny": load_recipe(find_recipe("bk-sdm-tiny-v1")).as_edits(),
    "no mid block": {"mid_block": "drop"},
    "cross-attentions": {
        "down_blocks.0.attentions.1.transformer_blocks.0.attn2": "drop",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1": "drop",
        "up_blocks.1.attentions.1": "drop",
    },
    "narrowed": {NARROWED: "narrow0.5", "down_blocks.1.attentions.0": "drop"},
}


@pytest.fixture(scope="module")
def adapter(unet):
    """What the file of an IP-Adapter for the teacher holds, with random weights."""
    generator = torch.Generator().manual_seed(0)
    text = unet.config["cross_attention_dim"]
    attentions = [name.removesuffix(".processor") for name in unet.attn_processors]
    keys = {}
    for number, path in enumerate(attentions):
        if path.endswith("attn2"):
            width = unet.get_submodule(path).to_k.out_features
            for part in ("to_k_ip", "to_v_ip"):
                keys[f"{number}.{part}.weight"] = 0.3 * torch.randn(width, text, generator=generator)
    image = {
        "proj.weight": torch.randn(4 * text, IMAGE_WIDTH, generator=generator),
        "proj.bias": torch.zeros(4 * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    return {"image_proj": image, "ip_adapter": keys}


@pytest.fixture(scope="module")
def seen():
    return {"image_embeds": [torch.randn(2, 1, IMAGE_WIDTH, generator=torch.Generator().manual_seed(4))]}


def test_schedules_know_a_model_with_an_adapter_again(unet, adapter):
    assert mark_of(equipped(unet, adapter)) == mark_of(unet)


def test_nothing_is_calibrated_from_text_alone_with_an_adapter_loaded(pipeline, adapter):
    with_image = with_parts(pipeline, unet=equipped(pipeline.unet, adapter))
    with pytest.raises(AsdmError, match="IP-Adapter is loaded"):
        calibrate(with_image, "latency=0.5x")


def equipped(unet, adapter):
    unet = copy.deepcopy(unet)
    unet._load_ip_adapter_weights([adapter])
    return unet


@torch.no_grad()
@pytest.mark.parametrize("name", list(PLANS))
def test_a_renumbered_adapter_is_the_cut_of_the_equipped_teacher(unet, adapter, inputs, seen, name):
    """Oracle: diffusers puts the adapter on the teacher, and its modules are then taken out."""
    plan = Plan(PLANS[name])
    if name == "narrowed":  # where it is narrowed it looks at the text alone
        narrowed = assemble(unet, Plan({NARROWED: "narrow0.5"}))
        number = list(unet.attn_processors).index(f"{NARROWED}.processor")
        muted = {k: torch.zeros_like(v) if k.startswith(f"{number}.") else v for k, v in adapter["ip_adapter"].items()}
        reference = equipped(narrowed, {**adapter, "ip_adapter": muted})
        reference.down_blocks[1].attentions[0] = IdentityTransformer()
    else:
        reference = edited(equipped(unet, adapter), plan)
    found = remap_ip_adapter(adapter, unet, plan)
    student = equipped(assemble(unet, plan), found.tensors)
    one, other = (m(*inputs, added_cond_kwargs=seen, return_dict=False)[0] for m in (reference, student))
    assert torch.allclose(one, other, atol=1e-5)
    plain = assemble(unet, plan)(*inputs, return_dict=False)[0]
    assert not torch.allclose(other, plain, atol=1e-3)


def test_what_is_left_out_is_named(unet, adapter):
    found = remap_ip_adapter(adapter, unet, Plan(PLANS["cross-attentions"]))
    assert set(found.left_out) == {
        "down_blocks.0.attentions.1.transformer_blocks.0.attn2",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn2",
    }
    narrowed = remap_ip_adapter(adapter, unet, Plan({NARROWED: "narrow0.5"})).left_out
    assert narrowed == {NARROWED: "the student has this attention narrowed"}
    assert remap_ip_adapter(adapter, unet, Plan({"up_blocks.0.resnets.1": "drop"})).left_out == {}


def test_a_face_adapters_loras_are_renumbered_too(unet, adapter):
    """They are numbered by processor, self-attentions without image keys among them."""
    plan = Plan({"down_blocks.0.attentions.0.transformer_blocks.0.attn2": "drop"})
    numbers = list(unet.attn_processors)
    self_attention = numbers.index("down_blocks.0.attentions.1.transformer_blocks.0.attn1.processor")
    loras = {f"{self_attention}.to_k_lora.down.weight": torch.ones(2, 32)}
    found = remap_ip_adapter({**adapter, "ip_adapter": {**adapter["ip_adapter"], **loras}}, unet, plan)
    student = list(assemble(unet, plan).attn_processors)
    number = student.index("down_blocks.0.attentions.1.transformer_blocks.0.attn1.processor")
    assert f"{number}.to_k_lora.down.weight" in found.tensors["ip_adapter"]
    assert number == self_attention - 1


def test_other_files_are_refused(unet, adapter):
    with pytest.raises(AsdmError, match="no IP-Adapter"):
        remap_ip_adapter({"image_proj": {}}, unet, Plan())
    with pytest.raises(AsdmError, match="is no tensor of an IP-Adapter"):
        remap_ip_adapter({"image_proj": {}, "ip_adapter": {"strange": torch.ones(1)}}, unet, Plan())
    fewer = dict(list(adapter["ip_adapter"].items())[2:])
    with pytest.raises(AsdmError, match="15 cross-attentions, the teacher has 16"):
        remap_ip_adapter({"image_proj": {}, "ip_adapter": fewer}, unet, Plan())
