"""What every option of every step does to the final latent, measured around a schedule on its own trajectories.

Around a schedule S, step t is taken by another option and the rest of the run by S again. The final latent then differs
from the teacher's by E_S + d_(t, option), with all that ran before t and all that comes after it in the measurement.
Several exchanges together are taken to add up: the error of another schedule is E_S + Σ_t d_t, whose mean square over
the runs is what `switch_search` makes small.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from asdm_compress.core.files import CACHE_HINT, output_file
from asdm_compress.core.provenance import content_hash
from asdm_compress.inheritance.actions import Action
from asdm_compress.inheritance.forecast import combine, weights
from asdm_compress.inheritance.members import HasMembers, body_prediction, member_of
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.timeline import Timeline, distinct
from asdm_compress.models.call import UNetCall
from asdm_compress.sampling.run import SamplingRun
from asdm_compress.sampling.settings import SamplingSettings, encode
from asdm_compress.scheduling.timing import Loop

VERSION = 1  # to be raised when the meaning of a kept measurement changes
Progress = Callable[[int, int], None]
Values = npt.NDArray[np.float32]


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


@dataclass
class _Chosen:
    """Stands in for the UNet of a run: asks the member whose step it is, or forecasts from what was computed.

    Rows are branch by branch for each image, which no member minds.
    """

    unet: UNet2DConditionModel
    timeline: Timeline
    action: Action = field(default_factory=Action)
    step: int = 0
    computed: dict[int, Tensor] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype  # type: ignore[no-any-return]

    def fork(self) -> _Chosen:
        twin = copy.copy(self)
        twin.computed = dict(self.computed)
        return twin

    def __call__(self, sample: Tensor, timesteps: Tensor, texts: Tensor, /, *, return_dict: bool) -> tuple[Tensor, ...]:
        assert not return_dict
        if self.action.skips and self.computed:
            forecast = self.action.inherits[0].forecast
            steps = distinct(list(self.computed), self.timeline, forecast.abscissa, forecast.order + 1)
            at = [self.timeline.at(step, forecast.abscissa) for step in steps]
            factors = weights(at, self.timeline.at(self.step, forecast.abscissa), forecast.damping)
            prediction = combine([self.computed[step] for step in steps], factors)
        else:
            call = UNetCall(sample, timesteps, texts)
            unet = member_of(self.unet, self.action.member)
            if unet is self.unet and isinstance(unet, HasMembers):
                prediction = body_prediction(unet, call.arguments())
            else:
                prediction = unet(**call.arguments(), return_dict=False)[0]
            self.computed = dict(list(self.computed.items())[-3:]) | {self.step: prediction}
        self.step += 1
        return (prediction,)


class _Run:
    """A batch of runs that follow a schedule, and can be forked."""

    def __init__(
        self, pipeline: StableDiffusionPipeline, timeline: Timeline, texts: Tensor, settings: SamplingSettings
    ) -> None:
        self.chosen = _Chosen(pipeline.unet, timeline)
        self.run = SamplingRun(pipeline, texts, settings, self.chosen)

    def fork(self) -> _Run:
        twin = copy.copy(self)
        twin.run, twin.chosen = self.run.fork(), self.chosen.fork()
        twin.run.unet = twin.chosen
        return twin

    def advance(self, action: Action) -> None:
        self.chosen.action = action
        self.run.advance()

    def finish(self, actions: Sequence[Action]) -> Values:
        for action in actions[self.run.step :]:
            self.advance(action)
        return np.asarray(self.run.latents.float().flatten(1).cpu().numpy())


@dataclass(frozen=True)
class Bench:
    """Prompts, seeds and a sampler on which schedules of a pipeline's switched UNet are tried.

    Measurements are kept in `folder`, if there is one, so that a run that was cut off goes on where it was. With
    `whole_runs` schedules run as they do in a pipeline, features inherited, and every exchange costs a whole run.
    """

    pipeline: StableDiffusionPipeline
    timeline: Timeline
    prompts: tuple[str, ...]
    settings: SamplingSettings
    folder: Path | None = None
    batch: int = 8
    whole_runs: bool = False

    @torch.no_grad()
    def final_latents(self, actions: Sequence[Action]) -> Values:
        """The final latents of a schedule, (N, D)."""
        return np.concatenate([self._end(rows, actions) for rows in self._batches()])

    def _end(self, rows: slice, actions: Sequence[Action]) -> Values:
        if not self.whole_runs:
            return self._run(rows).finish(actions)
        texts = encode(self.pipeline, self.prompts[rows], self.settings.guidance)
        here = replace(self.settings, seed=self.settings.seed + rows.start)
        latents = Loop(self.pipeline, texts, here, Schedule(tuple(actions)))()
        return np.asarray(latents.float().flatten(1).cpu().numpy())

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
            key = {"version": VERSION, "schedule": _names(schedule), "options": _names(options), "rows": str(rows)}
            key["whole_runs"] = self.whole_runs
            path = self.folder / f"swaps-{content_hash(key)}.safetensors" if self.folder else None
            found = _read(path, pairs)
            if found is None:
                found = self._around(rows, schedule, pairs, progress)
                _write(path, found)
            ends.append(found[0])
            moved.append(found[1])
        together = {pair: np.concatenate([part[pair] for part in moved]) for pair in pairs}
        return Swaps(schedule, np.concatenate(ends) - truth, together)

    def _around(
        self,
        rows: slice,
        schedule: tuple[Action, ...],
        pairs: Sequence[tuple[int, Action]],
        progress: Progress | None,
    ) -> tuple[Values, dict[tuple[int, Action], Values]]:
        """The schedule's own final latents of a batch, and by what each exchange moves them."""
        total = len(schedule) * len(self.prompts)
        if self.whole_runs:
            own, moves = self._end(rows, schedule), {}
            for t, option in pairs:
                moves[t, option] = self._end(rows, (*schedule[:t], option, *schedule[t + 1 :])) - own
                if progress:
                    progress(rows.start * len(schedule) + (t + 1) * (rows.stop - rows.start), total)
            return own, moves
        run = self._run(rows)
        ends: dict[tuple[int, Action], Values] = {}
        for t, action in enumerate(schedule):
            for step, option in pairs:
                if step == t:
                    fork = run.fork()
                    fork.advance(option)
                    ends[t, option] = fork.finish(schedule)
            run.advance(action)
            if progress:
                progress(rows.start * len(schedule) + (t + 1) * (rows.stop - rows.start), total)
        end = run.finish(schedule)
        return end, {pair: values - end for pair, values in ends.items()}

    def _batches(self) -> list[slice]:
        count = len(self.prompts)
        return [slice(first, min(first + self.batch, count)) for first in range(0, count, self.batch)]

    def _run(self, rows: slice) -> _Run:
        texts = encode(self.pipeline, self.prompts[rows], self.settings.guidance)
        here = replace(self.settings, seed=self.settings.seed + rows.start)
        return _Run(self.pipeline, self.timeline, texts, here)


def _names(actions: Sequence[Action]) -> list[str]:
    return [action.name for action in actions]


def _read(
    path: Path | None, pairs: Sequence[tuple[int, Action]]
) -> tuple[Values, dict[tuple[int, Action], Values]] | None:
    if path is None or not path.exists():
        return None
    try:
        kept = load_file(path)
        return kept["end"], {(t, option): kept[f"{t}/{option.name}"] for t, option in pairs}
    except (SafetensorError, KeyError):
        return None


def _write(path: Path | None, found: tuple[Values, Mapping[tuple[int, Action], Values]]) -> None:
    if path is not None:
        end, moved = found
        tensors = {"end": end, **{f"{t}/{option.name}": values for (t, option), values in moved.items()}}
        with output_file(path, CACHE_HINT) as aside:
            save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, aside)
