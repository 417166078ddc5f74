"""Networks beside the UNet: LoRA, ControlNet, T2I-Adapter, IP-Adapter, textual inversion."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from asdm_compress import controlnet_from, remap_controlnet, remap_ip_adapter, remap_lora
from asdm_compress.assembly.surgery import specify
from matrix.outcome import Check, Outcome, against, largest
from matrix.subjects import Subject, predict

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv_shortcut", "proj_in", "ff.net.2"]
CONDITION = (4, 8, 8, 16)
IMAGE_WIDTH = 24


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(subject: Subject) -> Outcome:
    """Oracle: what diffusers adds to the teacher's weights to fuse it, added to those that the student inherits."""
    trained = copy.deepcopy(subject.teacher.unet)
    trained.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=LORA_TARGETS))
    for i, (name, parameter) in enumerate(trained.named_parameters()):
        if "lora_" in name:
            parameter.data = 0.1 * _noise(*parameter.shape, seed=i)
    file = {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(trained).items()}
    trained.fuse_lora()
    trained.unload_lora()
    before, after = subject.teacher.unet.state_dict(), trained.state_dict()
    expected = subject.fresh()
    state = expected.state_dict()
    for key, source in specify(subject.teacher.unet, subject.plan).weight_map.items():
        state[key] = state[key] + after[source] - before[source]
    found = remap_lora(file, subject.teacher.unet, subject.plan)
    expected.load_state_dict(state)
    student = subject.pipeline(subject.fresh())
    student.load_lora_weights(dict(found.tensors))
    one, other = predict(student.unet, subject.inputs), predict(expected, subject.inputs)
    left_out = f"{len(found.left_out)} modules left out" if found.left_out else ""
    return Outcome(largest(one, other), effect=largest(one, predict(subject.unet, subject.inputs)), note=left_out)


def _trained_controlnet(controlnet: ControlNetModel) -> ControlNetModel:
    for i, (name, parameter) in enumerate(controlnet.named_parameters()):
        if "controlnet_" in name:
            parameter.data = 0.05 * _noise(*parameter.shape, seed=i)
    return controlnet.eval().requires_grad_(False)


def _controlled(unet: Any, subject: Subject, skips: Any, mid: Tensor) -> Tensor:
    extra = {"down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": mid}
    return predict(unet, subject.inputs, **extra)


@torch.no_grad()
def teachers_controlnet(subject: Subject) -> Outcome:
    """Oracle: the edited teacher with all the residuals that it has places for."""
    teacher = subject.teacher.unet
    controlnet = ControlNetModel.from_unet(teacher, conditioning_embedding_out_channels=CONDITION)
    controlnet = _trained_controlnet(controlnet)
    condition = _noise(2, 3, 128, 128, seed=1)
    reference = subject.reference()
    skips, mid = controlnet(*subject.inputs, condition, return_dict=False)
    if len(reference.down_blocks) < len(teacher.down_blocks):
        skips = skips[: _skip_count(reference)]
        mid = torch.zeros_like(skips[-1])
    remapped = remap_controlnet(controlnet, teacher, subject.plan)
    one = _controlled(subject.unet, subject, *remapped.controlnet(*subject.inputs, condition, return_dict=False))
    note = f"{len(remapped.left_out)} residuals have no taker" if remapped.left_out else ""
    effect = largest(one, predict(subject.unet, subject.inputs))
    return Outcome(against(subject, one, _controlled(reference, subject, skips, mid)), effect=effect, note=note)


def _skip_count(unet: UNet2DConditionModel) -> int:
    return 1 + sum(len(block.resnets) + len(block.downsamplers or ()) for block in unet.down_blocks)


@torch.no_grad()
def own_controlnet(subject: Subject) -> Outcome:
    """Oracle: untrained, its zero convolutions change nothing. Trained, it runs in diffusers' pipeline."""
    made = controlnet_from(subject.unet, conditioning_embedding_out_channels=CONDITION)
    condition = _noise(2, 3, 128, 128, seed=1)
    plain = predict(subject.unet, subject.inputs)
    untrained = _controlled(subject.unet, subject, *made(*subject.inputs, condition, return_dict=False))
    pipeline = subject.pipeline(subject.unet, StableDiffusionControlNetPipeline, controlnet=_trained_controlnet(made))
    extra = {"prompt": "a red circle", "image": condition[:1].sigmoid()}
    images = [pipeline(**extra, controlnet_conditioning_scale=scale, **_two_steps()).images for scale in (0.0, 1.0)]
    return Outcome(largest(untrained, plain), effect=largest(*images), note=type(made).__name__)


def _two_steps() -> dict[str, Any]:
    return {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(3), "output_type": "pt"}


def t2i_adapter(subject: Subject) -> Outcome:
    """Oracle: the edited teacher in the same pipeline with the same adapter."""
    channels = list(subject.teacher.unet.config["block_out_channels"])
    torch.manual_seed(0)
    adapter = T2IAdapter(in_channels=3, channels=channels, num_res_blocks=1, downscale_factor=8).eval()
    image = _noise(1, 3, 128, 128, seed=1).sigmoid()
    one, other, without = (
        subject.pipeline(unet, StableDiffusionAdapterPipeline, adapter=adapter)(
            # Of pictures this pipeline gives no tensors.
            "a red circle",
            image=image,
            adapter_conditioning_scale=scale,
            **{**_two_steps(), "output_type": "latent"},
        ).images
        for unet, scale in ((subject.unet, 1.0), (subject.reference(), 1.0), (subject.unet, 0.0))
    )
    return Outcome(against(subject, one, other), effect=largest(one, without))


def ip_adapter(subject: Subject) -> Outcome:
    """Oracle: diffusers puts the adapter on the teacher, whose modules are then edited."""
    teacher = subject.teacher.unet
    text = teacher.config["cross_attention_dim"]
    attentions = [name.removesuffix(".processor") for name in teacher.attn_processors]
    keys = {
        f"{number}.{part}.weight": 0.3 * _noise(teacher.get_submodule(path).to_k.out_features, text, seed=number)
        for number, path in enumerate(attentions)
        for part in ("to_k_ip", "to_v_ip")
        if path.endswith(".attn2")
    }
    image = {
        "proj.weight": _noise(4 * text, IMAGE_WIDTH),
        "proj.bias": torch.zeros(4 * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    adapter = {"image_proj": image, "ip_adapter": keys}
    found = remap_ip_adapter(adapter, teacher, subject.plan)
    # Where a narrowed attention gets nothing of the adapter, neither does the oracle's.
    mute = {attentions.index(path) for path in found.left_out}
    muted = {name: torch.zeros_like(t) if int(name.split(".")[0]) in mute else t for name, t in keys.items()}
    equipped = subject.pipeline(copy.deepcopy(teacher))
    equipped.load_ip_adapter({"image_proj": image, "ip_adapter": muted}, None, None, image_encoder_folder=None)
    student = subject.pipeline(subject.fresh())
    student.load_ip_adapter(found.tensors, None, None, image_encoder_folder=None)
    extra = {"ip_adapter_image_embeds": [_noise(2, 1, IMAGE_WIDTH, seed=4)], **_two_steps()}
    one = student("a red circle", **extra).images
    student.set_ip_adapter_scale(0.0)
    without = student("a red circle", **{**extra, **_two_steps()}).images
    other = subject.pipeline(subject.reference(equipped.unet))("a red circle", **{**extra, **_two_steps()}).images
    note = f"{len(found.left_out)} attentions without it" if found.left_out else ""
    return Outcome(against(subject, one, other), effect=largest(one, without), note=note)


def textual_inversion(subject: Subject) -> Outcome:
    """Oracle: a new word with the embedding of an old one makes the old one's picture."""
    parts = {name: copy.deepcopy(subject.teacher.components[name]) for name in ("tokenizer", "text_encoder")}
    pipeline = subject.pipeline(subject.unet, **parts)
    number = pipeline.tokenizer.encode("circle", add_special_tokens=False)[0]
    embedding = pipeline.text_encoder.get_input_embeddings().weight[number].detach().clone()
    pipeline.load_textual_inversion({"<round>": embedding[None]}, token="<round>")
    one, other, without = (pipeline(f"a red {word}", **_two_steps()).images for word in ("<round>", "circle", "square"))
    return Outcome(largest(one, other), effect=largest(one, without))


CHECKS = (
    Check("LoRA (peft) of the teacher", lora),
    Check("ControlNet of the teacher", teachers_controlnet),
    Check("ControlNet made from it", own_controlnet),
    Check("T2I-Adapter of the teacher", t2i_adapter),
    Check("IP-Adapter of the teacher", ip_adapter),
    Check("textual inversion", textual_inversion),
)
