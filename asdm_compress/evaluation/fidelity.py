"""How near a student's images are to the teacher's at the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from asdm_compress.sampling.images import Samples

# Weights of the scales, from the finest, and the width of the window (Wang et al. 2003).
_SCALES: Final = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_WINDOW: Final = 11


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


def compare_pairs(ours: Sequence[Image], theirs: Sequence[Image]) -> tuple[list[float], list[float]]:
    """PSNR in dB and SSIM of each pair of images.

    Identical images have infinite PSNR; 100 dB stands for "no difference that eight bits can hold".
    """
    # Which brings scipy and matplotlib with it: a second or two of every command, most of which compare nothing.
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    a, b = to_tensor(ours), to_tensor(theirs)
    psnr = peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
    # In double: where a picture is flat, the variances are differences of large numbers.
    ssim = structural_similarity_index_measure(a.double(), b.double(), data_range=1.0, reduction="none")
    assert isinstance(ssim, Tensor)
    return psnr.clamp(max=100).reshape(-1).tolist(), ssim.reshape(-1).tolist()


def ms_ssim_scales(side: int) -> int:
    """How many of the five scales of MS-SSIM images of so many pixels per side have room for; 0 for none."""
    # Every scale halves the side, and torchmetrics itself asks for a little more.
    fits = (n for n in range(1, len(_SCALES) + 1) if side // max((n - 1) ** 2, 2 ** (n - 1)) >= _WINDOW)
    return max(fits, default=0)


def ms_ssim(ours: Sequence[Image], theirs: Sequence[Image]) -> list[float] | None:
    """MS-SSIM of each pair (Wang et al. 2003), on as many scales as fit, their weights scaled to a sum of 1.

    None for images that are too small for a single one.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    a, b = to_tensor(ours), to_tensor(theirs)
    scales = ms_ssim_scales(min(a.shape[2:]))
    if scales == 0:
        return None
    betas = tuple(weight / sum(_SCALES[:scales]) for weight in _SCALES[:scales])
    found = multiscale_structural_similarity_index_measure(
        a.double(), b.double(), data_range=1.0, betas=betas, normalize="relu", reduction="none"
    )
    assert isinstance(found, Tensor)
    return found.reshape(-1).tolist()


def compare(student: Samples, teacher: Samples) -> Fidelity:
    """Compare two runs of the same prompts and seeds, pair by pair."""
    psnr, ssim = compare_pairs(student.images, teacher.images)
    return Fidelity(
        latent_mse=float((student.latents - teacher.latents).float().square().mean()),
        psnr=float(np.mean(psnr)),
        ssim=float(np.mean(ssim)),
    )
