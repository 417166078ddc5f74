"""How a pipeline samples, and the noise and text that a run starts from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from asdm_compress.core.defaults import GUIDANCE, STEPS
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.families import latent_size_of

ENCODED_AT_ONCE: Final = 256  # prompts, however many there are


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """Steps of the pipeline's own scheduler, guidance scale, the seed of the first image, pixels per side.

    Raises AsdmError for a guidance scale that is no finite number.
    """

    steps: int = STEPS
    guidance: float = GUIDANCE
    seed: int = 0
    image_size: int | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance):
            raise AsdmError(f"the guidance scale {self.guidance} is no finite number", "For example 7.5.")


def check_text_to_image(pipeline: StableDiffusionPipeline) -> None:
    """Raise AsdmError for a UNet that wants more than a noisy latent, such as an inpainting one."""
    config = pipeline.unet.config
    if config["in_channels"] != config["out_channels"]:
        raise AsdmError(
            f"this UNet takes {config['in_channels']} channels and gives {config['out_channels']}: it is no plain "
            "text-to-image model, and this command samples from text alone",
            "`profile` works on it, and `apply` where nothing is fitted.",
        )


def check_not_offloaded(pipeline: StableDiffusionPipeline) -> None:
    """Raise AsdmError for weights that are elsewhere until the UNet is called: its parts are run by themselves here."""
    hooks = [getattr(pipeline.unet, name, None) for name in ("_hf_hook", "_diffusers_hook")]
    if any(hook is not None for hook in hooks):
        raise AsdmError(
            "the pipeline's UNet is offloaded, and its parts cannot be measured one by one",
            "Measure before enable_model_cpu_offload and its like; what is found holds with them.",
        )


def check_size(pipeline: StableDiffusionPipeline, settings: SamplingSettings) -> None:
    """Raise AsdmError for an image size that the pipeline's VAE and UNet do not divide."""
    step = 2 ** (len(pipeline.unet.down_blocks) - 1) * pipeline.vae_scale_factor
    size = settings.image_size
    if size is not None and (size <= 0 or size % step):
        raise AsdmError(f"the image size {size} is no multiple of {step}", f"For example {4 * step}.")


def encode(pipeline: StableDiffusionPipeline, prompts: Sequence[str], guidance: float) -> Tensor:
    """Text embeddings (N, branches, tokens, width), the empty prompt first where there is guidance."""
    guided, found = guidance > 1, []
    for first in range(0, len(prompts), ENCODED_AT_ONCE):
        some = list(prompts[first : first + ENCODED_AT_ONCE])
        with torch.no_grad():
            conditional, unconditional = pipeline.encode_prompt(some, pipeline.device, 1, guided)
        found.append(torch.stack([unconditional, conditional] if guided else [conditional], dim=1))
    return torch.cat(found)


def latent_side(pipeline: StableDiffusionPipeline, settings: SamplingSettings) -> int:
    """Height and width of the latents, in elements."""
    if settings.image_size:
        return int(settings.image_size // pipeline.vae_scale_factor)
    return latent_size_of(pipeline.unet)


def initial_latents(pipeline: StableDiffusionPipeline, count: int, settings: SamplingSettings) -> Tensor:
    """Unit noise (count, C, H, W); image i has its own seed, so that it does not depend on the batch it is in."""
    return _drawn(pipeline, count, settings)[0].to(pipeline.device, pipeline.unet.dtype)


def step_generators(pipeline: StableDiffusionPipeline, count: int, settings: SamplingSettings) -> list[torch.Generator]:
    """For samplers that add noise: one generator per image, so that pairs stay matched.

    Each has drawn its initial latent already, as in diffusers' own calls: begun anew, it would give a sampler the very
    noise that the run starts from for its first step.
    """
    return _drawn(pipeline, count, settings)[1]


def _drawn(
    pipeline: StableDiffusionPipeline, count: int, settings: SamplingSettings
) -> tuple[Tensor, list[torch.Generator]]:
    """Unit noise in fp32 and the generators behind it, on the CPU so that every device draws the same numbers."""
    size = latent_side(pipeline, settings)
    shape = (pipeline.unet.config["in_channels"], size, size)
    generators = [torch.Generator().manual_seed(settings.seed + i) for i in range(count)]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]), generators
