"""How near a student's images are to the teacher's at the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from asdm_compress.sampling.images import Samples


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Means over pairs: squared error of the latents, PSNR in dB, SSIM (Wang et al. 2004)."""

    latent_mse: float
    psnr: float
    ssim: float


def to_tensor(images: Sequence[Image]) -> Tensor:
    """Images of one size to (N, 3, H, W) in [0, 1]."""
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def compare(student: Samples, teacher: Samples) -> Fidelity:
    """Compare two runs of the same prompts and seeds, pair by pair."""
    ours, theirs = to_tensor(student.images), to_tensor(teacher.images)
    psnr = peak_signal_noise_ratio(ours, theirs, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(ours, theirs, data_range=1.0)
    assert isinstance(ssim, Tensor)
    return Fidelity(
        latent_mse=float((student.latents - teacher.latents).float().square().mean()),
        # Identical images have infinite PSNR; 100 dB stands for "no difference that eight bits can hold".
        psnr=float(psnr.clamp(max=100).mean()),
        ssim=float(ssim),
    )
