"""Damage: how far an edit moves the noise prediction, measured on the teacher's own trajectories, per timestep band."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from asdm_compress.assembly.calibration import Calibration
from asdm_compress.assembly.options import Option
from asdm_compress.assembly.plan import Plan, edited
from asdm_compress.core.files import CACHE_HINT, disk_errors
from asdm_compress.models.walk import State, Step, finish, shared_prefix, start, steps_of, take
from asdm_compress.sampling.run import GuidedInputs

Progress = Callable[[int, int], None]
CHUNK = 16  # triples at a time: bounds the memory of the kept activations


@dataclass(frozen=True, slots=True)
class Damage:
    """The relative squared error of the guided noise prediction, E‖ε_edit - ε‖² / E‖ε‖², per band and overall.

    `total` weights the bands by what an error there does to the final latent.
    """

    bands: tuple[float, ...]
    total: float


@torch.no_grad()
def measure_damages(
    unet: UNet2DConditionModel,
    options: Sequence[Option],
    calibration: Calibration,
    store: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Damage]:
    """The one-shot damage of every option by name.

    The teacher's activations are kept before every unit, and each edited pass starts at the edit, so that an edit costs
    about half a forward pass. With a `store`, finished chunks of triples are kept there and not measured again, also
    after a kill.
    """
    names = [o.name for o in options]
    count = len(calibration)
    chunks = [(i, min(i + CHUNK, count)) for i in range(0, count, CHUNK)]
    known = _read_store(store, names)
    report = progress or (lambda done, total: None)
    total = len(chunks) * len(options)
    teacher_steps = steps_of(unet)
    students = {o.name: steps_of(edited(unet, o.plan)) for o in options}
    for number, (first, last) in enumerate(chunks):
        if number in known:
            report((number + 1) * len(options), total)
            continue
        part = calibration.part(first, last)
        states, reference = _teacher_pass(unet, teacher_steps, part)
        record: dict[str, Any] = {"energy": _squares(reference), "errors": {}}
        for i, name in enumerate(names):
            steps = students[name]
            begin = shared_prefix(teacher_steps, steps)
            prediction = part.guided(finish(steps[begin:], states[begin]))
            record["errors"][name] = _squares(prediction - reference)
            report(number * len(options) + i + 1, total)
        known[number] = record
        _append_to_store(store, number, record)
    records = [known[number] for number in range(len(chunks))]
    energy = np.concatenate([r["energy"] for r in records])
    return {
        name: summarise(np.concatenate([r["errors"][name] for r in records]), energy, calibration) for name in names
    }


@torch.no_grad()
def measure_plan(unet: UNet2DConditionModel, plan: Plan, calibration: Calibration) -> Damage:
    """The damage of a whole plan."""
    return compare_predictions(unet, edited(unet, plan), calibration)


@torch.no_grad()
def compare_predictions(
    teacher: UNet2DConditionModel, student: UNet2DConditionModel, calibration: Calibration
) -> Damage:
    """The damage of any UNet that takes the same inputs as the teacher."""
    energy, errors = [], []
    for first in range(0, len(calibration), CHUNK):
        part = calibration.part(first, first + CHUNK)
        inputs = part.rows()
        reference = part.guided(teacher(*inputs, return_dict=False)[0])
        energy.append(_squares(reference))
        errors.append(_squares(part.guided(student(*inputs, return_dict=False)[0]) - reference))
    return summarise(np.concatenate(errors), np.concatenate(energy), calibration)


def summarise(errors: np.ndarray, energy: np.ndarray, calibration: Calibration) -> Damage:
    """Per-triple squared errors and energies (N,) to damages per band and their weighted sum."""
    bands = calibration.bands.numpy()
    per_band = tuple(
        float(errors[bands == band].sum() / energy[bands == band].sum())
        for band in range(len(calibration.band_weights))
    )
    return Damage(per_band, float(np.dot(calibration.band_weights, per_band)))


def _teacher_pass(
    unet: UNet2DConditionModel, steps: Sequence[Step], part: GuidedInputs
) -> tuple[list[State], torch.Tensor]:
    """The states before every step and after the last, and the guided prediction."""
    states = [start(unet, *part.rows())]
    for step in steps:
        states.append(take(step, states[-1]))
    return states, part.guided(states[-1].hidden)


def _squares(values: torch.Tensor) -> list[float]:
    result: list[float] = values.double().square().flatten(1).sum(dim=1).tolist()
    return result


def _read_store(store: Path | None, names: Sequence[str]) -> dict[int, dict[str, Any]]:
    """The finished chunks; a line that a kill left half-written, or that lacks an option, is measured again."""
    known: dict[int, dict[str, Any]] = {}
    if store is None or not store.exists():
        return known
    for line in store.read_text(encoding="utf-8").splitlines():
        try:
            record: Mapping[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue
        if all(name in record["errors"] for name in names):
            known[record["chunk"]] = dict(record)
    return known


def _append_to_store(store: Path | None, number: int, record: Mapping[str, Any]) -> None:
    if store is None:
        return
    with disk_errors(store, CACHE_HINT):
        store.parent.mkdir(parents=True, exist_ok=True)
        _append_line(store, json.dumps({"chunk": number, **record}))


def _append_line(store: Path, line: str) -> None:
    with store.open("a", encoding="utf-8") as file:
        # A line starts anew even behind one that a kill cut short.
        file.write("\n" + line + "\n")
        file.flush()
        os.fsync(file.fileno())
