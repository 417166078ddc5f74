"""Damage: how far an edit moves the noise prediction, measured on the teacher's own trajectories, per timestep band."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from asdm_compress.assembly.calibration import Calibration
from asdm_compress.assembly.options import Option
from asdm_compress.assembly.plan import Plan, edited
from asdm_compress.core.files import CACHE_HINT, disk_errors
from asdm_compress.core.processes import ALONE, Processes, files_of_all
from asdm_compress.models.edits import SlotWeights
from asdm_compress.models.precision import true_fp32
from asdm_compress.models.walk import State, Step, finish, shared_prefix, start, steps_of, take
from asdm_compress.sampling.run import GuidedInputs

Progress = Callable[[int, int], None]
CHUNK = 16  # triples at a time: bounds the memory of the kept activations
SKETCH = 64  # numbers that stand for one triple's error
KEPT_EVERY = 30.0  # seconds: a kill loses no more of a chunk that takes long


@dataclass(frozen=True, slots=True)
class Damage:
    """The relative squared error of the guided noise prediction, E‖ε_edit - ε‖² / E‖ε‖², per band and overall.

    `total` weights the bands by what an error there does to the final latent. Where it was asked for, `sketch` is a
    random projection of all the errors, weighted alike: its squared norm is about `total`, and the scalar product of
    two sketches about that of two errors.
    """

    bands: tuple[float, ...]
    total: float
    sketch: np.ndarray | None = field(default=None, compare=False, repr=False)

    def interaction(self, other: Damage) -> float:
        """What two edits together damage above the sum of their own, as far as their errors simply add up.

        ‖a + b‖² = ‖a‖² + ‖b‖² + 2 a · b. Nothing where there are no sketches.
        """
        if self.sketch is None or other.sketch is None:
            return 0.0
        return 2 * float(self.sketch @ other.sketch)


@torch.no_grad()
@true_fp32()
def measure_damages(
    unet: UNet2DConditionModel,
    options: Sequence[Option],
    calibration: Calibration,
    store: Path | None = None,
    progress: Progress | None = None,
    slot_weights: Mapping[str, SlotWeights] | None = None,
    processes: Processes = ALONE,
    reuse: bool = True,
) -> dict[str, Damage]:
    """The one-shot damage of every option by name.

    The teacher's activations are kept before every unit, and each edited pass starts at the edit, so that an edit costs
    about half a forward pass; without `reuse` every pass starts at the input, with the same result. With a `store`,
    what is measured is kept there and not measured again, also after a kill. `slot_weights` are what the
    options bring along, by option. Of several processes each measures options of its own and keeps a file of its own.
    """
    names, given = [o.name for o in options], slot_weights or {}
    known = _read_store(store)
    report = progress or (lambda done, total: None)
    chunks = chunks_of(calibration)
    total = len(chunks) * len(options)
    teacher_steps = steps_of(unet)
    students = {o.name: steps_of(edited(unet, o.plan, given.get(o.name))) for o in options}
    for number, (first, last) in enumerate(chunks):
        kept = known.setdefault(number, _empty_record(None))
        missing = [name for name in names if name not in kept["errors"]]
        report((number + 1) * len(options) - len(missing), total)
        if not missing:
            continue
        part = calibration.part(first, last)
        states, reference = teacher_pass(unet, teacher_steps, part)
        kept["energy"] = _squares(reference)
        file = None if store is None else processes.file(store)
        record, since = _empty_record(kept["energy"]), time.monotonic()
        for i, name in enumerate(missing):
            steps = students[name]
            begin = shared_prefix(teacher_steps, steps) if reuse else 0
            prediction = part.guided(finish(steps[begin:], states[begin]))
            record["errors"][name] = _squares(prediction - reference)
            record["sketches"][name] = _as_text(sketch(prediction - reference))
            if i + 1 == len(missing) or time.monotonic() - since >= KEPT_EVERY:
                kept["errors"].update(record["errors"])
                kept["sketches"].update(record["sketches"])
                _append_to_store(file, number, record)
                record, since = _empty_record(kept["energy"]), time.monotonic()
            report((number + 1) * len(options) - len(missing) + i + 1, total)
    return _damages(names, known, calibration)


def known_damages(store: Path | None, options: Sequence[Option], calibration: Calibration) -> dict[str, Damage]:
    """The damages of those options that the store knows for every triple."""
    known = _read_store(store)
    records = [known.get(number, {"errors": {}}) for number in range(len(chunks_of(calibration)))]
    names = [o.name for o in options if all(o.name in record["errors"] for record in records)]
    return _damages(names, known, calibration)


def chunks_of(calibration: Calibration) -> list[tuple[int, int]]:
    """First and last (exclusive) triple of each part that is run at once."""
    return [(i, min(i + CHUNK, len(calibration))) for i in range(0, len(calibration), CHUNK)]


def _damages(names: Sequence[str], known: Mapping[int, Any], calibration: Calibration) -> dict[str, Damage]:
    if not names:
        return {}
    records = [known[number] for number in range(len(chunks_of(calibration)))]
    energy = np.concatenate([r["energy"] for r in records])
    bands = calibration.bands.numpy()
    of_band = np.array([energy[bands == band].sum() for band in range(len(calibration.band_weights))])
    scale = np.sqrt(_weights_there(calibration)[bands] / of_band[bands])[:, None]
    found = {}
    for name in names:
        errors = np.concatenate([r["errors"][name] for r in records])
        sketches = np.concatenate([_from_text(r["sketches"][name]) for r in records])
        found[name] = replace(summarise(errors, energy, calibration), sketch=(sketches * scale).ravel())
    return found


@torch.no_grad()
def measure_plan(
    unet: UNet2DConditionModel,
    plan: Plan,
    calibration: Calibration,
    slot_weights: SlotWeights | None = None,
    reference: torch.Tensor | None = None,
) -> Damage:
    """The damage of a whole plan. For several, `reference` (see `predictions`) spares the teacher's passes."""
    return compare_predictions(unet, edited(unet, plan, slot_weights), calibration, reference)


@torch.no_grad()
@true_fp32()
def compare_predictions(
    teacher: UNet2DConditionModel,
    student: UNet2DConditionModel,
    calibration: Calibration,
    reference: torch.Tensor | None = None,
) -> Damage:
    """The damage of any UNet that takes the same inputs as the teacher, whose predictions `reference` is if given."""
    energy, errors = [], []
    for first, last in chunks_of(calibration):
        part = calibration.part(first, last)
        expected = _predict(teacher, part) if reference is None else reference[first:last]
        energy.append(_squares(expected))
        errors.append(_squares(_predict(student, part) - expected))
    return summarise(np.concatenate(errors), np.concatenate(energy), calibration)


@torch.no_grad()
@true_fp32()
def predictions(unet: UNet2DConditionModel, calibration: Calibration) -> torch.Tensor:
    """The guided predictions for all moments, (N, C, H, W)."""
    return torch.cat([_predict(unet, calibration.part(first, last)) for first, last in chunks_of(calibration)])


def summarise(errors: np.ndarray, energy: np.ndarray, calibration: Calibration) -> Damage:
    """Per-triple squared errors and energies (N,) to damages per band and their weighted sum.

    A band without triples has no weight; its damage is taken to be that of the others.
    """
    bands = calibration.bands.numpy()
    weights = _weights_there(calibration)
    there = np.array([(bands == band).any() for band in range(len(weights))])
    per_band = [
        float(errors[bands == band].sum() / energy[bands == band].sum()) if there[band] else 0.0
        for band in range(len(weights))
    ]
    total = float(np.dot(weights, per_band))
    return Damage(tuple(one if known else total for one, known in zip(per_band, there, strict=True)), total)


def _weights_there(calibration: Calibration) -> np.ndarray:
    """The bands' weights, those of bands without triples given to the others."""
    weights = np.asarray(calibration.band_weights)
    there = np.isin(np.arange(len(weights)), calibration.bands.numpy())
    there_alone: np.ndarray = np.where(there, weights, 0.0) / weights[there].sum()
    return there_alone


def teacher_pass(
    unet: UNet2DConditionModel, steps: Sequence[Step], part: GuidedInputs
) -> tuple[list[State], torch.Tensor]:
    """The states before every step and after the last, and the guided prediction."""
    states = [start(unet, *part.rows())]
    for step in steps:
        states.append(take(step, states[-1]))
    return states, part.guided(states[-1].hidden)


def _predict(unet: UNet2DConditionModel, part: GuidedInputs) -> torch.Tensor:
    """The guided prediction. Step by step, since slots may want to know the timestep."""
    return part.guided(finish(steps_of(unet), start(unet, *part.rows())))


def sketch(errors: torch.Tensor) -> torch.Tensor:
    """(N, …) to (N, SKETCH): values with random signs, the same for every call, summed up in turns.

    Scalar products keep their expectation (the count sketch of Charikar, Chen and Farach-Colton, 2002).
    """
    flat = errors.flatten(1).float()
    signs = _signs(flat.shape[1], flat.device)
    return F.pad(flat * signs, (0, -flat.shape[1] % SKETCH)).reshape(len(flat), -1, SKETCH).sum(1)


@lru_cache(maxsize=4)
def _signs(count: int, device: torch.device) -> torch.Tensor:
    drawn = torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(0))
    return drawn.to(device, torch.float32) * 2 - 1


def _as_text(values: torch.Tensor) -> str:
    return base64.b64encode(values.cpu().numpy().astype("<f4").tobytes()).decode("ascii")


def _from_text(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(-1, SKETCH).astype(np.float64)


def _squares(values: torch.Tensor) -> list[float]:
    result: list[float] = values.double().square().flatten(1).sum(dim=1).tolist()
    return result


def _empty_record(energy: Sequence[float] | None) -> dict[str, Any]:
    return {"energy": energy, "errors": {}, "sketches": {}}


def _read_store(store: Path | None) -> dict[int, dict[str, Any]]:
    """What any process has kept of every chunk; a line that a kill left half-written is measured again."""
    known: dict[int, dict[str, Any]] = {}
    files = [] if store is None else files_of_all(store)
    for line in chain.from_iterable(file.read_text(encoding="utf-8").splitlines() for file in files):
        try:
            record: Mapping[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue
        kept = known.setdefault(record["chunk"], _empty_record(record["energy"]))
        kept["errors"].update(record["errors"])
        kept["sketches"].update(record["sketches"])
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
