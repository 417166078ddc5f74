"""Seed-matched images from a pipeline, with the seconds that they took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import diffusers
import torch
from diffusers import SchedulerMixin, StableDiffusionPipeline
from PIL.Image import Image
from torch import Tensor

from asdm_compress.assembly.calibration import SamplingSettings, initial_latents
from asdm_compress.core.errors import AsdmError

# The names that users of other programs know, for diffusers' classes with the options that make the difference.
SCHEDULERS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


@dataclass(frozen=True, slots=True)
class Samples:
    """Images of one pipeline, one per prompt; `latents` (N, C, H, W) before the VAE, `seconds` per image."""

    images: list[Image]
    latents: Tensor
    seconds: float


def make_scheduler(name: str, pipeline: StableDiffusionPipeline) -> SchedulerMixin:
    """The scheduler called `name` with the noise schedule and prediction type of the pipeline's own.

    Raises AsdmError for an unknown name.
    """
    if name not in SCHEDULERS:
        raise AsdmError(f"unknown scheduler {name!r}", f"Known schedulers: {', '.join(SCHEDULERS)}.")
    class_name, options = SCHEDULERS[name]
    scheduler: SchedulerMixin = getattr(diffusers, class_name).from_config(pipeline.scheduler.config, **options)
    return scheduler


def sample(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    settings: SamplingSettings,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """One image per prompt; image i starts from seed `settings.seed + i` whatever the batch size.

    Raises AsdmError for settings that the sampler cannot take.
    """
    if settings.steps < 1:
        raise AsdmError(f"{settings.steps} sampling steps make no image", "Use at least 1.")
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_latents(pipeline, len(prompts), settings)
    latents: list[Tensor] = []
    began = time.perf_counter()
    for first in range(0, len(prompts), batch):
        rows = range(first, min(first + batch, len(prompts)))
        output = pipeline(
            [prompts[i] for i in rows],
            latents=noise[first : rows.stop],
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            height=settings.image_size,
            width=settings.image_size,
            # Samplers that add noise: each image draws its own, so that pairs stay matched.
            generator=[torch.Generator().manual_seed(settings.seed + i) for i in rows],
            output_type="latent",
        )
        latents.append(output.images)
        if progress:
            progress(rows.stop, len(prompts))
    together = torch.cat(latents)
    images = decode(pipeline, together)
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize()
    return Samples(images, together, (time.perf_counter() - began) / len(prompts))


@torch.no_grad()
def decode(pipeline: StableDiffusionPipeline, latents: Tensor, batch: int = 8) -> list[Image]:
    """Latents (N, C, H, W) to images."""
    images: list[Image] = []
    for part in torch.split(latents, batch):
        pixels = pipeline.vae.decode(part / pipeline.vae.config.scaling_factor, return_dict=False)[0]
        images += pipeline.image_processor.postprocess(pixels, output_type="pil")
    return images
