"""In which precision errors are measured: most are far smaller than what half precision rounds away."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import StableDiffusionPipeline

from asdm_compress.models.loading import with_parts


def measured_in(pipeline: StableDiffusionPipeline, dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
    """The pipeline with a copy of its UNet in the precision that errors are measured in, or itself if it has that.

    By default that is fp32 on a GPU. On a CPU, where fp32 takes several times as long as bf16, it is the UNet's own.
    """
    own = pipeline.unet.dtype
    wanted = dtype or (own if pipeline.device.type == "cpu" else torch.float32)
    return pipeline if wanted == own else with_parts(pipeline, unet=copy.deepcopy(pipeline.unet).to(wanted))


@contextmanager
def true_fp32() -> Iterator[None]:
    """Convolutions of fp32 in fp32: otherwise torch lets cuDNN take TF32, which rounds as fp16 does."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
