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

    DDIM steps by T // N whatever its N timesteps are: where the pipeline's own are spread from the first to the last of
    the T, DDIM's are spaced so that it steps from one to the next. Raises AsdmError for an unknown name.
    """
    if name not in SCHEDULERS:
        raise AsdmError(f"unknown scheduler {name!r}", f"Known schedulers: {', '.join(SCHEDULERS)}.")
    class_name, options = SCHEDULERS[name]
    scheduler: SchedulerMixin = getattr(diffusers, class_name).from_config(pipeline.scheduler.config, **options)
    if class_name == "DDIMScheduler" and scheduler.config.timestep_spacing == "linspace":
        scheduler = type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")
    return scheduler


def evaluations(scheduler: SchedulerMixin, steps: int) -> int:
    """How often the scheduler calls the UNet in `steps` steps; PNDM and Heun call it more than once per step."""
    twin = copy.deepcopy(scheduler)
    twin.set_timesteps(steps)
    return len(twin.timesteps)
