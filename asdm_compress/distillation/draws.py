"""What every step draws: items, timesteps, noise, left-out and swapped captions, as a pure function of seed and step.

No generator lives through a training, so a resumed one draws what an uninterrupted one would have drawn, and several
processes, which draw the whole batch and take their rows, what a single one would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from torch import Tensor

from asdm_compress.core.distillation import Distillation
from asdm_compress.distillation.trajectory import rolled_rows

_ORDER: Final = 1  # what a generator is for, so that no two draw the same numbers
_STEP: Final = 2


@dataclass(frozen=True, slots=True)
class Draw:
    """One batch: `items` (B,), `timesteps` (B,), `noise` (B, C, h, w), and per row the item whose caption it gets.

    `captioned` (B,) is False where the caption is left out; `own` (B,) where the caption is the item's own or none;
    `rolled` (B,) has the weights in the trajectory loss.
    """

    items: Tensor
    timesteps: Tensor
    noise: Tensor
    captions: Tensor
    captioned: Tensor
    own: Tensor
    rolled: Tensor

    def rows(self, start: int, stop: int) -> Draw:
        """Some of the rows."""
        return replace(self, **{f.name: getattr(self, f.name)[start:stop] for f in fields(self)})


@dataclass(frozen=True, slots=True)
class Draws:
    """The draws of a training over `items` items with latents of `shape` and so many timesteps."""

    settings: Distillation
    items: int
    shape: tuple[int, int, int]
    train_timesteps: int

    def of(self, step: int) -> Draw:
        """The whole batch of a step: items in a new order in every epoch, timesteps stratified over the batch."""
        losses, batch = self.settings.losses, self.settings.batch
        generator = _generator(self.settings.seed, _STEP, step)
        items = self._items(step)
        strata = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
        timesteps = (strata * self.train_timesteps).long().clamp(max=self.train_timesteps - 1)
        noise = torch.randn(batch, *self.shape, generator=generator)
        captioned = torch.rand(batch, generator=generator) >= losses.caption_dropout
        others = torch.randint(self.items, (batch,), generator=generator)
        chance = torch.rand(batch, generator=generator)
        swapped = torch.zeros(batch, dtype=torch.bool)
        if losses.random_conditioning:
            share = timesteps / self.train_timesteps
            swapped = chance < torch.exp(-losses.random_conditioning * (1 - share))
        captions = torch.where(swapped, others, items)
        rolled = rolled_rows(batch, losses.trajectory_steps)
        return Draw(items, timesteps, noise, captions, captioned, ~swapped | ~captioned, rolled)

    def _items(self, step: int) -> Tensor:
        places = range(step * self.settings.batch, (step + 1) * self.settings.batch)
        return torch.tensor(
            [int(_order(self.settings.seed, p // self.items, self.items)[p % self.items]) for p in places]
        )


def _generator(*key: int) -> torch.Generator:
    state = np.random.SeedSequence([abs(part) for part in key]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, items: int) -> Tensor:
    return torch.randperm(items, generator=_generator(seed, _ORDER, epoch))


def micro_batches(batch: int, processes: int, at_once: int | None) -> tuple[int, int]:
    """How many rows a device runs at once, and how many times a step, for a batch over so many processes.

    Without `at_once` a device takes all of its rows at once.
    """
    rows = batch // processes
    if at_once is None or at_once >= rows:
        return rows, 1
    times = math.ceil(rows / at_once)
    while rows % times:
        times += 1
    return rows // times, times
