"""Schedulers by the names that users of other programs know."""

from __future__ import annotations

import copy
from typing import Any, Final

import diffusers
from diffusers import SchedulerMixin, StableDiffusionPipeline

from asdm_compress.core.errors import AsdmError

# diffusers' class, with the options that make the difference.
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


def make_scheduler(name: str, pipeline: StableDiffusionPipeline) -> SchedulerMixin:
    """The scheduler called `name` with the noise schedule and prediction type of the pipeline's own.

    Raises AsdmError for an unknown name.
    """
    if name not in SCHEDULERS:
        raise AsdmError(f"unknown scheduler {name!r}", f"Known schedulers: {', '.join(SCHEDULERS)}.")
    class_name, options = SCHEDULERS[name]
    scheduler: SchedulerMixin = getattr(diffusers, class_name).from_config(pipeline.scheduler.config, **options)
    return scheduler


def evaluations(scheduler: SchedulerMixin, steps: int) -> int:
    """How often the scheduler calls the UNet in `steps` steps; PNDM and Heun call it more than once per step."""
    twin = copy.deepcopy(scheduler)
    twin.set_timesteps(steps)
    return len(twin.timesteps)
