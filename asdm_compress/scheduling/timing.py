"""What every kind of step costs: measured seconds in the sampling loop itself, the sampler's own work included."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean, median
from typing import Any, Final

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from asdm_compress.inheritance.actions import FULL, Action
from asdm_compress.inheritance.attach import enable
from asdm_compress.inheritance.corrections import Correction, CorrectionKey
from asdm_compress.inheritance.schedule import Rule, Schedule
from asdm_compress.inheritance.shapes import value_shapes
from asdm_compress.models.loading import with_parts
from asdm_compress.profiling.latency import FEWEST_REPEATS, clock_for, time_side_by_side
from asdm_compress.sampling.settings import SamplingSettings, initial_latents, step_generators
from asdm_compress.scheduling.menu import (
    EVERYTHING,
    WHOLE,
    Choice,
    Kind,
    Menu,
    cut_sources,
    with_corrections,
)

REPEATS: Final = 9
LOOP: Final = 7  # steps of a timed loop
BETWEEN: Final = 6  # loops of light steps between two that compute everything
# Seconds after which kinds of steps are no longer timed. There are dozens of loops, and of too few turns none may be
# undisturbed for one of them, on which then every predicted time is wrong.
PATIENCE: Final = 120.0
LEAST: Final = 1e-3  # of the base's time, where a difference drowns in noise
_BEFORE: Final = 3  # of them that compute everything, so that there is something to forecast from


@dataclass(frozen=True, slots=True)
class KindTimes:
    """Seconds of every kind of step in a run of `steps`, and what a run costs beside its steps.

    Kinds are those of a menu of these `lights`. `fitted` are the seconds of the kinds that inherit a cut when fitted
    corrections are added to it.
    """

    seconds: Mapping[Kind, float]
    outside: float
    steps: int
    lights: tuple[Action, ...]
    fitted: Mapping[Kind, float] = field(default_factory=dict)

    @property
    def full_step(self) -> float:
        """Seconds of a step that computes everything."""
        return self.seconds[EVERYTHING.kind]

    @property
    def full_run(self) -> float:
        """Seconds of a run that computes everything."""
        return self.outside + self.steps * self.full_step

    def run(self, choices: Sequence[Choice]) -> float:
        """Seconds of a run by a schedule."""
        return self.outside + sum(self.seconds[choice.kind] for choice in choices)

    def share(self, choices: Sequence[Choice]) -> float:
        """A schedule's time over that of computing everything."""
        return self.run(choices) / self.full_run

    def only(self, lights: Sequence[int]) -> KindTimes:
        """The times of `Menu.only` of the same light actions."""
        numbers = {WHOLE: WHOLE, **{light: i for i, light in enumerate(lights)}}

        def kept(some: Mapping[Kind, float]) -> dict[Kind, float]:
            return {(numbers[k[0]], k[1]): seconds for k, seconds in some.items() if k[0] in numbers}

        left = tuple(self.lights[light] for light in lights)
        return KindTimes(kept(self.seconds), self.outside, self.steps, left, kept(self.fitted))

    def corrected(self) -> KindTimes:
        """The times of schedules whose every cut is corrected."""
        # What is left out of a search has its time here and not there.
        slower = {kind: max(seconds, self.seconds[kind]) for kind, seconds in self.fitted.items()}
        return replace(self, seconds={**self.seconds, **slower})

    def fewer_steps(self, share: float) -> int:
        """The most steps that compute everything within a share of the time."""
        return int((share * self.full_run * (1 + 1e-9) - self.outside) / self.full_step)


class Loop:
    """The sampling loop of a pipeline on given text embeddings and noise, under a rule or plain, without the decoder.

    A pipeline of its own on shared modules, so that many loops can be timed in turns. `texts` are (N, branches,
    tokens, width).
    """

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        texts: Tensor,
        settings: SamplingSettings,
        rule: Rule | None = None,
        scheduler: Any = None,
    ) -> None:
        own = copy.deepcopy(pipeline.scheduler if scheduler is None else scheduler)
        self.pipeline = with_parts(pipeline, scheduler=own)
        self.pipeline.set_progress_bar_config(disable=True)
        if rule is not None:
            enable(self.pipeline, rule)
        self.texts, self.settings = texts, settings
        self.noise = initial_latents(pipeline, len(texts), settings)

    def __call__(self, on_step: Callable[..., dict[str, Any]] | None = None) -> Tensor:
        """The final latents (N, C, H, W)."""
        size = self.settings.image_size
        found: Tensor = self.pipeline(
            prompt_embeds=self.texts[:, -1],
            negative_prompt_embeds=self.texts[:, 0] if self.texts.shape[1] == 2 else None,
            latents=self.noise,
            num_inference_steps=self.settings.steps,
            guidance_scale=self.settings.guidance,
            height=size,
            width=size,
            generator=step_generators(self.pipeline, len(self.texts), self.settings),
            output_type="latent",
            callback_on_step_end=on_step,
        ).images
        return found


@torch.no_grad()
def time_kinds(
    pipeline: StableDiffusionPipeline,
    menu: Menu,
    kinds: Sequence[Kind],
    texts: Tensor,
    settings: SamplingSettings,
    repeats: int = REPEATS,
    corrections: bool = True,
) -> KindTimes:
    """Time loops of a few steps of each of a menu's kinds in turns, for one batch of images, one per row of `texts`.

    In one thread of the processor seconds are its own, which do not pass while other programs have the core.

    A loop is three steps that compute everything and some of the kind, which are told in the time of these. Cuts are
    timed with `corrections` too, whose values do not matter for that; a step that leaves a guidance branch out is taken
    to pay as much for them as one that does not, though it has half the rows.
    """
    here = SamplingSettings(LOOP, settings.guidance, settings.seed, settings.image_size)

    def loop(action: Action, added: Mapping[CorrectionKey, Correction] | None = None) -> Loop:
        # What a step that computes everything keeps for others costs time too.
        actions = [FULL] * _BEFORE + [action] * (LOOP - _BEFORE)
        rule = Schedule(tuple(actions), added or {})
        return Loop(pipeline, texts, here, None if action == FULL else rule)

    maps = _empty_corrections(pipeline, menu, settings) if corrections else {}
    fitted = [kind for kind in kinds if kind[0] in maps and not kind[1]]
    plain, light = loop(FULL), [kind for kind in kinds if kind != EVERYTHING.kind]
    loops = [loop(menu.example(kind)) for kind in light]
    for kind in fitted:
        name, correction = maps[kind[0]]
        (action,) = with_corrections([menu.example(kind)])
        loops.append(loop(action, {(step, name): correction for step in range(_BEFORE, LOOP)}))
    runs, of_loops = _time_steps(plain, loops, repeats)
    full = median(seconds for run in runs for seconds in run[1:-1])
    outside = max(median(run[0] - full + run[-1] for run in runs), 0.0)
    keeping = median([seconds for of_loop in of_loops for run in of_loop for seconds in run[1:_BEFORE]] or [full])
    # What a full step keeps for light ones is put on these.
    more = max(keeping - full, 0.0) * _BEFORE / (LOOP - _BEFORE)
    each = [max(keeping * median(map(_beside_full, of_loop)) + more, LEAST * full) for of_loop in of_loops]
    found = {EVERYTHING.kind: full, **dict(zip(light, each, strict=False))}
    extra = {kind[0]: max(seconds - found[kind], 0.0) for kind, seconds in zip(fitted, each[len(light) :], strict=True)}
    with_maps = {kind: found[kind] + extra[kind[0]] for kind in kinds if kind[0] in extra}
    return KindTimes(found, outside, settings.steps, menu.lights, with_maps)


def _beside_full(run: Sequence[float]) -> float:
    """What the light steps of a loop take over its full ones: a slow moment of the machine meets both."""
    return fmean(run[_BEFORE:-1]) / fmean(run[1:_BEFORE])


def _time_steps(plain: Loop, loops: Sequence[Loop], repeats: int) -> tuple[list[list[float]], list[list[list[float]]]]:
    """By turn the seconds of every step of the plain loop, and by loop and turn of the others.

    The first of a run have in them what comes before it, the last are those after its last step. The plain loop is
    run again after every few others, so that it meets the same moments.
    """
    device = plain.pipeline.device
    clock = clock_for(device, undisturbed=True)

    def once(loop: Loop) -> list[float]:
        clock.synchronise()
        marks = [clock.mark()]

        def mark(*_: Any) -> dict[str, Any]:
            marks.append(clock.mark())
            return {}

        loop(mark)
        marks.append(clock.mark())
        clock.synchronise()
        return [clock.between(a, b) for a, b in pairwise(marks)]

    runs: list[list[float]] = []
    of_loops: list[list[list[float]]] = [[] for _ in loops]
    for loop in (plain, *loops):  # warming up
        once(loop)
    began = time.perf_counter()
    for turn in range(repeats):
        if turn >= FEWEST_REPEATS and time.perf_counter() - began > PATIENCE:
            break
        for number, loop in enumerate(loops):
            if number % BETWEEN == 0:
                runs.append(once(plain))
            of_loops[number].append(once(loop))
        runs.append(once(plain))
    return runs, of_loops


def _empty_corrections(
    pipeline: StableDiffusionPipeline, menu: Menu, settings: SamplingSettings
) -> dict[int, tuple[str, Correction]]:
    """For every light action that is a cut, by number, the cut's name and a correction of nothing."""
    cuts = {i: light.inherits[0].place for i, light in enumerate(menu.lights) if len(light.inherits) == 1}
    sources = cut_sources(pipeline.unet)
    cuts = {i: name for i, name in cuts.items() if name in sources}
    size = initial_latents(pipeline, 1, settings).shape
    named = {*cuts.values(), *(sources[name] for name in cuts.values())}
    shapes = value_shapes(pipeline.unet, named, size[2], size[3])
    found = {}
    for light, name in cuts.items():
        channels, seen = shapes[name][0], shapes[sources[name]][0]
        weight = torch.zeros(channels, 2 * seen + channels, device=pipeline.device, dtype=pipeline.unet.dtype)
        found[light] = (name, Correction(weight, weight.new_zeros(channels)))
    return found


def time_runs(loops: Sequence[Loop], repeats: int = REPEATS) -> list[list[float]]:
    """Seconds of whole runs, taken in turns so that a slow moment of the machine meets all of them.

    In one thread of the processor they are its own seconds, as for kinds of steps.
    """
    return time_side_by_side(loops, repeats, loops[0].pipeline.device, undisturbed=True)
