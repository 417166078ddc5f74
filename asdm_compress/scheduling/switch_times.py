"""What a step of every member of a switched UNet costs, and a step that is skipped: seconds in the sampling loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from diffusers import StableDiffusionPipeline
from torch import Tensor

from asdm_compress.inheritance.actions import Action, skip
from asdm_compress.inheritance.forecast import LINEAR
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.profiling.latency import time_side_by_side
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scheduling.timing import LEAST, LOOP, PATIENCE, REPEATS, Loop

SKIP: Final = skip(LINEAR)
_BEFORE: Final = 2


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of every option of a step, and what a run costs beside its steps; the first option is the teacher's."""

    seconds: Mapping[Action, float]
    outside: float

    def run(self, actions: Sequence[Action]) -> float:
        """Seconds of a run."""
        return self.outside + sum(self.seconds[action] for action in actions)

    def full(self, steps: int) -> float:
        """Seconds of a run of the teacher alone."""
        return self.outside + steps * self.teacher

    @property
    def teacher(self) -> float:
        """Seconds of a step of the teacher."""
        return next(iter(self.seconds.values()))

    def as_json(self) -> dict[str, Any]:
        """For files."""
        return {"outside": self.outside, "steps": {action.name: value for action, value in self.seconds.items()}}


def time_options(
    pipeline: StableDiffusionPipeline,
    options: Sequence[Action],
    texts: Tensor,
    settings: SamplingSettings,
    repeats: int = REPEATS,
) -> StepTimes:
    """Time loops of a few steps of each option in turns, behind two whole ones of its member; `texts` are one batch's.

    The first option is the teacher's whole step.
    """
    here = replace(settings, steps=LOOP)
    before = replace(settings, steps=_BEFORE)
    wholes = tuple(dict.fromkeys(options[0] if option.skips else option.whole() for option in options))
    loops = [Loop(pipeline, texts, before, Schedule((whole,) * _BEFORE)) for whole in wholes]
    for option in options:
        start = options[0] if option.skips else option.whole()
        loops.append(Loop(pipeline, texts, here, Schedule((start,) * _BEFORE + (option,) * (LOOP - _BEFORE))))
    # On the clock of whole runs, with which what comes of these times is compared. Other work only ever adds time.
    turns = time_side_by_side(loops, repeats, pipeline.device, PATIENCE, undisturbed=True)
    samples = [min(seconds) for seconds in turns]
    bases, found = dict(zip(wholes, samples, strict=False)), {}
    for option, seconds in zip(options, samples[len(wholes) :], strict=True):
        base = bases[options[0] if option.skips else option.whole()]
        found[option] = max(seconds - base, LEAST * base) / (LOOP - _BEFORE)
    return StepTimes(found, max(bases[options[0]] - _BEFORE * found[options[0]], 0.0))
