"""What is put on a switched UNet reaches its members: LoRA, ControlNet, FreeU."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from switched import SMALL, STEPS, TINY, call, held, pipe_of

from asdm_compress.assembly.lora import remap_lora
from asdm_compress.assembly.plan import Plan
from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.carrying import CarriedOver


@pytest.fixture(scope="module")
def lora(pipeline, tmp_path_factory):
    unet = copy.deepcopy(pipeline.unet)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "conv1", "proj_out", "ff.net.2"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("lora")
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    return folder / "pytorch_lora_weights.safetensors"


def test_a_lora_is_put_on_every_member_that_has_the_layer(pipeline, unet, members, switch, lora, tmp_path):
    from safetensors.torch import load_file

    plans = {"teacher": {}, "small": SMALL, "tiny": TINY}
    for name in members:
        switched = copy.deepcopy(switch(f"explicit:{name}*{STEPS}"))
        pipe = pipe_of(pipeline, switched)
        before = call(pipe)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CarriedOver)
            pipe.load_lora_weights(lora)
        alone = pipe_of(pipeline, copy.deepcopy(members[name]))
        file = tmp_path / f"{name}.safetensors"
        save_file(dict(remap_lora(load_file(lora), unet, Plan(plans[name])).tensors), file)
        alone.load_lora_weights(file)
        for more in ({}, {"cross_attention_kwargs": {"scale": 0.5}}):
            with_lora = call(pipe, **more)
            assert torch.equal(with_lora, call(alone, **more))
            assert not torch.equal(with_lora, before)
        pipe.fuse_lora()
        alone.fuse_lora()
        assert torch.equal(call(pipe), call(alone))
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        assert torch.allclose(call(pipe), before, atol=1e-3)
        assert held(switched) == held(switch("small-first:0"))


def test_layers_that_a_lora_does_not_fit_are_told(pipeline, switch, lora):
    pipe = pipe_of(pipeline, copy.deepcopy(switch("small-first:2")))
    with pytest.warns(CarriedOver, match="does not fit"):
        pipe.load_lora_weights(lora)


def test_a_controlnets_residuals_reach_the_members(pipeline, unet, members, switch):
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 16))
    for name, parameter in controlnet.named_parameters():
        if "controlnet_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    pipe = pipe_of(pipeline, switch("explicit:teacher*4"), StableDiffusionControlNetPipeline, controlnet=controlnet)
    alone = pipe_of(pipeline, unet, StableDiffusionControlNetPipeline, controlnet=controlnet)
    found = call(pipe, image=image)
    assert torch.equal(found, call(alone, image=image))
    assert not torch.equal(found, call(pipe_of(pipeline, unet)))
    # One whose encoder lacks a level takes no residuals of the whole one, and says so.
    pipe = pipe_of(pipeline, switch("small-first:1"), StableDiffusionControlNetPipeline, controlnet=controlnet)
    with pytest.raises(AsdmError, match="residuals were given for"):
        call(pipe, image=image)


def test_freeu_is_every_members(pipeline, students, switch):
    switched = copy.deepcopy(switch("small-first:4"))
    alone = copy.deepcopy(students["tiny"])
    for unet in (switched, alone):
        unet.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)
    assert torch.equal(call(pipe_of(pipeline, switched)), call(pipe_of(pipeline, alone)))
    switched.disable_freeu()
    assert torch.equal(call(pipe_of(pipeline, switched)), call(pipe_of(pipeline, students["tiny"])))
