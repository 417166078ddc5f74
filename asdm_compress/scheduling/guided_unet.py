"""A batch of sampling runs whose predictions come from somewhere else than the UNet's own forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from asdm_compress.models.call import UNetCall

Evaluate = Callable[[UNetCall], Tensor]


@dataclass(frozen=True, slots=True)
class GuidedUNet:
    """Stands in for the UNet of a `SamplingRun`: asks `evaluate`, whose rows are two halves as in diffusers' pipelines.

    `branches` is 2 with guidance and 1 without; the run's own rows go branch by branch for each image.
    """

    dtype: torch.dtype
    branches: int
    evaluate: Evaluate

    def __call__(self, sample: Tensor, timesteps: Tensor, texts: Tensor, /, *, return_dict: bool) -> tuple[Tensor, ...]:
        """The predictions (R, C, H, W) of rows that share one timestep."""
        assert not return_dict
        call = UNetCall(self._halves(sample), timesteps[0], self._halves(texts))
        prediction = self.evaluate(call)
        return (prediction.reshape(self.branches, -1, *prediction.shape[1:]).transpose(0, 1).flatten(0, 1),)

    def _halves(self, rows: Tensor) -> Tensor:
        return rows.reshape(-1, self.branches, *rows.shape[1:]).transpose(0, 1).flatten(0, 1)
