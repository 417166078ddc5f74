"""How the prediction of every step responds when features of earlier steps stand in for its own.

With f_i the features that an action takes at step i, v_ik is what the prediction changes by when f_(i-k) stands in for
f_i, to first order: the difference quotient along f_(i-k) - f_i. Any forecast is Σ c_k f_(i-k) with Σ c_k = 1, so that
the error it makes in the prediction is Σ c_k v_ik: one measurement prices every forecast, order and abscissa. Of the
denoised latent v_ik is known without a pass, since the prediction is an affine map of it. What is kept is a random
sketch of every v_ik, whose scalar products say what errors do together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from asdm_compress.assembly.damage import SKETCH, sketch
from asdm_compress.core.files import CACHE_HINT, output_file
from asdm_compress.inheritance.evaluator import Evaluator
from asdm_compress.inheritance.passes import Given
from asdm_compress.inheritance.places import Feature
from asdm_compress.inheritance.program import program_of
from asdm_compress.inheritance.run_plan import DENOISED
from asdm_compress.inheritance.timeline import Timeline
from asdm_compress.models.call import UNetCall
from asdm_compress.sampling.run import SamplingRun
from asdm_compress.sampling.settings import SamplingSettings, encode
from asdm_compress.scheduling.guided_unet import GuidedUNet
from asdm_compress.scheduling.menu import Menu

REACH: Final = 8  # steps back that a feature may come from
# The share of the way towards the older feature at which the response is measured. A half-way point is near enough to
# be linear, and far enough not to drown in the rounding of half precision.
SHARE: Final = 0.5

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Responses:
    """Sketches of N runs of T steps, with D values each; rows are the guidance branches, without and with the prompt.

    `errors` (A, T, K, rows, N, D): v_ik of each light action, zero where there is no step i - k. `predictions`
    (T, rows, N, D).
    """

    errors: np.ndarray
    predictions: np.ndarray

    @staticmethod
    def together(parts: Sequence[Responses]) -> Responses:
        """Those of all runs."""
        return Responses(
            np.concatenate([part.errors for part in parts], axis=4),
            np.concatenate([part.predictions for part in parts], axis=2),
        )


@torch.no_grad()
def measure_responses(
    pipeline: StableDiffusionPipeline,
    menu: Menu,
    timeline: Timeline,
    prompts: Sequence[str],
    settings: SamplingSettings,
    folder: Path | None = None,
    batch: int = 8,
    progress: Progress | None = None,
) -> Responses:
    """Sample the prompts in full, and measure along the way.

    Every batch of prompts is a file of its own in `folder`, so that a run that was cut off goes on where it was; a file
    that cannot be read is measured again. Held in memory at a time are the features of `REACH` steps of one batch.
    """
    texts, evaluator = encode(pipeline, prompts, settings.guidance), Evaluator(pipeline.unet)
    parts: list[Responses] = []
    total = len(prompts) * settings.steps
    for first in range(0, len(prompts), batch):
        rows = slice(first, min(first + batch, len(prompts)))
        path = folder / f"responses-{first}-{rows.stop}.safetensors" if folder else None

        def step_done(step: int, first: int = first, count: int = rows.stop - first) -> None:
            if progress:
                progress(first * settings.steps + step * count, total)

        found = _read(path)
        if found is None:
            here = replace(settings, seed=settings.seed + first)
            found = _measure(pipeline, evaluator, menu, timeline, texts[rows], here, step_done)
            _write(path, found)
        step_done(settings.steps)
        parts.append(found)
    return Responses.together(parts)


def _measure(
    pipeline: StableDiffusionPipeline,
    evaluator: Evaluator,
    menu: Menu,
    timeline: Timeline,
    texts: Tensor,
    settings: SamplingSettings,
    step_done: Callable[[int], None],
) -> Responses:
    branches, count = texts.shape[1], len(texts)
    wanted = tuple(dict.fromkeys(f for program in menu.programs for f in program.taken))
    whole = program_of(menu.graph, (), wanted)
    older: deque[Mapping[Feature, Tensor]] = deque(maxlen=REACH)
    errors = np.zeros((len(menu.lights), settings.steps, REACH, branches, count, SKETCH), np.float32)
    predictions = np.zeros((settings.steps, branches, count, SKETCH), np.float32)

    def rows_of(values: Tensor) -> np.ndarray:
        return sketch(values).cpu().numpy().reshape(branches, count, SKETCH)

    def evaluate(call: UNetCall) -> Tensor:
        step, timestep = run.step, float(run.timesteps[run.step])
        prediction, recorded = evaluator.evaluate(whole, call, timestep=timestep)
        now = dict(zip(whole.recorded, recorded, strict=True))
        of_prediction = 1.0
        if any(map(menu.denoises, range(len(menu.lights)))):
            of_input, of_prediction = timeline.denoised(step)
            latents = call.sample[:, : prediction.shape[1]].float()
            now[DENOISED] = of_input * latents + of_prediction * prediction.float()
        for number, program in enumerate(menu.programs):
            for back, then in enumerate(reversed(older)):
                if menu.denoises(number):
                    errors[number, step, back] = rows_of((then[DENOISED] - now[DENOISED]) / of_prediction)
                    continue
                values = [torch.lerp(now[feature], then[feature], SHARE) for feature in program.taken]
                changed, _ = evaluator.evaluate(program, call, Given(values), timestep)
                errors[number, step, back] = rows_of((changed - prediction).float() / SHARE)
        older.append(now)
        predictions[step] = rows_of(prediction)
        return prediction

    run = SamplingRun(pipeline, texts, settings, GuidedUNet(pipeline.unet.dtype, branches, evaluate))
    while not run.finished:
        run.advance()
        step_done(run.step)
    return Responses(errors, predictions)


def _read(path: Path | None) -> Responses | None:
    if path is None or not path.exists():
        return None
    try:
        kept = load_file(path)
        return Responses(kept["errors"], kept["predictions"])
    except (SafetensorError, KeyError):
        return None


def _write(path: Path | None, found: Responses) -> None:
    if path is not None:
        with output_file(path, CACHE_HINT) as aside:
            save_file({"errors": found.errors, "predictions": found.predictions}, aside)
