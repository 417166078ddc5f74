"""A batch of sampling runs that can be stopped between steps, forked, and disturbed."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from asdm_compress.core.errors import AsdmError
from asdm_compress.sampling.schedulers import evaluations
from asdm_compress.sampling.settings import SamplingSettings, initial_latents, step_generators


@dataclass(frozen=True, slots=True)
class GuidedInputs:
    """What a guided prediction takes: samples (N, C, H, W), timesteps (N,), texts (N, branches, tokens, width)."""

    samples: Tensor
    timesteps: Tensor
    texts: Tensor
    guidance: float

    def __len__(self) -> int:
        return len(self.samples)

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The UNet's inputs, one row per branch, R = N · branches: (R, C, H, W), (R,), (R, tokens, width)."""
        branches = self.texts.shape[1]
        return (
            self.samples.repeat_interleave(branches, 0),
            self.timesteps.repeat_interleave(branches, 0),
            self.texts.flatten(0, 1),
        )

    def guided(self, predictions: Tensor) -> Tensor:
        """The prediction that the sampler uses, (N, C, H, W), from one row per branch (Ho & Salimans, 2207.12598)."""
        if self.texts.shape[1] == 1:
            return predictions
        unconditional, conditional = predictions[0::2], predictions[1::2]
        return unconditional + self.guidance * (conditional - unconditional)


class Predictor(Protocol):
    """What a run asks for predictions: a UNet, or what stands in for one; rows as of `GuidedInputs.rows`."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its predictions and inputs."""
        ...

    def __call__(self, sample: Tensor, timesteps: Tensor, texts: Tensor, /, *, return_dict: bool) -> tuple[Tensor, ...]:
        """The predictions (R, C, H, W), first of a tuple."""
        ...


class SamplingRun:
    """The pipeline's own sampling loop, one `advance` per step, with a scheduler of its own.

    Raises AsdmError for schedulers that call the UNet more than once per step.
    """

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        texts: Tensor,
        settings: SamplingSettings,
        unet: Predictor | None = None,
    ) -> None:
        self.unet: Predictor = pipeline.unet if unet is None else unet
        dtype = self.unet.dtype
        self.texts, self.guidance = texts.to(dtype), settings.guidance
        self.scheduler = copy.deepcopy(pipeline.scheduler)
        check_one_evaluation_per_step(self.scheduler, settings.steps)
        self.scheduler.set_timesteps(settings.steps, device=pipeline.device)
        self.timesteps: Tensor = self.scheduler.timesteps
        noise = initial_latents(pipeline, len(texts), settings).to(dtype)
        self.latents = noise * self.scheduler.init_noise_sigma
        self.generators = step_generators(pipeline, len(texts), settings)
        self.takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        self.step = 0

    @property
    def finished(self) -> bool:
        """Whether all steps are taken."""
        return self.step == len(self.timesteps)

    def fork(self) -> SamplingRun:
        """A second run that goes on from this moment, with the same noise to come."""
        twin = copy.copy(self)
        twin.scheduler = copy.deepcopy(self.scheduler)
        twin.generators = [torch.Generator().set_state(g.get_state()) for g in self.generators]
        return twin

    def advance(self, change: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Take a step, with the guided prediction changed by `change`.

        The unchanged prediction (N, C, H, W), and the UNet's input before it was repeated per branch.
        """
        timestep = self.timesteps[self.step]
        model_input = self.scheduler.scale_model_input(self.latents, timestep)
        here = GuidedInputs(model_input, timestep.expand(len(model_input)), self.texts, self.guidance)
        prediction = here.guided(self.unet(*here.rows(), return_dict=False)[0])
        used = change(prediction) if change else prediction
        extra: dict[str, Any] = {"generator": self.generators} if self.takes_generator else {}
        self.latents = self.scheduler.step(used, timestep, self.latents, return_dict=False, **extra)[0]
        self.step += 1
        return prediction, model_input


def check_one_evaluation_per_step(scheduler: Any, steps: int) -> None:
    """Raise AsdmError for a scheduler that calls the UNet more often than once per step."""
    count = evaluations(scheduler, steps)
    if count != steps:
        raise AsdmError(
            f"{type(scheduler).__name__} calls the UNet {count} times in {steps} steps",
            "Measure with a sampler of one call per step, for example --scheduler dpm++.",
        )
