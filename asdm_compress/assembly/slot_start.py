"""Where what a plan brings along starts from: fitted one by one for a search, or in network order for a whole plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from asdm_compress.assembly.calibration import Calibration
from asdm_compress.assembly.damage import Damage, chunks_of, known_damages, measure_damages, teacher_pass
from asdm_compress.assembly.narrowing import InnerSums, collecting, narrowed_state
from asdm_compress.assembly.options import Option
from asdm_compress.assembly.plan import PlacedEdits, Plan, place
from asdm_compress.assembly.slot_fit import BandSums, SlotFits, check_fits, slot_activations
from asdm_compress.core.edits import Edit, conv_spec, has_weights, kept_share
from asdm_compress.models.edits import SlotWeights, edited_copy
from asdm_compress.models.walk import State, Step, finish, start, steps_of, take
from asdm_compress.models.widths import inner_widths

Progress = Callable[[int, int], None]
ItemT = TypeVar("ItemT")
OPTION_MOMENTS: Final = 128  # that every option is fitted on; a plan's own fit has all of them
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
    """The one-shot damage of every option, with the weights of those that bring some along fitted first.

    They are fitted on one part of the prompts and all damages measured on the other (see `Calibration.parts`),
    so that a fit to its own samples does not count as less damage. What the `store` knows is neither fitted nor
    measured again.
    """
    report = progress or (lambda done, total: None)
    fitting, measuring_on = calibration.parts()
    fitting = fitting.thinned(OPTION_MOMENTS)
    damages = known_damages(store, options, measuring_on)
    done = len(damages)
    report(done, len(options))
    unknown = [o for o in options if o.name not in damages]
    plain = [o for o in unknown if not has_weights(o.edit)]
    convolutions = [o for o in unknown if conv_spec(o.edit) is not None]
    narrowings = [o for o in unknown if kept_share(o.edit) is not None]
    groups: list[Iterable[tuple[list[Option], dict[str, SlotWeights]]]] = []
    if plain:
        groups.append([(plain, {})])
    if convolutions:
        groups.append(fit_options(unet, convolutions, fitting))
    if narrowings:
        groups.append(fit_narrowings(unet, narrowings, fitting))
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
    bands = len(calibration.band_weights)

    def size_of(bearer: _Bearer) -> int:
        return BandSums.bytes(bands, _widths(unet, bearer.unit)[0], bearer.targets(unet), bearer.kernel)

    for group in _within_memory(_bearers(options, spans), size_of):
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


def fitting_places(
    unet: UNet2DConditionModel, places: Mapping[Edit, Sequence[str]], bands: int
) -> dict[Edit, tuple[str, ...]]:
    """The places without those where a convolution's normal equations would take more than half of the memory."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    left = {}
    for edit, paths in places.items():
        spec = conv_spec(edit)
        held = {path: 0 if spec is None else BandSums.bytes(bands, *_widths(unet, path), spec.kernel) for path in paths}
        possible = tuple(path for path, size in held.items() if size <= most)
        if possible:
            left[edit] = possible
    return left


def fit_narrowings(
    unet: UNet2DConditionModel, options: Sequence[Option], calibration: Calibration
) -> Iterator[tuple[list[Option], dict[str, SlotWeights]]]:
    """Fit every narrowing to the teacher's activations, in groups that fit into memory.

    Yields groups of options with their weights by option.
    """
    inner = inner_widths(unet)
    sites = list(dict.fromkeys(o.site for o in options))
    for group in _within_memory(sites, lambda path: InnerSums.bytes(inner[path])):
        sums = _inner_sums(unet, group, calibration)
        ours = [o for o in options if o.site in sums]
        weights: dict[str, SlotWeights] = {}
        for option in ours:
            share = kept_share(option.edit)
            assert share is not None
            state = narrowed_state(unet.get_submodule(option.site), share, sums[option.site])
            weights[option.name] = {option.site: state}
        yield ours, weights


@torch.no_grad()
def _inner_sums(unet: UNet2DConditionModel, paths: Sequence[str], calibration: Calibration) -> dict[str, InnerSums]:
    inner, steps = inner_widths(unet), steps_of(unet)
    sums = {path: InnerSums.empty(inner[path], unet.device) for path in paths}
    for first, last in chunks_of(calibration):
        with collecting(unet, sums, calibration, first):
            finish(steps, start(unet, *calibration.part(first, last).rows()))
    return sums


@torch.no_grad()
def fit_plan(
    unet: UNet2DConditionModel, plan: Plan, calibration: Calibration, progress: Progress | None = None
) -> SlotWeights:
    """Fit everything that the edits of a whole plan bring along, in the order in which it runs.

    A convolution is fitted from what the student, with all earlier edits in place, hands to it, to what the teacher has
    behind the modules that it stands for, and so makes up for what was damaged before it. A narrowed module is fitted
    to do on the student's activations what the whole one would. Raises AsdmError for convolutions that have no fit (see
    `check_fits`).
    """
    placed = place(unet, plan)
    specs = [spec for spec in (conv_spec(edit) for edit in placed.units.values()) if spec is not None]
    check_fits(specs, len(calibration.band_weights))
    weights: dict[str, Mapping[str, Tensor]] = {}
    order = _in_network_order(unet, [path for path, edit in placed.units.items() if has_weights(edit)])
    if not order:
        return weights
    report = progress or (lambda done, total: None)
    chunks = chunks_of(calibration)
    student = _student_so_far(unet, placed, weights)
    runs = [_Lockstep(unet, student, calibration, *chunk) for chunk in chunks]
    for number, path in enumerate(order):
        there = placed.edited_path(unet, path)
        module, share = unet.get_submodule(path), kept_share(placed.units[path])
        if share is None:
            spec = conv_spec(placed.units[path])
            assert spec is not None
            inputs, outputs = _widths(unet, path)
            sums = BandSums.empty(len(calibration.band_weights), inputs, outputs, spec.kernel, unet.device)
            for (first, _), lockstep in zip(chunks, runs, strict=True):
                step, state = lockstep.student_before(there)
                sums.add(
                    calibration,
                    first,
                    *slot_activations(step, module, state, lockstep.teacher_behind(placed.replaced[path][-1])),
                )
            weights[path] = SlotFits(sums, calibration, module, [slice(0, outputs)]).state(spec)
        else:
            inner = inner_widths(unet)[path]
            inside = InnerSums.empty(inner, unet.device)
            for (first, _), lockstep in zip(chunks, runs, strict=True):
                step, state = lockstep.student_before(_unit_of(there))
                with collecting(student, {there: inside}, calibration, first):
                    take(step, state)
            weights[path] = narrowed_state(module, share, inside)
        student = _student_so_far(unet, placed, weights)
        for lockstep in runs:
            lockstep.student_steps = steps_of(student)
        report(number + 1, len(order))
    return weights


def _student_so_far(unet: UNet2DConditionModel, placed: PlacedEdits, weights: SlotWeights) -> UNet2DConditionModel:
    """The student with what is fitted; modules still to be narrowed are whole, convolutions still to come are zero."""
    edits = {path: edit for path, edit in placed.units.items() if kept_share(edit) is None or path in weights}
    return edited_copy(unet, edits, placed.drop_mid, placed.keep_levels, weights)


def _in_network_order(unet: UNet2DConditionModel, paths: Sequence[str]) -> list[str]:
    at = {step.path: i for i, step in enumerate(steps_of(unet))}
    inside = {path: i for i, path in enumerate(inner_widths(unet))}  # sub-units come in the order in which they run
    return sorted(paths, key=lambda path: (at[_unit_of(path)], inside.get(path, 0)))


def _unit_of(path: str) -> str:
    """The unit that a sub-unit is a part of; a unit's own path."""
    return path.split(".transformer_blocks.", maxsplit=1)[0]


class _Lockstep:
    """Teacher and student on the same triples, each going on from where it was."""

    def __init__(
        self,
        teacher: UNet2DConditionModel,
        student: UNet2DConditionModel,
        calibration: Calibration,
        first: int,
        last: int,
    ) -> None:
        rows = calibration.part(first, last).rows()
        self.teacher_steps, self.student_steps = steps_of(teacher), steps_of(student)
        self.teacher, self.student = start(teacher, *rows), start(student, *rows)
        self.teacher_at = self.student_at = 0

    def student_before(self, unit: str) -> tuple[Step, State]:
        """A unit's step in the student, and the state before it."""
        while self.student_steps[self.student_at].path != unit:
            self.student = take(self.student_steps[self.student_at], self.student)
            self.student_at += 1
        return self.student_steps[self.student_at], self.student

    def teacher_behind(self, unit: str) -> Tensor:
        """The teacher's hidden state behind a unit."""
        while self.teacher_at == 0 or self.teacher_steps[self.teacher_at - 1].path != unit:
            self.teacher = take(self.teacher_steps[self.teacher_at], self.teacher)
            self.teacher_at += 1
        return self.teacher.hidden


def _bearers(options: Sequence[Option], spans: Mapping[str, tuple[str, tuple[str, ...]]]) -> list[_Bearer]:
    found: dict[tuple[str, str], tuple[list[tuple[str, ...]], int]] = {}
    for option in options:
        unit, span = spans[option.name]
        spec = conv_spec(option.edit)
        assert spec is not None
        known, kernel = found.get((unit, span[0]), ([], 1))
        found[unit, span[0]] = ([*known, span] if span not in known else known, max(kernel, spec.kernel))
    return [_Bearer(unit, tuple(known), kernel) for (unit, _), (known, kernel) in found.items()]


def _within_memory(items: Sequence[ItemT], size_of: Callable[[ItemT], int]) -> Iterator[list[ItemT]]:
    """Items in groups whose sums fit into memory together."""
    group: list[ItemT] = []
    held = 0
    for item in items:
        size = size_of(item)
        if group and held + size > SUMS_BYTES:
            yield group
            group, held = [], 0
        group.append(item)
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
