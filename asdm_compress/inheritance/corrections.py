"""Fitted corrections: a 1 x 1 map from what is known of a step to the error of a feature's forecast.

At a step that inherits a deep feature v, the shallow features h that it will be joined with are computed, so that the
error of their own forecast is known. With ĥ and v̂ the forecasts and h₁, v₁ the last computed values,

    v = v̂ + W · [h - ĥ, h - h₁, v₁] + b,

one W and b per step, fitted elsewhere along the accelerated trajectory itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CorrectionKey = tuple[int, str]  # the step's number and the corrected feature's name


@dataclass(frozen=True, slots=True)
class Correction:
    """One map: `weight` (C, 2 · C_source + C), `bias` (C,)."""

    weight: Tensor
    bias: Tensor

    def on(self, like: Tensor) -> Correction:
        """The map with the device and type of `like`."""
        if self.weight.device == like.device and self.weight.dtype == like.dtype:
            return self
        return Correction(self.weight.to(like), self.bias.to(like))


def regressors(source: Tensor, source_forecast: Tensor, source_last: Tensor, last: Tensor) -> Tensor:
    """What a correction looks at, (B, 2 · C_source + C, H, W): source values are (B, C_source, H, W)."""
    return torch.cat((source - source_forecast, source - source_last, last), dim=1)


def corrected(forecast: Tensor, seen: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The forecast (B, C, H, W) with its error as the map sees it taken away."""
    return forecast + F.conv2d(seen, weight[:, :, None, None], bias)


def correction_macs(correction: Correction, rows: int, height: int, width: int) -> int:
    """Multiply-accumulate operations of one application to (rows, C, height, width)."""
    return correction.weight.numel() * rows * height * width
