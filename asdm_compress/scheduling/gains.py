"""How far an error of the prediction at each step moves the final latent, measured on the sampler in use."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from asdm_compress.models.precision import true_fp32
from asdm_compress.sampling.images import check_latents
from asdm_compress.sampling.run import SamplingRun
from asdm_compress.sampling.settings import SamplingSettings

DISTURBANCE: Final = 0.02  # of the prediction's norm
PROBED_STEPS: Final = 8  # the others lie between them

Progress = Callable[[int, int], None]


@torch.no_grad()
@true_fp32()
def measure_gains(
    pipeline: StableDiffusionPipeline,
    texts: Tensor,
    settings: SamplingSettings,
    progress: Progress | None = None,
) -> np.ndarray:
    """‖Δx_0‖ per ‖Δε‖ at every step (T,), the median over the runs of `texts` (N, branches, tokens, width).

    At about `PROBED_STEPS` steps a fork of the run is given the prediction of the step before mixed in, which is the
    direction in which inherited features err, and both are run to the end; between them the logarithm is interpolated.
    Always in fp32: in half precision, rounding alone moves the end as far. Raises AsdmError where a run has no numbers.
    """
    exact = pipeline.unet if pipeline.unet.dtype == torch.float32 else copy.deepcopy(pipeline.unet).float()
    report = progress or (lambda done, total: None)
    steps = settings.steps
    probed = sorted({min(steps - 1, max(1, round(x))) for x in np.linspace(1, steps - 1, min(PROBED_STEPS, steps))})
    run = SamplingRun(pipeline, texts, settings, exact)
    total, done = steps + sum(steps - step for step in probed), 0
    forks: list[tuple[int, SamplingRun, Tensor]] = []
    last: Tensor | None = None
    for step in range(steps):
        fork = run.fork() if step in probed else None
        prediction, _ = run.advance()
        if fork is not None and last is not None:
            away = last - prediction
            error = away * (DISTURBANCE * _norms(prediction) / _norms(away).clamp(min=1e-12))
            forks.append((step, fork, error))
        last = prediction
        report(done := done + 1, total)
    check_latents(run.latents, exact.dtype)
    found: dict[int, float] = {}
    for step, fork, error in forks:
        fork.advance(error.add)
        while not fork.finished:
            fork.advance()
        moved = _norms((fork.latents - run.latents).double()) / _norms(error.double()).clamp(min=1e-12)
        found[step] = max(float(moved.median()), 1e-12)
        report(done := done + steps - step, total)
    if not found:
        return np.ones(steps)
    return np.exp(np.interp(range(steps), list(found), np.log(list(found.values()))))


def _norms(values: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1)
    return found[:, None, None, None]
