"""The early probe: how far a student in training is from its teacher on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from asdm_compress.assembly.calibration import TOGETHER, Calibration, record
from asdm_compress.assembly.damage import compare_predictions, predictions
from asdm_compress.models.loading import with_parts
from asdm_compress.models.precision import true_fp32
from asdm_compress.sampling.run import SamplingRun
from asdm_compress.sampling.settings import SamplingSettings, encode

BANDS = 8
_LEAST_ERROR = 1e-12


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """`latent_error` is ‖z_S − z_T‖² / ‖z_T‖² of the final latents at the same prompts and seeds, its geometric mean
    over the prompts as a PSNR takes it: of a near student's plain mean one picture that turns out another is the whole.

    `damage` is the relative squared error of the guided prediction at moments of the teacher's own runs.
    """

    latent_error: float
    damage: float


class Probe:
    """Holds what the teacher does on the prompts, so that a probe costs the student's runs alone.

    `exact` is the teacher's UNet in fp32 where the pipeline's own is in half precision, whose rounding is more than
    what a near student differs by; it is not kept. `wanted` are its final latents (N, C, h, w), `found` those of the
    student that was measured last.
    """

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        prompts: Sequence[str],
        settings: SamplingSettings,
        seed: int = 90_000,
        exact: UNet2DConditionModel | None = None,
    ) -> None:
        self.pipeline, self.settings = pipeline, replace(settings, seed=seed)
        self.texts = encode(pipeline, prompts, settings.guidance)
        self.prompts = tuple(prompts)
        teacher = pipeline.unet if exact is None else exact
        weights = (1 / BANDS,) * BANDS
        with true_fp32():
            self.wanted = self._run(teacher)
            self.moments: Calibration = record(
                with_parts(pipeline, unet=teacher), prompts, self.settings, BANDS, None, weights
            )
            self.reference = predictions(teacher, self.moments)
        self.found: Tensor = self.wanted

    def measure(self, student: UNet2DConditionModel) -> ProbeResult:
        """Sample with the student, which is left as it was."""
        was_training = student.training
        student.eval()
        try:
            # Whatever it is trained in: its weights are kept in fp32.
            with torch.autocast(student.device.type, enabled=False), true_fp32():
                self.found = self._run(student)
                damage = compare_predictions(student, student, self.moments, self.reference).total
        finally:
            student.train(was_training)
        return ProbeResult(relative_error(self.found, self.wanted), float(damage))

    @torch.no_grad()
    def _run(self, unet: UNet2DConditionModel) -> Tensor:
        found = []
        for start in range(0, len(self.texts), TOGETHER):
            here = replace(self.settings, seed=self.settings.seed + start)
            run = SamplingRun(self.pipeline, self.texts[start : start + TOGETHER], here, unet)
            while not run.finished:
                run.advance()
            found.append(run.latents.float())
        return torch.cat(found)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖² / ‖wanted‖² of each row, their geometric mean; rows that are equal count as 1e-12."""
    errors, energies = ((t.double().square().flatten(1).sum(dim=1)) for t in (found - wanted, wanted))
    return float((errors / energies).clamp(min=_LEAST_ERROR).log().mean().exp())
