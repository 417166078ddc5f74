"""Compares what was predicted of a schedule with what it does: error and time, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Final

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from asdm_compress.inheritance.actions import Action
from asdm_compress.inheritance.evaluator import Evaluator
from asdm_compress.inheritance.run import Run
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.models.call import UNetCall
from asdm_compress.profiling.latency import clock_for
from asdm_compress.sampling.run import SamplingRun
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scheduling.guided_unet import GuidedUNet
from asdm_compress.scheduling.menu import choice_of
from asdm_compress.scheduling.surrogate import Surrogate
from asdm_compress.scheduling.timing import Loop

TIMED_RUNS: Final = 5


@dataclass(frozen=True, slots=True)
class StepCheck:
    """One step: its action, the root mean squared error of the guided prediction and its seconds, each twice.

    `predicted_error` is None where the search has not measured what the step inherits.
    """

    action: str
    predicted_error: float | None
    measured_error: float
    predicted_seconds: float
    measured_seconds: float

    def as_json(self) -> dict[str, float | str | None]:
        """For files."""
        return {name: getattr(self, name) for name in self.__slots__}


@torch.no_grad()
def check_steps(
    pipeline: StableDiffusionPipeline,
    surrogate: Surrogate,
    schedule: Schedule,
    seconds: Sequence[float],
    texts: Tensor,
    settings: SamplingSettings,
    one_batch: Tensor,
    left: Mapping[int, float] | None = None,
) -> tuple[StepCheck, ...]:
    """What a schedule does on runs of `texts` (N, branches, tokens, width), beside what was predicted of it.

    Measured errors are those along the schedule's own trajectory, against a full pass from the same latents. `seconds`
    are the predicted ones of every step, for the batch of texts `one_batch`, on which they are measured too; `left` are
    the shares of the squared error that corrections leave.
    """
    measured, values = _errors(pipeline, surrogate, schedule, texts, settings)
    predicted = _predicted(surrogate, schedule.actions, values, left or {})
    taken = _seconds(pipeline, schedule, one_batch, settings)
    return tuple(
        StepCheck(action.name, predicted[i], measured[i], seconds[i], taken[i])
        for i, action in enumerate(schedule.actions)
    )


def _predicted(
    surrogate: Surrogate, actions: Sequence[Action], values: int, left: Mapping[int, float]
) -> Sequence[float | None]:
    """The root mean squared errors from the surrogate, made smaller where corrections are as they did when fitted."""
    choices = [choice_of(surrogate.menu, action) for action in actions]
    known = [choice for choice in choices if choice is not None]
    errors = surrogate.errors(known) if len(known) == len(choices) else None
    if errors is None:
        return [None] * len(choices)
    rms = np.sqrt(np.square(errors).sum(-1).mean(-1) / values)
    return [float(error) * left.get(step, 1.0) ** 0.5 for step, error in enumerate(rms)]


def _errors(
    pipeline: StableDiffusionPipeline,
    surrogate: Surrogate,
    schedule: Schedule,
    texts: Tensor,
    settings: SamplingSettings,
) -> tuple[list[float], int]:
    """The root mean squared error at every step, and the number of values in a prediction."""
    branches, guidance = texts.shape[1], settings.guidance
    corrections = {key: correction.on(texts) for key, correction in schedule.corrections.items()}
    guided_run = surrogate.menu.guided
    run = Run(Evaluator(pipeline.unet), schedule.actions, surrogate.timeline, guided_run, corrections)
    found: list[float] = []

    def guided(prediction: Tensor) -> Tensor:
        if branches == 1:
            return prediction
        without, prompt = prediction.chunk(2)
        return without + guidance * (prompt - without)

    def evaluate(call: UNetCall) -> Tensor:
        prediction = run.evaluate(call)
        truth = pipeline.unet(call.sample, call.timestep, call.encoder_hidden_states, return_dict=False)[0]
        found.append(float((guided(prediction) - guided(truth)).double().square().mean().sqrt()))
        return prediction

    sampling = SamplingRun(pipeline, texts, settings, GuidedUNet(pipeline.unet.dtype, branches, evaluate))
    while not sampling.finished:
        sampling.advance()
    return found, sampling.latents[0].numel()


def _seconds(
    pipeline: StableDiffusionPipeline, schedule: Schedule, texts: Tensor, settings: SamplingSettings
) -> list[float]:
    """Seconds of every step, medians over a few runs; the first holds what a run costs beside its steps."""
    loop = Loop(pipeline, texts, settings, schedule)
    clock = clock_for(pipeline.device, undisturbed=True)  # as of the times that these are compared with
    runs: list[list[float]] = []
    loop()
    for _ in range(TIMED_RUNS):
        clock.synchronise()
        marks = [clock.mark()]

        def mark(*_: Any, marks: list[Any] = marks) -> dict[str, Any]:
            marks.append(clock.mark())
            return {}

        loop(mark)
        clock.synchronise()
        runs.append([clock.between(before, after) for before, after in pairwise(marks)])
    return [median(seconds) for seconds in zip(*runs, strict=True)]
