"""Seed-matched images from a pipeline, with the seconds that they took."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from diffusers import StableDiffusionPipeline
from PIL.Image import Image
from torch import Tensor

from asdm_compress.core.errors import AsdmError
from asdm_compress.sampling.settings import (
    SamplingSettings,
    check_text_to_image,
    encode,
    initial_latents,
    step_generators,
)

# At a time: the last blocks of Stable Diffusion's VAE hold about 4 KiB for every pixel in fp32, several times over.
DECODED_PIXELS: Final = 2 * 512**2


@dataclass(frozen=True, slots=True)
class Samples:
    """Images of one pipeline, one per prompt; `latents` (N, C, H, W) before the VAE, `seconds` per image."""

    images: list[Image]
    latents: Tensor
    seconds: float


def sample(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    settings: SamplingSettings,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
    negative: str | None = None,
) -> Samples:
    """One image per prompt; image i starts from seed `settings.seed + i` whatever the batch size.

    Guidance leads away from `negative`, or from the empty prompt. The clock starts after one pass that warms the
    machine up. Raises AsdmError for settings that the sampler cannot take.
    """
    if settings.steps < 1:
        raise AsdmError(f"{settings.steps} sampling steps make no image", "Use at least 1.")
    check_text_to_image(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_latents(pipeline, len(prompts), settings)
    _warm_up(pipeline, noise[:batch], prompts[:batch], settings.guidance)
    latents: list[Tensor] = []
    synchronise(pipeline.device)
    began = time.perf_counter()
    for first in range(0, len(prompts), batch):
        rows = range(first, min(first + batch, len(prompts)))
        output = pipeline(
            [prompts[i] for i in rows],
            negative_prompt=None if negative is None else [negative] * len(rows),
            latents=noise[first : rows.stop],
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            height=settings.image_size,
            width=settings.image_size,
            generator=step_generators(pipeline, len(rows), replace(settings, seed=settings.seed + first)),
            output_type="latent",
        )
        latents.append(output.images)
        if progress:
            progress(rows.stop, len(prompts))
    together = torch.cat(latents)
    check_latents(together, pipeline.unet.dtype)
    images = decode(pipeline, together, batch)
    synchronise(pipeline.device)
    return Samples(images, together, (time.perf_counter() - began) / len(prompts))


def check_latents(latents: Tensor, dtype: torch.dtype) -> None:
    """Raise AsdmError for latents that are no numbers: pictures of them are black, and all black ones are alike."""
    if not latents.isfinite().all():
        precision = str(dtype).removeprefix("torch.")
        raise AsdmError(f"the latents are no numbers: the UNet overflows in {precision}", "Use --dtype bf16 or fp32.")


@torch.no_grad()
def decode(pipeline: StableDiffusionPipeline, latents: Tensor, batch: int = 8) -> list[Image]:
    """Latents (N, C, H, W) to images, so many at once as there is memory for on small machines.

    Raises AsdmError where the VAE has no numbers for latents that are some.
    """
    images: list[Image] = []
    pixels_each = latents[0, 0].numel() * pipeline.vae_scale_factor**2 if len(latents) else 1
    for part in torch.split(latents, min(batch, max(1, DECODED_PIXELS // pixels_each))):
        pixels = pipeline.vae.decode(part / pipeline.vae.config.scaling_factor, return_dict=False)[0]
        if part.isfinite().all() and not pixels.isfinite().all():
            precision = str(pixels.dtype).removeprefix("torch.")
            raise AsdmError(f"the VAE overflows in {precision}: pictures would be black", "Use --dtype bf16 or fp32.")
        images += pipeline.image_processor.postprocess(pixels, output_type="pil")
    return images


@torch.no_grad()
def _warm_up(pipeline: StableDiffusionPipeline, noise: Tensor, prompts: Sequence[str], guidance: float) -> None:
    texts = encode(pipeline, prompts, guidance)
    timestep = torch.tensor(500, device=noise.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a switched UNet says of calls that stand alone what it does for them
        # In the order of diffusers' pipelines, the branches one behind the other.
        branches = texts.shape[1]
        rows = noise.repeat(branches, 1, 1, 1), timestep, texts.transpose(0, 1).flatten(0, 1)
        pipeline.unet(*rows, return_dict=False)
    decode(pipeline, noise)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
