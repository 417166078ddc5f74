"""The teacher's states on the moments that plans are fitted to."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from asdm_compress.assembly.calibration import Calibration
from asdm_compress.assembly.damage import chunks_of
from asdm_compress.assembly.regression import memory_of
from asdm_compress.models.walk import State, start, steps_of, take


class TeacherRuns:
    """The state behind every step of the teacher, of every chunk of a calibration, computed when it is asked for.

    Those that are `kept` serve any number of plans that are fitted to the same moments; else there is the newest alone,
    and what is asked for only goes forward.
    """

    def __init__(self, unet: UNet2DConditionModel, calibration: Calibration, kept: bool = False) -> None:
        self.calibration, self.steps, self.kept = calibration, steps_of(unet), kept
        rows = (calibration.part(*chunk).rows() for chunk in chunks_of(calibration))
        self._states = [{0: start(unet, *some)} for some in rows]

    @classmethod
    def kept_within(cls, unet: UNet2DConditionModel, calibration: Calibration, share: float) -> TeacherRuns | None:
        """Kept ones where they take at most a share of the memory, else None."""
        needed = len(calibration) * _bytes_of_one(unet, calibration)
        return cls(unet, calibration, kept=True) if needed <= share * memory_of(unet.device) else None

    @torch.no_grad()
    def state(self, chunk: int, steps: int) -> State:
        """The state of a chunk behind so many steps."""
        states = self._states[chunk]
        at = max(states)
        while at < steps:
            newest = take(self.steps[at], states[at])
            if not self.kept:
                del states[at]
            at += 1
            states[at] = newest
        return states[steps]


@torch.no_grad()
def _bytes_of_one(unet: UNet2DConditionModel, calibration: Calibration) -> int:
    """What the states of one moment take; most skip connections are hidden states too."""
    state = start(unet, *calibration.part(0, 1).rows())
    held: dict[int, Tensor] = {}
    for step in steps_of(unet):
        state = take(step, state)
        held |= {id(x): x for x in (state.hidden, *state.skips)}  # which live as long, so that no number comes twice
    return sum(x.nbytes for x in held.values())
