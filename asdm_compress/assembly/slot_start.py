"""Where slot convolutions start from: fitted one by one for a search, or one after the other for a whole plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from asdm_compress.assembly.calibration import Calibration
from asdm_compress.assembly.damage import Damage, chunks_of, known_damages, measure_damages, teacher_pass
from asdm_compress.assembly.options import Option
from asdm_compress.assembly.plan import Plan, edited, place
from asdm_compress.assembly.slot_fit import BandSums, SlotFits, check_fits, slot_activations
from asdm_compress.core.edits import conv_spec
from asdm_compress.models.edits import SlotWeights, slot_of
from asdm_compress.models.walk import State, Step, start, steps_of, take

Progress = Callable[[int, int], None]
SUMS_BYTES: Final = 3 * 2**30  # of normal equations held at a time


@dataclass(frozen=True, slots=True)
class _Bearer:
    """A unit that may bear convolutions: the modules that each of them would stand for, and the largest kernel.

    All spans begin with the same module.
    """

    unit: str
    spans: tuple[tuple[str, ...], ...]
    kernel: int

    @property
    def key(self) -> tuple[str, str]:
        return self.unit, self.spans[0][0]

    def targets(self, unet: UNet2DConditionModel) -> int:
        return len(self.spans) * _widths(unet, self.unit)[1]


def measure_options(
    unet: UNet2DConditionModel,
    options: Sequence[Option],
    calibration: Calibration,
    store: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Damage]:
    """The one-shot damage of every option, with the convolutions of those that have one fitted first.

    Convolutions are fitted on one part of the prompts and all damages measured on the other (see `Calibration.parts`),
    so that a fit to its own samples does not count as less damage. What the `store` knows is neither fitted nor
    measured again.
    """
    report = progress or (lambda done, total: None)
    fitting, measuring_on = calibration.parts()
    damages = known_damages(store, options, measuring_on)
    done = len(damages)
    report(done, len(options))
    unknown = [o for o in options if o.name not in damages]
    plain = [o for o in unknown if conv_spec(o.edit) is None]
    convolutions = [o for o in unknown if conv_spec(o.edit) is not None]
    groups: list[Iterable[tuple[list[Option], dict[str, SlotWeights]]]] = []
    if plain:
        groups.append([(plain, {})])
    if convolutions:
        groups.append(fit_options(unet, convolutions, fitting))
    for group, weights in chain.from_iterable(groups):

        def measuring(step: int, steps: int, before: int = done, share: int = len(group)) -> None:
            report(before + step * share // steps, len(options))

        damages |= measure_damages(unet, group, measuring_on, store, measuring, weights)
        done += len(group)
    return damages


def fit_options(
    unet: UNet2DConditionModel, options: Sequence[Option], calibration: Calibration
) -> Iterator[tuple[list[Option], dict[str, SlotWeights]]]:
    """Fit the convolution of every option to the teacher's activations, in groups that fit into memory.

    Yields the options of one unit at a time with their slot weights by option.
    """
    spans = {o.name: next(iter(place(unet, o.plan).replaced.items())) for o in options}
    for group in _groups(unet, _bearers(options, spans), len(calibration.band_weights)):
        sums = _accumulate(unet, group, calibration)
        for bearer in group:
            width = _widths(unet, bearer.unit)[1]
            targets = [slice(i * width, (i + 1) * width) for i in range(len(bearer.spans))]
            fits = SlotFits(sums.pop(bearer.key), calibration, unet.get_submodule(bearer.unit), targets)
            ours = [o for o in options if spans[o.name][0] == bearer.unit and spans[o.name][1] in bearer.spans]
            weights: dict[str, SlotWeights] = {}
            for option in ours:
                spec = conv_spec(option.edit)
                assert spec is not None
                span = bearer.spans.index(spans[option.name][1])
                weights[option.name] = {bearer.unit: fits.state(spec, span)}
            yield ours, weights


@torch.no_grad()
def fit_plan(
    unet: UNet2DConditionModel, plan: Plan, calibration: Calibration, progress: Progress | None = None
) -> SlotWeights:
    """Fit the convolutions of a whole plan in the order in which they run.

    Each is fitted from what the student, with all earlier convolutions in place, hands to it, to what the teacher has
    behind the modules that it stands for, and so makes up for what was damaged before it. Raises AsdmError for
    convolutions that have no fit (see `check_fits`).
    """
    placed = place(unet, plan)
    specs = [spec for spec in (conv_spec(edit) for edit in placed.units.values()) if spec is not None]
    check_fits(specs, len(calibration.band_weights))
    weights: dict[str, Mapping[str, Tensor]] = {}
    if not placed.replaced:
        return weights
    report = progress or (lambda done, total: None)
    student = edited(unet, plan)
    teacher_steps, student_steps = steps_of(unet), steps_of(student)
    at = {step.path: i for i, step in enumerate(teacher_steps)}
    order = sorted(placed.bearers, key=lambda unit: at[unit])
    chunks = chunks_of(calibration)
    runs = [_Lockstep(unet, teacher_steps, student, student_steps, calibration, *chunk) for chunk in chunks]
    for number, unit in enumerate(order):
        spec = conv_spec(placed.units[unit])
        assert spec is not None
        there = placed.edited_path(unet, unit)
        inputs, outputs = _widths(unet, unit)
        sums = BandSums.empty(len(calibration.band_weights), inputs, outputs, spec.kernel, unet.device)
        module = unet.get_submodule(unit)
        for done, ((first, _), lockstep) in enumerate(zip(chunks, runs, strict=True)):
            step, state, output = lockstep.advance(there, placed.replaced[unit][-1])
            sums.add(calibration, first, *slot_activations(step, module, state, output))
            report(number * len(chunks) + done + 1, len(order) * len(chunks))
        weights[unit] = SlotFits(sums, calibration, module, [slice(0, outputs)]).state(spec)
        slot_of(student, there).load_state_dict(weights[unit])
    return weights


class _Lockstep:
    """Teacher and student on the same triples, each going on from where it was."""

    def __init__(
        self,
        teacher: UNet2DConditionModel,
        teacher_steps: Sequence[Step],
        student: UNet2DConditionModel,
        student_steps: Sequence[Step],
        calibration: Calibration,
        first: int,
        last: int,
    ) -> None:
        rows = calibration.part(first, last).rows()
        self.teacher_steps, self.student_steps = teacher_steps, student_steps
        self.teacher, self.student = start(teacher, *rows), start(student, *rows)
        self.teacher_at = self.student_at = 0

    def advance(self, unit: str, behind: str) -> tuple[Step, State, Tensor]:
        """The unit's step, the student's state before it, and the teacher's hidden state behind the module `behind`."""
        while self.student_steps[self.student_at].path != unit:
            self.student = take(self.student_steps[self.student_at], self.student)
            self.student_at += 1
        while self.teacher_steps[self.teacher_at - 1].path != behind or self.teacher_at == 0:
            self.teacher = take(self.teacher_steps[self.teacher_at], self.teacher)
            self.teacher_at += 1
        return self.student_steps[self.student_at], self.student, self.teacher.hidden


def _bearers(options: Sequence[Option], spans: Mapping[str, tuple[str, tuple[str, ...]]]) -> list[_Bearer]:
    found: dict[tuple[str, str], tuple[list[tuple[str, ...]], int]] = {}
    for option in options:
        unit, span = spans[option.name]
        spec = conv_spec(option.edit)
        assert spec is not None
        known, kernel = found.get((unit, span[0]), ([], 1))
        found[unit, span[0]] = ([*known, span] if span not in known else known, max(kernel, spec.kernel))
    return [_Bearer(unit, tuple(known), kernel) for (unit, _), (known, kernel) in found.items()]


def _groups(unet: UNet2DConditionModel, bearers: Sequence[_Bearer], bands: int) -> Iterator[list[_Bearer]]:
    """Bearers whose sums fit into memory together."""
    group: list[_Bearer] = []
    held = 0
    for bearer in bearers:
        size = BandSums.bytes(bands, _widths(unet, bearer.unit)[0], bearer.targets(unet), bearer.kernel)
        if group and held + size > SUMS_BYTES:
            yield group
            group, held = [], 0
        group.append(bearer)
        held += size
    if group:
        yield group


@torch.no_grad()
def _accumulate(
    unet: UNet2DConditionModel, bearers: Sequence[_Bearer], calibration: Calibration
) -> dict[tuple[str, str], BandSums]:
    steps = steps_of(unet)
    at = {step.path: i for i, step in enumerate(steps)}
    bands = len(calibration.band_weights)
    sums = {
        b.key: BandSums.empty(bands, _widths(unet, b.unit)[0], b.targets(unet), b.kernel, unet.device) for b in bearers
    }
    for first, last in chunks_of(calibration):
        states, _ = teacher_pass(unet, steps, calibration.part(first, last))
        for bearer in bearers:
            unit, begin = bearer.key
            step, before = steps[at[unit]], states[at[begin]]
            module = unet.get_submodule(unit)
            pairs = [slot_activations(step, module, before, states[at[span[-1]] + 1].hidden) for span in bearer.spans]
            sums[bearer.key].add(calibration, first, pairs[0][0], torch.cat([y for _, y in pairs], dim=1))
    return sums


def _widths(unet: UNet2DConditionModel, unit: str) -> tuple[int, int]:
    """Input and output channels of a slot's convolution in a unit's place."""
    module: Any = unet.get_submodule(unit)
    if ".attentions." in unit:
        return module.in_channels, module.in_channels
    if "samplers." in unit:
        return module.channels, module.out_channels
    return module.in_channels, module.out_channels
