"""A process's rows of every step, read from the cache one step ahead."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from asdm_compress.core.distillation import Distillation
from asdm_compress.core.errors import AsdmError
from asdm_compress.distillation.cache import LatentCache, Share
from asdm_compress.distillation.draws import Draw, Draws, micro_batches
from asdm_compress.distillation.losses import Batch


def check_share(batch: int, processes: int) -> None:
    """Raise AsdmError for a batch that does not divide among so many processes."""
    if batch % processes:
        raise AsdmError(
            f"a batch of {batch} cannot be shared by {processes} processes",
            "Choose a --batch that is a multiple of their number.",
        )


class Batches:
    """Reads the rows that fall to one of several processes, in as many parts as fit at once.

    Every process draws the whole batch and takes its rows, so the number of processes does not change what is drawn.
    Raises AsdmError for a batch that does not divide among them.
    """

    def __init__(
        self,
        cache: LatentCache,
        settings: Distillation,
        train_timesteps: int,
        share: Share = Share(),  # noqa: B008 - frozen
        at_once: int | None = None,
    ) -> None:
        check_share(settings.batch, share.processes)
        self.cache, self.share = cache, share
        self.draws = Draws(settings, len(cache), cache.latent_shape, train_timesteps)
        self.rows, self.parts = micro_batches(settings.batch, share.processes, at_once)
        self._ahead: tuple[int, Future[tuple[Draw, Tensor, Tensor]]] | None = None
        self._reader = ThreadPoolExecutor(1)

    def of(self, step: int, device: torch.device) -> Iterator[Batch]:
        """The parts of this process's rows of a step; the next step's are read meanwhile."""
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = (step, self._reader.submit(self._read, step))
        draw, clean, text = self._ahead[1].result()
        self._ahead = (step + 1, self._reader.submit(self._read, step + 1))
        for number in range(self.parts):
            here = slice(number * self.rows, (number + 1) * self.rows)
            tensors = (clean, draw.noise, draw.timesteps, text, draw.own, draw.rolled)
            yield Batch(*(t[here].to(device, non_blocking=True) for t in tensors))

    def _read(self, step: int) -> tuple[Draw, Tensor, Tensor]:
        whole = self.draws.of(step)
        first = self.share.rank * self.rows * self.parts
        draw = whole.rows(first, first + self.rows * self.parts)
        text = torch.where(draw.captioned[:, None, None], self.cache.texts(draw.captions), self.cache.empty)
        return draw, self.cache.latents(draw.items), text
