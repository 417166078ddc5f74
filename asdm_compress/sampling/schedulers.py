"""Schedulers by the names that users of other programs know."""

from __future__ import annotations

import copy
import inspect
from typing import Any, Final

import diffusers
from diffusers import SchedulerMixin, StableDiffusionPipeline

from asdm_compress.core.errors import AsdmError

# diffusers' class, with the options that make the difference.
SCHEDULERS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": False, "algorithm_type": "dpmsolver++"}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "algorithm_type": "dpmsolver++"}),
    "dpm++-sde": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": False, "algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {"use_karras_sigmas": False}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {"use_karras_sigmas": False}),
    "lms": ("LMSDiscreteScheduler", {"use_karras_sigmas": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {"use_karras_sigmas": False}),
}

ONE_CALL: Final = "dpm++"  # a sampler that calls the UNet once per step

# What a UNet was trained with, which no other model's scheduler knows.
_OF_THE_MODEL: Final = (
    "prediction_type", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "rescale_betas_zero_snr",
)  # fmt: skip


def make_scheduler(name: str, pipeline: StableDiffusionPipeline) -> SchedulerMixin:
    """The scheduler called `name` with the noise schedule and prediction type of the pipeline's own.

    DDIM and PNDM step by T // N whatever their N timesteps are: where the pipeline's own are spread from the first to
    the last of the T, theirs are spaced so that they step from one to the next (where N divides T; otherwise nearly).
    Raises AsdmError for an unknown name.
    """
    if name not in SCHEDULERS:
        raise AsdmError(f"unknown scheduler {name!r}", f"Known schedulers: {', '.join(SCHEDULERS)}.")
    class_name, options = SCHEDULERS[name]
    scheduler: SchedulerMixin = getattr(diffusers, class_name).from_config(pipeline.scheduler.config, **options)
    # Of the pipeline's own: where it is only its class's default, diffusers does not hand it on.
    spread = pipeline.scheduler.config.get("timestep_spacing") == "linspace"
    if class_name in ("DDIMScheduler", "PNDMScheduler") and spread:
        scheduler = type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")
    return scheduler


def scheduler_like(other: SchedulerMixin, own: SchedulerMixin) -> SchedulerMixin:
    """A scheduler of another's kind and settings, but with its own model's noise schedule and prediction type."""
    accepted = inspect.signature(type(other).__init__).parameters
    of_model = {key: value for key, value in own.config.items() if key in _OF_THE_MODEL and key in accepted}
    # As keywords: of a config diffusers leaves out what were defaults there, and what a pipeline has corrected of them.
    made: SchedulerMixin = type(other).from_config(other.config, **{**_corrected(other), **of_model})
    return made


def _corrected(scheduler: SchedulerMixin) -> dict[str, Any]:
    """What nobody chose, and is not its class's default any more: pipelines correct `steps_offset`, for example."""
    parameters, config = inspect.signature(type(scheduler).__init__).parameters, scheduler.config
    unchosen = [name for name in config.get("_use_default_values", ()) if name in parameters]
    return {name: config[name] for name in unchosen if config[name] != parameters[name].default}


def sample_alike(one: SchedulerMixin, other: SchedulerMixin) -> bool:
    """Whether two schedulers are of one kind with the same settings."""
    first, second = (
        {key: value for key, value in scheduler.config.items() if not key.startswith("_")} for scheduler in (one, other)
    )
    return type(one) is type(other) and first == second


def choose_scheduler(pipeline: StableDiffusionPipeline, name: str | None, *steps: int) -> str | None:
    """Give a pipeline the scheduler called `name`; without a name, one that calls the UNet once per step.

    Its own may call it more often in some of these numbers of steps, as SD 1.x's own PNDM does: then it is given
    another, and what is returned is what people are to be told of that.
    """
    if name:
        pipeline.scheduler = make_scheduler(name, pipeline)
        return None
    if all(evaluations(pipeline.scheduler, count) == count for count in steps):
        return None
    own = type(pipeline.scheduler).__name__
    pipeline.scheduler = make_scheduler(ONE_CALL, pipeline)
    return f"the model is sampled with {ONE_CALL}: its own {own} calls the UNet more than once per step"


def evaluations(scheduler: SchedulerMixin, steps: int) -> int:
    """How often the scheduler calls the UNet in `steps` steps; PNDM and Heun call it more than once per step."""
    twin = copy.deepcopy(scheduler)
    twin.set_timesteps(steps)
    return len(twin.timesteps)
