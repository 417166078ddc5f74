"""What every option of every step does to the final latent, measured around a schedule on its own trajectories.

Around a schedule S, step t is taken by another option and the rest of the run by S again. The final latent then differs
from the teacher's by E_S + d_(t, option), with all that ran before t and all that comes after it in the measurement.
Several exchanges together are taken to add up: the error of another schedule is E_S + Σ_t d_t, whose mean square over
the runs is what `switch_search` makes small.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from asdm_compress.core.files import CACHE_HINT, output_file
from asdm_compress.core.provenance import content_hash
from asdm_compress.inheritance.actions import Action
from asdm_compress.inheritance.evaluator import Evaluator
from asdm_compress.inheritance.run import Run
from asdm_compress.inheritance.run_plan import RunPlan
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.timeline import Timeline
from asdm_compress.sampling.images import check_latents
from asdm_compress.sampling.run import SamplingRun
from asdm_compress.sampling.settings import SamplingSettings, encode
from asdm_compress.scheduling.guided_unet import GuidedUNet
from asdm_compress.scheduling.timing import Loop

VERSION = 2  # to be raised when the meaning of a kept measurement changes
Progress = Callable[[int, int], None]
Values = npt.NDArray[np.float32]
_OWN: Final = "schedule"  # in a file, its own final latents

NEAR = 4  # steps back that something inherited may come from: further away it is not what was measured


@dataclass(frozen=True, slots=True)
class Need:
    """What an action needs of one of the last `within` steps: that it was not skipped, that both guidance branches were
    computed, or that a member computed everything."""

    within: int
    what: Literal["computed", "both branches", "whole"]
    member: str | None = None

    def met_by(self, other: Action) -> bool:
        """Whether an earlier step's action is that."""
        if self.what == "whole":
            return other.is_whole and other.member == self.member
        return not other.skips and (self.what == "computed" or other.guidance is None)


def needs_of(action: Action) -> tuple[Need, ...]:
    """What has to come before an action for it to be carried out as it was measured."""
    if action.skips:
        return (Need(1, "computed"),)
    found = [Need(NEAR, "both branches")] if action.guidance is not None else []
    return (*found, Need(NEAR, "whole", action.member)) if action.inherits else tuple(found)


def is_possible(actions: Sequence[Action]) -> bool:
    """Whether every step of a schedule has before it what it needs."""
    return all(
        any(need.met_by(other) for other in actions[max(0, t - need.within) : t])
        for t, action in enumerate(actions)
        for need in needs_of(action)
    )


@dataclass(frozen=True)
class Swaps:
    """Final latents of N runs of D values: `error` (N, D), that of the schedule itself against the teacher's, and
    `moved[t, option]` (N, D), by what the option moves it when it takes step t; the schedule's own options do not."""

    schedule: tuple[Action, ...]
    error: Values
    moved: Mapping[tuple[int, Action], Values]

    def predicted(self, actions: Sequence[Action]) -> float:
        """The mean squared error of the final latents' values under another schedule, to first order."""
        return _mean_square(self.error + sum(self.moved[pair] for pair in enumerate(actions) if pair in self.moved))

    @property
    def measured(self) -> float:
        """The same of the schedule itself, as it is."""
        return _mean_square(self.error)


def _mean_square(values: Values | float) -> float:
    return float(np.square(np.asarray(values, dtype=np.float64)).mean())


class _Runs:
    """A batch of runs that follow a schedule, and can be forked."""

    def __init__(self, pipeline: StableDiffusionPipeline, texts: Tensor, settings: SamplingSettings, run: Run) -> None:
        self.run, self.dtype, self.branches = run, pipeline.unet.dtype, texts.shape[1]
        self.sampling = SamplingRun(pipeline, texts, settings, GuidedUNet(self.dtype, self.branches, run.evaluate))

    def branch(self, plan: RunPlan) -> _Runs:
        """Runs that go on from here by another plan."""
        twin = copy.copy(self)
        twin.run, twin.sampling = self.run.branch(plan), self.sampling.fork()
        twin.sampling.unet = GuidedUNet(self.dtype, self.branches, twin.run.evaluate)
        return twin

    def end(self) -> Values:
        """The final latents, (N, D)."""
        while not self.sampling.finished:
            self.sampling.advance()
        check_latents(self.sampling.latents, self.dtype)
        return np.asarray(self.sampling.latents.float().flatten(1).cpu().numpy())


@dataclass(frozen=True)
class Bench:
    """Prompts, seeds and a sampler on which schedules of a pipeline's switched UNet are tried.

    Measurements are kept in `folder`, if there is one, step by step, so that a run that was cut off goes on where it
    was, and other options of the same schedule only measure what is not known.
    """

    pipeline: StableDiffusionPipeline
    timeline: Timeline
    prompts: tuple[str, ...]
    settings: SamplingSettings
    folder: Path | None = None
    batch: int = 8

    @torch.no_grad()
    def final_latents(self, actions: Sequence[Action]) -> Values:
        """The final latents of a schedule, (N, D), as a pipeline samples them."""
        found = []
        for rows in self._batches():
            latents = Loop(self.pipeline, self._texts(rows), self._seeds(rows), Schedule(tuple(actions)))()
            found.append(np.asarray(latents.float().flatten(1).cpu().numpy()))
        return np.concatenate(found)

    @torch.no_grad()
    def measure(
        self,
        schedule: Sequence[Action],
        options: Sequence[Action],
        truth: Values,
        progress: Progress | None = None,
    ) -> Swaps:
        """Measure around a schedule; `truth` are the teacher's final latents.

        Exchanges are left out where what they need has not come before them.
        """
        schedule = tuple(schedule)
        pairs = [
            (t, option)
            for t in range(len(schedule))
            for option in options
            if option != schedule[t] and is_possible((*schedule[:t], option))
        ]
        ends: list[Values] = []
        moved: list[dict[tuple[int, Action], Values]] = []
        for rows in self._batches():
            end, others = self._around(rows, schedule, pairs, progress)
            ends.append(end)
            moved.append({pair: others[pair] - end for pair in pairs})
        together = {pair: np.concatenate([part[pair] for part in moved]) for pair in pairs}
        return Swaps(schedule, np.concatenate(ends) - truth, together)

    def _around(
        self,
        rows: slice,
        schedule: tuple[Action, ...],
        pairs: Sequence[tuple[int, Action]],
        progress: Progress | None,
    ) -> tuple[Values, dict[tuple[int, Action], Values]]:
        """The final latents of a batch under the schedule, and under every exchange."""
        kept = [_Kept(self._file(rows, schedule, step)) for step in range(len(schedule) + 1)]
        known = {(t, o): kept[t].values[o.name] for t, o in pairs if o.name in kept[t].values}
        missing, own = [pair for pair in pairs if pair not in known], kept[-1].values.get(_OWN)
        if own is not None and not missing:
            return own, known
        evaluator, texts = Evaluator(self.pipeline.unet), self._texts(rows)
        guided = texts.shape[1] == 2
        whole, forks = evaluator.plan_forks(schedule, missing, self.timeline, guided)
        run = Run(evaluator, schedule, self.timeline, guided).branch(whole)
        runs = _Runs(self.pipeline, texts, self._seeds(rows), run)
        for t in range(len(schedule)):
            here = {option: runs.branch(forks[t, option]).end() for step, option in missing if step == t}
            known |= {(t, option): end for option, end in here.items()}
            kept[t].add({option.name: end for option, end in here.items()})
            runs.sampling.advance()
            if progress:
                done = rows.start * len(schedule) + (t + 1) * (rows.stop - rows.start)
                progress(done, len(schedule) * len(self.prompts))
        own = runs.end()
        kept[-1].add({_OWN: own})
        return own, known

    def _file(self, rows: slice, schedule: Sequence[Action], step: int) -> Path | None:
        key = {"version": VERSION, "schedule": [action.name for action in schedule], "step": step, "rows": str(rows)}
        return self.folder / f"swaps-{content_hash(key)}.safetensors" if self.folder else None

    def _batches(self) -> list[slice]:
        count = len(self.prompts)
        return [slice(first, min(first + self.batch, count)) for first in range(0, count, self.batch)]

    def _texts(self, rows: slice) -> Tensor:
        return encode(self.pipeline, self.prompts[rows], self.settings.guidance)

    def _seeds(self, rows: slice) -> SamplingSettings:
        return replace(self.settings, seed=self.settings.seed + rows.start)


class _Kept:
    """Final latents by name, in a file, if there is one; a file that cannot be read is as none."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.values = path, dict[str, Values]()
        if path is not None and path.exists():
            with suppress(SafetensorError):
                self.values = load_file(path)

    def add(self, found: Mapping[str, Values]) -> None:
        """Keep some more."""
        self.values |= found
        if self.path is not None and found:
            with output_file(self.path, CACHE_HINT) as aside:
                save_file({name: np.ascontiguousarray(values) for name, values in self.values.items()}, aside)
