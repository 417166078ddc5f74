"""An upsampler that convolves first: what `interpolate, then 3 x 3` computes, with 4 / 9 of its multiplications.

Nearest-neighbour interpolation repeats every pixel, so that the nine taps of a kernel meet four different pixels only.
Each of the four output phases is a 2 x 2 kernel on the small image, whose taps are sums of the 3 x 3 kernel's (the
sub-pixel view of Shi et al., 1609.05158 and 1609.07009). The weights stay the upsampler's own.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SubpixelUpsampler(nn.Module):
    """In place of an Upsample2D whose convolution is 3 x 3: the same function."""

    def __init__(self, upsampler: Any) -> None:
        super().__init__()
        self.channels, self.out_channels = upsampler.channels, upsampler.out_channels
        self.conv = SubpixelConv2d(upsampler.conv)

    def forward(
        self, hidden_states: Tensor, output_size: tuple[int, int] | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """(B, C, H, W) to (B, C_out, 2H, 2W), or to `output_size`."""
        return cast("Tensor", self.conv(hidden_states, output_size))


class SubpixelConv2d(nn.Module):
    """Interpolation and 3 x 3 convolution in one, with the convolution's own `weight` and `bias`."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self._kept: tuple[Any, Tensor, Tensor | None] | None = None

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, 2H, 2W); sizes that are not twice the input's take the long way."""
        height, width = hidden_states.shape[2:]
        if output_size is not None and tuple(output_size) != (2 * height, 2 * width):
            larger = F.interpolate(hidden_states, size=tuple(output_size), mode="nearest")
            return F.conv2d(larger, self.weight, self.bias, padding=1)
        kernels, bias = self._phases()
        phases = F.conv2d(hidden_states, kernels, bias, padding=1)
        phases = phases.reshape(phases.shape[0], 4, -1, *phases.shape[2:])
        # Phase (a, b) of pixel (i, j) is the kernel's answer at (i + a, j + b) of the padded image.
        corners = [phases[:, 2 * a + b, :, a : a + height, b : b + width] for a in (0, 1) for b in (0, 1)]
        return F.pixel_shuffle(torch.stack(corners, dim=2).flatten(1, 2), 2)

    def _phases(self) -> tuple[Tensor, Tensor | None]:
        """The kernels (4 C_out, C_in, 2, 2) and biases of the four phases, kept while the weights are the same."""
        weight = self.weight
        changes = torch.is_grad_enabled() or torch.compiler.is_compiling() or weight.is_inference()
        if changes:
            return self._computed_phases()
        mark = (weight.data_ptr(), weight._version, None if self.bias is None else self.bias._version)
        if self._kept is None or self._kept[0] != mark:
            self._kept = (mark, *self._computed_phases())
        return self._kept[1:]

    def _computed_phases(self) -> tuple[Tensor, Tensor | None]:
        first, middle, last = self.weight.unbind(2)
        rows = (torch.stack([first, middle + last], 2), torch.stack([first + middle, last], 2))
        kernels = []
        for row in rows:
            left, centre, right = row.unbind(3)
            kernels += [torch.stack([left, centre + right], 3), torch.stack([left + centre, right], 3)]
        return torch.cat(kernels), None if self.bias is None else self.bias.repeat(4)

    def train(self, mode: bool = True) -> SubpixelConv2d:
        """As any module; kept kernels are forgotten."""
        self._kept = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> SubpixelConv2d:
        self._kept = None
        return super()._apply(*args, **kwargs)  # type: ignore[no-any-return, no-untyped-call]
