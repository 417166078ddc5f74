"""Fits the corrections of a schedule in closed form, along the trajectory that the schedule itself takes.

At a step that inherits below a cut, the features that the cut joins are fresh, and the error of their own forecast
tells of the error of what is inherited (see `inheritance.corrections`). Step by step, with the corrections of all
earlier steps in force, the map is fitted by ridge regression over all calibration runs. Beside the rows of both
guidance branches their guided combination is a sample of its own, since that is what reaches the sampler.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from asdm_compress.assembly.regression import RIDGES, NormalEquations, best_ridges
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import CACHE_HINT, output_file
from asdm_compress.core.provenance import content_hash
from asdm_compress.inheritance.actions import Action
from asdm_compress.inheritance.corrections import Correction, CorrectionKey, regressors
from asdm_compress.inheritance.corrections_file import load_corrections, save_corrections
from asdm_compress.inheritance.evaluator import Evaluator
from asdm_compress.inheritance.places import Feature
from asdm_compress.inheritance.run import Inspection, Run
from asdm_compress.inheritance.timeline import Timeline
from asdm_compress.models.call import UNetCall
from asdm_compress.sampling.run import SamplingRun
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scheduling.guided_unet import GuidedUNet

# To be raised when the meaning of a kept fit changes.
VERSION: Final = 1
HELD_OUT: Final = 4  # one run of so many is held out from the fit and chooses its ridge
WORTH: Final = 0.98  # of the squared error on held-out runs: what leaves more is not worth its time

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Fit:
    """Corrections, and by step which share of the squared error of what is inherited they leave on held-out runs."""

    corrections: dict[CorrectionKey, Correction] = field(default_factory=dict)
    left: dict[int, float] = field(default_factory=dict)


def only_fitted(actions: Sequence[Action], fit: Fit) -> tuple[Action, ...]:
    """The actions with a correction only where there is one."""
    fitted = {(step, name) for step, name in fit.corrections}
    return tuple(
        replace(a, inherits=tuple(replace(e, corrected=e.corrected and (i, e.place) in fitted) for e in a.inherits))
        for i, a in enumerate(actions)
    )


@dataclass(frozen=True, slots=True)
class Fitter:
    """Fits schedules on the runs of `texts` (N, branches, tokens, width); what it found is kept in `folder`."""

    pipeline: StableDiffusionPipeline
    timeline: Timeline
    texts: Tensor
    settings: SamplingSettings
    folder: Path | None = None
    batch: int = 8

    def fit(self, actions: Sequence[Action], progress: Progress | None = None) -> Fit:
        """The corrections of `actions`, of which those that have `corrected` places are fitted."""
        key = content_hash({"version": VERSION, "actions": [action.name for action in actions]})
        path = self.folder / f"fit-{key}.safetensors" if self.folder else None
        kept = _read(path)
        if kept is not None:
            return kept
        found = _fit(self, tuple(actions), progress or (lambda done, total: None))
        if path is not None:
            save_corrections(found.corrections, path, CACHE_HINT)
            with output_file(path.with_suffix(".json"), CACHE_HINT) as aside:
                aside.write_text(json.dumps(found.left), encoding="utf-8")
        return found


@dataclass(frozen=True, slots=True)
class _Runs:
    """Some runs of the same schedule, at the same step, held-out ones or such as are fitted to."""

    run: Run
    sampling: SamplingRun
    held_out: bool

    def inspect(self) -> tuple[tuple[Inspection, ...], int]:
        """What the next step will inherit beside the truth, and how many halves the rows are made of."""
        found: list[tuple[Inspection, ...]] = []

        def look(call: UNetCall) -> Tensor:
            found.append(self.run.inspect(call))
            return call.sample

        aside = self.sampling.fork()
        aside.unet = GuidedUNet(self.sampling.unet.dtype, self.sampling.texts.shape[1], look)
        aside.advance()
        one_half = self.run.plan[self.run.step].conditional_only or self.sampling.texts.shape[1] == 1
        return found[0], 1 if one_half else 2


@torch.no_grad()
def _fit(fitter: Fitter, actions: tuple[Action, ...], progress: Progress) -> Fit:
    corrections: dict[CorrectionKey, Correction] = {}
    left: dict[int, float] = {}
    if not any(entry.corrected for action in actions for entry in action.inherits):
        return Fit()
    runs = list(_opened(fitter, actions, corrections))
    for step, action in enumerate(actions):
        if any(entry.corrected for entry in action.inherits):
            fits = _Fits(fitter.settings.guidance)
            for some in runs:
                fits.add(*some.inspect(), some.held_out)
            for feature, (correction, share) in fits.solved().items():
                corrections[step, feature.name] = correction
                left[step] = share
        for some in runs:
            some.sampling.advance()
        progress(step + 1, len(actions))
    return Fit(corrections, left)


def _opened(fitter: Fitter, actions: tuple[Action, ...], corrections: dict[CorrectionKey, Correction]) -> list[_Runs]:
    """Runs in batches of one kind: the last quarter of them chooses the ridge."""
    pipeline, count = fitter.pipeline, len(fitter.texts)
    evaluator, guided = Evaluator(pipeline.unet), fitter.texts.shape[1] == 2
    border = count - max(1, count // HELD_OUT)
    found = []
    for start, stop in ((0, border), (border, count)):
        for first in range(start, stop, fitter.batch):
            texts = fitter.texts[first : min(first + fitter.batch, stop)]
            run = Run(evaluator, actions, fitter.timeline, guided, corrections)
            here = replace(fitter.settings, seed=fitter.settings.seed + first)
            stand_in = GuidedUNet(pipeline.unet.dtype, texts.shape[1], run.evaluate)
            found.append(_Runs(run, SamplingRun(pipeline, texts, here, stand_in), start == border))
    return found


class _Fits:
    """The normal equations of all features of one step."""

    def __init__(self, guidance: float) -> None:
        self.guidance = guidance
        self.scales: dict[Feature, Tensor] = {}
        self.equations: dict[Feature, dict[bool, NormalEquations]] = {}

    def add(self, inspections: Sequence[Inspection], halves: int, held_out: bool) -> None:
        """Take in what a batch of runs is about to inherit."""
        for seen in inspections:
            if seen.source is None or seen.source_forecast is None or seen.source_last is None:
                continue
            given = regressors(seen.source, seen.source_forecast, seen.source_last, seen.last).float()
            error = (seen.truth - seen.forecast).float()
            if seen.feature not in self.equations:
                # Forecast errors are small beside values: on one scale the ridge would shrink them alone.
                self.scales[seen.feature] = given.square().mean((0, 2, 3)).sqrt().clamp(min=1e-6)
                sizes = (given.shape[1] + 1, error.shape[1])
                self.equations[seen.feature] = {kind: NormalEquations(*sizes, given.device) for kind in (True, False)}
            given = given / self.scales[seen.feature][:, None, None]
            equations = self.equations[seen.feature][held_out]
            equations.add(given, error, 1)
            if halves == 2:
                equations.add(self._combined(given), self._combined(error), 1)

    def _combined(self, rows: Tensor) -> Tensor:
        """The guided combination of the two halves."""
        without, prompt = rows.chunk(2)
        return without + self.guidance * (prompt - without)

    def solved(self) -> dict[Feature, tuple[Correction, float]]:
        """The corrections that are worth something on held-out runs, and the share of the error that they leave."""
        found = {}
        for feature, equations in self.equations.items():
            told, held = equations[False], equations[True]
            if not told.samples or not held.samples:
                continue
            energy = max(float(held.energy.sum()), 1e-30)

            def left(ridge: float, told: NormalEquations = told, held: NormalEquations = held) -> list[float]:
                return [float(held.error(told.solve(ridge)).sum())]

            best = RIDGES[best_ridges(left, 1)[0]]
            share = left(best)[0] / energy
            if share < WORTH:
                solved = told.plus(held).solve(best)
                weight = solved[:-1] / self.scales[feature][:, None].to(solved)
                found[feature] = (Correction(weight.T.float().contiguous(), solved[-1].float().contiguous()), share)
        return found


def _read(path: Path | None) -> Fit | None:
    """What is kept; None where it is not there or cannot be read, and then it is fitted anew."""
    if path is None or not path.exists() or not path.with_suffix(".json").exists():
        return None
    try:
        left = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return Fit(load_corrections(path), {int(step): float(share) for step, share in left.items()})
    except (AsdmError, ValueError):
        return None
