"""The names that the original Stable Diffusion code gives to tensors (the LDM layout of single-file checkpoints).

Programs such as A1111, ComfyUI and stable-diffusion.cpp read full UNets in it, ComfyUI also cut ones (see `programs`).
diffusers only converts from it; here is the other direction, worked out from the modules that a UNet really has, so
that lighter ones get their blocks renumbered. stable-diffusion.cpp reads BK-SDM-Tiny's UNet under names with gaps
instead, where every level begins at the number that it has in the full UNet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from asdm_compress.core.errors import AsdmError
from asdm_compress.models.assembled_unet import AssembledUNet2DConditionModel
from asdm_compress.models.sites import modules_of
from asdm_compress.models.transformers_4 import with_text_model

_FULL_LEVEL: Final = 3  # the numbers that a level of the full UNet takes, on either side

UNET_PREFIX: Final = "model.diffusion_model."
VAE_PREFIX: Final = "first_stage_model."
CLIP_PREFIX: Final = "cond_stage_model.transformer."
OPEN_CLIP_PREFIX: Final = "cond_stage_model.model."
OPEN_CLIP_WIDTH: Final = 1024  # of the text encoder of Stable Diffusion 2.x

_RESNET: Final = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS: Final = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION: Final = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_LAYER: Final = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_to_ldm(unet: UNet2DConditionModel, with_gaps: bool = False) -> dict[str, Tensor]:
    """All tensors of a UNet under the names of the LDM layout, contiguous; `with_gaps` numbers as the full UNet does.

    Raises AsdmError for a UNet that this layout has no names for: one with slots.
    """
    if isinstance(unet, AssembledUNet2DConditionModel) and unet.config.get("edits"):
        edits = unet.config["edits"]
        raise AsdmError(
            f"the single-file layout has no names for {len(edits)} edits of this UNet, the first at "
            f"{next(iter(edits))}",
            "It can hold students that plain diffusers opens: whole layers, levels and mid blocks taken out.",
        )
    moved = {**_UNET_ENDS, **dict(_unet_modules(unet, with_gaps))}
    found = {}
    for key, tensor in unet.state_dict().items():
        parts = key.split(".")
        # The longest known module that the tensor is in.
        for end in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:end])
            if module in moved:
                found[UNET_PREFIX + ".".join([moved[module], *parts[end:]])] = tensor.contiguous()
                break
        else:
            raise AsdmError(f"the single-file layout has no name for {key}")
    return found


def _unet_modules(unet: UNet2DConditionModel, with_gaps: bool) -> Iterator[tuple[str, str]]:
    """Module paths of the blocks, and their names in the LDM layout."""
    number = 1
    for i, block in enumerate(unet.down_blocks):
        number = _FULL_LEVEL * i + 1 if with_gaps else number
        attentions = modules_of(block, "attentions")
        for j in range(len(modules_of(block, "resnets"))):
            yield from _resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0")
            if j < len(attentions):
                yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{number}.1"
            number += 1
        if modules_of(block, "downsamplers"):
            number = _FULL_LEVEL * (i + 1) if with_gaps else number
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    if unet.mid_block is not None:
        yield from _mid_modules(unet.mid_block)
    number = 0
    for i, block in enumerate(unet.up_blocks):
        number = _FULL_LEVEL * i if with_gaps else number
        attentions, resnets = modules_of(block, "attentions"), modules_of(block, "resnets")
        for j in range(len(resnets)):
            yield from _resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{number}.0")
            if j < len(attentions):
                yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{number}.1"
            number += 1
        if modules_of(block, "upsamplers"):
            last, place = number - 1, 2 if attentions else 1
            if with_gaps:  # where the full UNet has it, whose deepest level has no transformers
                last, place = _FULL_LEVEL * (i + 1) - 1, 2 if i else 1
            yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{last}.{place}.conv"


def _mid_modules(mid: nn.Module) -> Iterator[tuple[str, str]]:
    place = 0
    attentions = modules_of(mid, "attentions")
    for j in range(len(modules_of(mid, "resnets"))):
        if j and j <= len(attentions) and attentions[j - 1] is not None:
            yield f"mid_block.attentions.{j - 1}", f"middle_block.{place}"
            place += 1
        yield from _resnet(f"mid_block.resnets.{j}", f"middle_block.{place}")
        place += 1


def _resnet(path: str, name: str) -> Iterator[tuple[str, str]]:
    for ours, theirs in _RESNET.items():
        yield f"{path}.{ours}", f"{name}.{theirs}"


def vae_to_ldm(vae: AutoencoderKL) -> dict[str, Tensor]:
    """All tensors of a VAE under the names of the LDM layout, contiguous; raises AsdmError for one of another kind."""
    if not isinstance(vae, AutoencoderKL):
        raise AsdmError(
            f"a {type(vae).__name__} has no names in a single file", "Export the pipeline with Stable Diffusion's own."
        )
    moved: dict[str, str] = {}
    levels = len(vae.decoder.up_blocks)
    sides = (("encoder", "down", "down_blocks", "downsample"), ("decoder", "up", "up_blocks", "upsample"))
    for side, direction, blocks, sampler in sides:
        for i, block in enumerate(getattr(getattr(vae, side), blocks)):
            level = i if side == "encoder" else levels - 1 - i
            for j in range(len(block.resnets)):
                moved |= _vae_resnet(f"{side}.{blocks}.{i}.resnets.{j}", f"{side}.{direction}.{level}.block.{j}")
            moved[f"{side}.{blocks}.{i}.{sampler}rs.0.conv"] = f"{side}.{direction}.{level}.{sampler}.conv"
        for j in range(2):
            moved |= _vae_resnet(f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}")
        for ours, theirs in _VAE_ATTENTION.items():
            moved[f"{side}.mid_block.attentions.0.{ours}"] = f"{side}.mid.attn_1.{theirs}"
        moved[f"{side}.conv_norm_out"] = f"{side}.norm_out"
    found = {}
    for key, tensor in vae.state_dict().items():
        module, _, name = key.rpartition(".")
        here = tensor
        if ".attentions." in key and tensor.ndim == 2:  # there, these are 1 x 1 convolutions
            here = tensor[:, :, None, None]
        found[f"{VAE_PREFIX}{moved.get(module, module)}.{name}"] = here.contiguous()
    return found


def _vae_resnet(path: str, name: str) -> dict[str, str]:
    names = {part: part for part in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
    return {f"{path}.{ours}": f"{name}.{theirs}" for ours, theirs in names.items()}


def text_encoder_to_ldm(encoder: nn.Module) -> dict[str, Tensor]:
    """All tensors of a CLIP text encoder under the names of the LDM layout, contiguous.

    Stable Diffusion 1.x keeps transformers' own names; 2.x has OpenCLIP's, with the three input projections in one.
    """
    weights = {with_text_model(key): tensor for key, tensor in encoder.state_dict().items()}
    width = weights["text_model.final_layer_norm.weight"].shape[0]
    if width != OPEN_CLIP_WIDTH:
        return {CLIP_PREFIX + key: tensor.contiguous() for key, tensor in weights.items()}
    return {OPEN_CLIP_PREFIX + key: tensor.contiguous() for key, tensor in _open_clip(weights).items()}


def _open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    found = {name: weights[key] for key, name in plain.items()}
    head = "text_model.encoder.layers."
    layers = sorted({int(key.removeprefix(head).split(".")[0]) for key in weights if key.startswith(head)})
    for i in layers:
        ours, theirs = f"{head}{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            parts = [weights[f"{ours}.self_attn.{p}_proj.{kind}"] for p in ("q", "k", "v")]
            found[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(parts)
            for part, name in _OPEN_CLIP_LAYER.items():
                found[f"{theirs}.{name}.{kind}"] = weights[f"{ours}.{part}.{kind}"]
    return found
