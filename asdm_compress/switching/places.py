"""Which step of which sampling run a call of the UNet is, told by the memory of its timestep.

Pipelines hand the UNet one element after the other of the scheduler's tensor of timesteps, which is another tensor in
every run: its memory says what run it is, and has all the timesteps of the run in it.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from asdm_compress.inheritance.run import Run

MOST_OPEN: Final = 4  # runs on one UNet in one thread
_LARGEST: Final = 10_000  # timesteps of a run, and more than any schedule's training steps


@dataclass(frozen=True, slots=True)
class InRun:
    """A place in a run: all timesteps of it, on their device, and the number of the one at hand."""

    timesteps: Tensor
    number: int

    @property
    def key(self) -> tuple[int, str]:
        """The same for places of the same run only."""
        return self.timesteps.data_ptr(), str(self.timesteps.device)


@dataclass(slots=True)
class RunUnderWay:
    """A run under way; it began with evaluation `first` of its sampler. `guided` says that its calls' rows are two
    halves, without and with the prompt, and `rows` how many of them the last call had.

    Its timesteps are not held: once nobody has them, nobody can call for its next step, and another run may have its
    timesteps in the same memory.
    """

    key: tuple[int, str]
    timesteps: StorageWeakRef
    first: int
    run: Run
    guided: bool = False
    rows: int = 0

    @classmethod
    def at(cls, place: InRun, run: Run) -> RunUnderWay:
        """A run that begins at a place."""
        timesteps = StorageWeakRef(place.timesteps.untyped_storage())  # type: ignore[no-untyped-call]
        return cls(place.key, timesteps, place.number, run)

    @property
    def is_over(self) -> bool:
        """Whether it has made its last step, or was cut off and its timesteps are gone."""
        return self.run.finished or bool(self.timesteps.expired())  # type: ignore[no-untyped-call]

    @property
    def next(self) -> int:
        """The number of the evaluation that comes next."""
        return self.first + self.run.step


class OpenRuns(threading.local):
    """The runs that this thread has under way on the UNet that holds this; copies of the UNet have none."""

    def __init__(self) -> None:
        self._by_place: OrderedDict[tuple[int, str], RunUnderWay] = OrderedDict()

    def of(self, place: InRun) -> RunUnderWay | None:
        """The run of a place, if it is under way."""
        self._forget_what_is_over()
        return self._by_place.get(place.key)

    def has_made(self, place: InRun) -> bool:
        """Whether the last step of a run under way was this very one."""
        opened = self.of(place)
        return opened is not None and place.number == opened.next - 1

    def keep(self, opened: RunUnderWay) -> None:
        """Remember a run, and forget it once it is over; of too many the oldest is forgotten."""
        self._by_place.pop(opened.key, None)
        self._by_place[opened.key] = opened
        self._forget_what_is_over()
        while len(self._by_place) > MOST_OPEN:
            self._by_place.popitem(last=False)

    def _forget_what_is_over(self) -> None:
        for key in [key for key, opened in self._by_place.items() if opened.is_over]:
            del self._by_place[key]

    def __reduce__(self) -> tuple[type[OpenRuns], tuple[()]]:
        return type(self), ()


def place_of(timestep: Tensor | float) -> InRun | None:
    """The place of a call with this timestep; None where it is no element of a run's tensor of timesteps."""
    if not isinstance(timestep, Tensor) or timestep.device.type == "meta" or timestep.numel() == 0:
        return None
    if any(stride and size > 1 for stride, size in zip(timestep.stride(), timestep.shape, strict=True)):
        return None  # not one element, repeated
    storage, size = timestep.untyped_storage(), timestep.element_size()
    count = storage.nbytes() // size
    if not 1 < count <= _LARGEST:
        return None
    whole = torch.empty(0, dtype=timestep.dtype, device=timestep.device)
    whole.set_(storage, 0, (count,), (1,))
    return InRun(whole, (timestep.data_ptr() - whole.data_ptr()) // size)


def is_run(timesteps: list[float]) -> bool:
    """Whether numbers are what a sampler goes through: none below zero, from noise to image.

    The timesteps of a batch, of which a call may be given one, are told from that where they do not fall at all.
    """
    falling = all(a >= b for a, b in itertools.pairwise(timesteps))
    return falling and timesteps[0] > timesteps[-1] and all(0 <= t < _LARGEST for t in timesteps)
