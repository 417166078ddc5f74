"""The early probe: how far a student in training is from its teacher on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from asdm_compress.assembly.calibration import Calibration, record
from asdm_compress.assembly.damage import compare_predictions
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

    `wanted` are the teacher's final latents (N, C, h, w), `found` those of the student that was measured last.
    """

    def __init__(
        self, pipeline: StableDiffusionPipeline, prompts: Sequence[str], settings: SamplingSettings, seed: int = 90_000
    ) -> None:
        self.pipeline, self.settings = pipeline, replace(settings, seed=seed)
        self.texts = encode(pipeline, prompts, settings.guidance)
        self.prompts = tuple(prompts)
        self.wanted = self._run(pipeline.unet)
        self.found: Tensor = self.wanted
        self.moments: Calibration = record(pipeline, prompts, self.settings, BANDS, None, (1 / BANDS,) * BANDS)

    def measure(self, student: UNet2DConditionModel) -> ProbeResult:
        """Sample with the student, which is left as it was."""
        was_training = student.training
        student.eval()
        try:
            teacher = self.pipeline.unet
            # A teacher in half precision is compared with a student as that is trained: mixed.
            mixed = teacher.dtype != student.dtype
            with torch.autocast(student.device.type, teacher.dtype, enabled=mixed):
                self.found = self._run(student)
                damage = compare_predictions(teacher, student, self.moments).total
        finally:
            student.train(was_training)
        return ProbeResult(relative_error(self.found, self.wanted), float(damage))

    @torch.no_grad()
    def _run(self, unet: UNet2DConditionModel) -> Tensor:
        run = SamplingRun(self.pipeline, self.texts, self.settings, unet)
        while not run.finished:
            run.advance()
        latents: Tensor = run.latents
        return latents.float()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖² / ‖wanted‖² of each row, their geometric mean; rows that are equal count as 1e-12."""
    errors, energies = ((t.double().square().flatten(1).sum(dim=1)) for t in (found - wanted, wanted))
    return float((errors / energies).clamp(min=_LEAST_ERROR).log().mean().exp())
