"""Facts about the Stable Diffusion families, and UNets of full size with random weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from asdm_compress.core.errors import AsdmError
from asdm_compress.models.quiet import quiet_libraries

_SD_BLOCKS: Final = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}


_SD2_BLOCKS: Final = {
    **_SD_BLOCKS,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture: its UNet's configuration and its native image size in pixels."""

    name: str
    unet_config: Mapping[str, Any]
    image_size: int


MINI_LATENTS: Final = 16  # the side of the bundled model's

FAMILIES: Final = {
    family.name: family
    for family in (
        # Stable Diffusion 1.x, 2.x base, and 2.x at 768 pixels.
        Family("sd15", {**_SD_BLOCKS, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}, 512),
        Family("sd21-base", {**_SD2_BLOCKS, "sample_size": 64}, 512),
        Family("sd21", {**_SD2_BLOCKS, "sample_size": 96}, 768),
    )
}

_SUPPORTED_BLOCKS: Final[Mapping[str, Collection[str | None]]] = {
    "down_block_types": {"CrossAttnDownBlock2D", "DownBlock2D"},
    "up_block_types": {"CrossAttnUpBlock2D", "UpBlock2D"},
    "mid_block_type": {"UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None},
}


# Switches of diffusers' class that no Stable Diffusion 1.x or 2.x UNet sets, and that walk and slots do not know.
_USUAL: Final[Mapping[str, Any]] = {
    "resnet_time_scale_shift": "default",
    "center_input_sample": False,
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "attention_type": "default",
    "time_cond_proj_dim": None,
    "resnet_skip_time_act": False,
}


def check_supported(unet: UNet2DConditionModel) -> None:
    """Raise AsdmError, naming what differs, unless the UNet is of the Stable Diffusion 1.x/2.x kind."""
    config = unet.config
    strange: list[str] = []
    for key, allowed in _SUPPORTED_BLOCKS.items():
        value = config.get(key)
        names = value if isinstance(value, (list, tuple)) else [value]
        strange += [f"{key} {name}" for name in names if name not in allowed]
    if config.get("addition_embed_type") is not None:
        strange.append(f"addition_embed_type {config['addition_embed_type']} (an SDXL or Kandinsky UNet)")
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        strange.append("class embeddings")
    if config.get("encoder_hid_dim_type") is not None:
        strange.append(f"encoder_hid_dim_type {config['encoder_hid_dim_type']}")
    for key, usual in _USUAL.items():
        value = config.get(key, usual)
        if (any(value) if isinstance(value, (list, tuple)) else value) != usual:
            strange.append(f"{key} {value}")
    if strange:
        raise AsdmError(
            f"this UNet is of another family: {'; '.join(strange)}",
            "UNets of Stable Diffusion 1.x and 2.x and their variants are supported.",
        )


def architecture(unet: UNet2DConditionModel) -> dict[str, Any]:
    """The facts that a plan depends on: levels, depths, widths and projections, not sizes of inputs."""
    config = unet.config
    keys = (
        "down_block_types", "mid_block_type", "up_block_types", "block_out_channels", "layers_per_block",
        "transformer_layers_per_block", "in_channels", "out_channels", "cross_attention_dim", "attention_head_dim",
        "use_linear_projection", "norm_num_groups",
    )  # fmt: skip
    facts = {key: config.get(key) for key in keys}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()}


def usual_latent_size(model: str, facts: Mapping[str, Any]) -> int:
    """The side of the latents that a model is for, by its name, or else by what its `architecture` has in common.

    Of several families of one architecture the first; the bundled model's where there is none.
    """
    alike = (
        family
        for family in FAMILIES.values()
        if list(facts.get("block_out_channels") or ()) == list(family.unet_config["block_out_channels"])
        and facts.get("cross_attention_dim") == family.unet_config["cross_attention_dim"]
    )
    family = FAMILIES.get(model) or next(alike, None)
    return int(family.unet_config["sample_size"]) if family else MINI_LATENTS


def latent_size_of(unet: UNet2DConditionModel) -> int:
    """Height and width, in elements, of the latents that a UNet was made for; of two sides the first."""
    size = unet.config["sample_size"]
    return int(size if isinstance(size, int) else size[0])


def random_unet(family: Family, dtype: torch.dtype, device: torch.device, seed: int = 0) -> UNet2DConditionModel:
    """A full-size UNet with random weights, for costs only: its pictures and its damages mean nothing."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**family.unet_config)
    with quiet_libraries():
        unet = unet.to(dtype=dtype).to_empty(device=device)
    generator = torch.Generator().manual_seed(seed)
    # One million numbers, repeated: filling 860 M weights with fresh ones takes longer than profiling them.
    pool = torch.randn(1_000_003, generator=generator).to(device=device, dtype=dtype)
    for module in unet.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                parameter.data.fill_(1.0 if name == "weight" else 0.0)
            elif parameter.ndim == 1:
                parameter.data.zero_()
            else:
                _fill(parameter.data, pool, 1 / math.sqrt(parameter[0].numel()))
    return unet.eval().requires_grad_(False)


def _fill(target: torch.Tensor, pool: torch.Tensor, scale: float) -> None:
    flat = target.view(-1)
    for start in range(0, flat.numel(), pool.numel()):
        part = flat[start : start + pool.numel()]
        torch.mul(pool[: part.numel()], scale, out=part)
