"""How near a student's images are to the teacher's at the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from asdm_compress.sampling.images import Samples

# Weights of the scales, from the finest, and the width of the window (Wang et al. 2003).
_SCALES: Final = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_WINDOW: Final = 11
# The window's deviation, and what keeps the quotients defined (Wang et al. 2004).
_DEVIATION: Final = 1.5
_LUMINANCE: Final = 0.01**2
_CONTRAST: Final = 0.03**2
Values = npt.NDArray[np.float64]


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
    a, b = (to_tensor(images).double().numpy() for images in (ours, theirs))
    error = np.square(a - b).mean(axis=(1, 2, 3))
    psnr = np.minimum(-10 * np.log10(np.maximum(error, 1e-30)), 100)
    return psnr.tolist(), _similarity(a, b)[0].mean(axis=(1, 2, 3)).tolist()


def _similarity(a: Values, b: Values) -> tuple[Values, Values]:
    """SSIM and its part without luminance at every pixel of images (N, C, H, W) in [0, 1], mirrored at their borders.

    In double: where a picture is flat, the variances are differences of large numbers. torchmetrics, which does the
    same and is its oracle, takes thirty times as long in that precision.
    """
    from scipy.ndimage import correlate1d  # half a second of every command, most of which compare nothing

    places = np.arange(_WINDOW) - _WINDOW // 2
    taps = np.exp(-(places**2) / (2 * _DEVIATION**2))
    taps /= taps.sum()

    def smooth(x: Values) -> Values:
        rows: Values = correlate1d(x, taps, axis=-2, mode="mirror")
        return correlate1d(rows, taps, axis=-1, mode="mirror")  # type: ignore[no-any-return]

    mean_a, mean_b = smooth(a), smooth(b)
    variance = smooth(a * a) - mean_a**2 + smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    contrast = (2 * covariance + _CONTRAST) / (variance + _CONTRAST)
    luminance = (2 * mean_a * mean_b + _LUMINANCE) / (mean_a**2 + mean_b**2 + _LUMINANCE)
    return luminance * contrast, contrast


def ms_ssim_scales(side: int) -> int:
    """How many of the five scales of MS-SSIM images of so many pixels per side have room for; 0 for none."""
    # Every scale halves the side, and torchmetrics itself asks for a little more.
    fits = (n for n in range(1, len(_SCALES) + 1) if side // max((n - 1) ** 2, 2 ** (n - 1)) >= _WINDOW)
    return max(fits, default=0)


def ms_ssim(ours: Sequence[Image], theirs: Sequence[Image]) -> list[float] | None:
    """MS-SSIM of each pair (Wang et al. 2003), on as many scales as fit, their weights scaled to a sum of 1.

    None for images that are too small for a single one.
    """
    a, b = (to_tensor(images).double() for images in (ours, theirs))
    scales, border = ms_ssim_scales(min(a.shape[2:])), _WINDOW // 2
    if scales == 0:
        return None
    found = torch.ones(len(a), dtype=torch.float64)
    for number, weight in enumerate(_SCALES[:scales], start=1):
        whole, contrast = _similarity(a.numpy(), b.numpy())
        inside = contrast[..., border:-border, border:-border]
        part = torch.from_numpy(whole if number == scales else inside).mean(dim=(1, 2, 3))
        found *= part.clamp(min=0) ** (weight / sum(_SCALES[:scales]))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return found.tolist()


def compare(student: Samples, teacher: Samples) -> Fidelity:
    """Compare two runs of the same prompts and seeds, pair by pair."""
    psnr, ssim = compare_pairs(student.images, teacher.images)
    return Fidelity(
        latent_mse=float((student.latents - teacher.latents).float().square().mean()),
        psnr=float(np.mean(psnr)),
        ssim=float(np.mean(ssim)),
    )
