"""Everything that is measured on a model before its schedules can be searched, kept on disk by content."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from diffusers import StableDiffusionPipeline

from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import CACHE_HINT, output_file
from asdm_compress.core.provenance import content_hash
from asdm_compress.inheritance.costs import program_macs
from asdm_compress.inheritance.program import program_of
from asdm_compress.inheritance.timeline import Timeline, timeline_of
from asdm_compress.profiling.counting import count
from asdm_compress.sampling.run import check_one_evaluation_per_step
from asdm_compress.sampling.settings import SamplingSettings, encode, initial_latents
from asdm_compress.scheduling.gains import measure_gains
from asdm_compress.scheduling.menu import WHOLE, Kind, Menu, default_forecasts, default_lights, light_name, menu_of
from asdm_compress.scheduling.responses import REACH, SHARE, Responses, measure_responses
from asdm_compress.scheduling.surrogate import Surrogate

# To be raised when the meaning of a kept measurement changes.
VERSION: Final = 2
LARGEST_SHARE: Final = 0.8  # of the MACs: what saves less is not measured
SMALLEST_GAP: Final = 0.04  # between two cuts' shares of the MACs
GAIN_PROMPTS: Final = 4

Progress = Callable[[int, int], None]


def check_inheritable(steps: int) -> None:
    """Raise AsdmError for a run of one step."""
    if steps < 2:
        raise AsdmError("a run of one sampling step has nothing to inherit", "Calibrate at least 2 steps.")


def sampler_timeline(pipeline: StableDiffusionPipeline, steps: int) -> Timeline:
    """The evaluations of a run; raises AsdmError for one step, and for samplers that evaluate more than once a step."""
    check_inheritable(steps)
    check_one_evaluation_per_step(pipeline.scheduler, steps)
    # Copied: from its config diffusers would not take over what a pipeline has corrected in it, such as `steps_offset`.
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(steps)
    return timeline_of(scheduler)


@dataclass(frozen=True, slots=True)
class Menus:
    """All light actions of a model with their shares of the MACs, and the numbers of those that are measured."""

    every: Menu
    shares: tuple[float, ...]
    chosen: tuple[int, ...]

    @property
    def menu(self) -> Menu:
        """Of what is measured."""
        return self.every.only(self.chosen)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What is to be timed: of light actions that are not measured only what regular schedules are made of."""
        return tuple(kind for kind in self.every.kinds() if kind[0] in (WHOLE, *self.chosen) or not kind[1])


def find_menus(pipeline: StableDiffusionPipeline, settings: SamplingSettings, timeline: Timeline) -> Menus:
    """A model's light actions: all, and a few of different costs; the choice depends on counts alone, not on time."""
    unet, guided = pipeline.unet, settings.guidance > 1
    every = menu_of(unet, default_lights(unet, timeline), default_forecasts(timeline), guided)
    latents = initial_latents(pipeline, 1, settings)
    tokens = int(pipeline.tokenizer.model_max_length)
    counts = count(unet, 2 if guided else 1, latents.shape[2], latents.shape[3], tokens)
    whole = program_macs(program_of(every.graph), counts)
    shares = tuple(program_macs(program, counts) / whole for program in every.programs)
    chosen: list[int] = []
    for light in sorted(range(len(shares)), key=lambda i: shares[i]):
        # Of cuts the next one does nearly the same; other actions are of another kind.
        near = [shares[light] - shares[other] for other in chosen if _are_cuts(every, light, other)]
        if shares[light] <= LARGEST_SHARE and all(gap >= SMALLEST_GAP for gap in near):
            chosen.append(light)
    return Menus(every, shares, tuple(sorted(chosen)))


def _are_cuts(menu: Menu, *lights: int) -> bool:
    return all(light_name(menu, light).startswith("cut.") for light in lights)


def measure_surrogate(
    pipeline: StableDiffusionPipeline,
    menu: Menu,
    timeline: Timeline,
    prompts: Sequence[str],
    settings: SamplingSettings,
    folder: Path,
    batch: int = 8,
    progress: Progress | None = None,
) -> Surrogate:
    """The surrogate of a menu on a model's own trajectories. What is in `folder` already is not measured again."""
    lights = [action.name for action in menu.lights]
    place = folder / content_hash({"version": VERSION, "lights": lights, "reach": REACH, "share": SHARE})
    responses: Responses = measure_responses(pipeline, menu, timeline, prompts, settings, place, batch, progress)
    gains = _kept_gains(place / "gains.json", pipeline, prompts[:GAIN_PROMPTS], settings, progress)
    return Surrogate(menu, responses, gains, timeline, settings.guidance)


def _kept_gains(
    path: Path,
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    settings: SamplingSettings,
    progress: Progress | None,
) -> npt.NDArray[np.float64]:
    if path.exists():
        try:
            return np.array(json.loads(path.read_text(encoding="utf-8")), dtype=np.float64)
        except ValueError:
            pass
    found = measure_gains(pipeline, encode(pipeline, prompts, settings.guidance), settings, progress)
    with output_file(path, CACHE_HINT) as aside:
        aside.write_text(json.dumps(found.tolist()), encoding="utf-8")
    return found
