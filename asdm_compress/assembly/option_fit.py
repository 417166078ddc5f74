"""The weights that single edits bring along, fitted to the teacher's activations, and the damage of every edit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from asdm_compress.assembly.calibration import Calibration
from asdm_compress.assembly.damage import Damage, chunks_of, known_damages, measure_damages, teacher_pass
from asdm_compress.assembly.narrowing import InnerSums, collecting, narrowed_state
from asdm_compress.assembly.options import Option
from asdm_compress.assembly.plan import edited, place
from asdm_compress.assembly.refit import Refit, last_absorbed, projections_of
from asdm_compress.assembly.regression import memory_for_sums
from asdm_compress.assembly.slot_fit import BandSums, SlotFits, groups_of, slot_activations
from asdm_compress.core.edits import SHARED, ConvSpec, Edit, conv_spec, has_weights, kept_share
from asdm_compress.core.processes import ALONE, Processes
from asdm_compress.models.edits import SlotWeights
from asdm_compress.models.precision import true_fp32
from asdm_compress.models.walk import finish, shared_prefix, start, steps_of, take
from asdm_compress.models.widths import inner_widths
from asdm_compress.profiling.slot_costs import as_run

Progress = Callable[[int, int], None]
ItemT = TypeVar("ItemT")
SUMS_BYTES: Final = 3 * 2**30  # of normal equations held at a time


@dataclass(frozen=True, slots=True)
class _Bearer:
    """A unit that may bear the convolutions of some options: the modules that each of them would stand for, the largest
    kernel, and how many sums their fits need.

    All spans begin with the same module.
    """

    unit: str
    options: tuple[Option, ...]
    spans: tuple[tuple[str, ...], ...]
    kernel: int
    groups: int

    def empty(self, unet: UNet2DConditionModel) -> BandSums:
        """Sums for all the fits."""
        inputs, outputs = slot_widths(unet, self.unit)
        return BandSums.empty(self.groups, inputs, len(self.spans) * outputs, self.kernel, unet.device)

    def bytes(self, unet: UNet2DConditionModel) -> int:
        """The memory that they take."""
        inputs, outputs = slot_widths(unet, self.unit)
        return BandSums.bytes(self.groups, inputs, len(self.spans) * outputs, self.kernel)


def measure_options(
    unet: UNet2DConditionModel,
    options: Sequence[Option],
    calibration: Calibration,
    store: Path | None = None,
    progress: Progress | None = None,
    refit: bool = False,
    processes: Processes = ALONE,
) -> dict[str, Damage]:
    """The one-shot damage of every option, with the weights of those that bring some along fitted first.

    With `refit`, the module before a dropped one, and one that has lost a part, are solved anew for what was there.

    They are fitted on one part of the prompts and all damages measured on the other (see `Calibration.for_options`),
    so that a fit to its own samples does not count as less damage. What the `store` knows is neither fitted nor
    measured again. Several processes share the options, never an option's samples, and each has the whole result: that
    of one process, to the last bit where their processors are alike.
    """
    report = progress or (lambda done, total: None)
    fitting, measuring_on = calibration.for_options()
    damages = processes.on_main(lambda: known_damages(store, options, measuring_on))
    unknown = _dealt(unet, [o for o in options if o.name not in damages], processes)
    done, total = len(damages), len(damages) + len(unknown)
    report(done, total)
    plain = [o for o in unknown if not has_weights(o.edit)]
    absorbing = [o for o in plain if refit and o.edit != SHARED and absorber(unet, o) is not None]
    plain = [o for o in plain if o not in absorbing]
    convolutions = [o for o in unknown if conv_spec(o.edit) is not None]
    narrowings = [o for o in unknown if kept_share(o.edit) is not None]
    groups: list[Iterable[tuple[list[Option], dict[str, SlotWeights]]]] = []
    if plain:
        groups.append([(plain, {})])
    if absorbing:
        groups.append(fit_absorbers(unet, absorbing, fitting))
    if convolutions:
        groups.append(fit_options(unet, convolutions, fitting))
    if narrowings:
        groups.append(fit_narrowings(unet, narrowings, fitting))
    for group, weights in chain.from_iterable(groups):

        def measuring(step: int, steps: int, before: int = done, share: int = len(group)) -> None:
            report(before + step * share // steps, total)

        damages |= measure_damages(unet, group, measuring_on, store, measuring, weights, processes)
        done += len(group)
    together = {name: damage for share in processes.gather(damages) for name, damage in share.items()}
    return {o.name: together[o.name] for o in options}


def _dealt(unet: UNet2DConditionModel, options: Sequence[Option], processes: Processes) -> list[Option]:
    """This process's part of the options. What is fitted from the same sums stays together."""
    if processes.count == 1:
        return list(options)
    # Kind by kind, since kinds take different times.
    taken_out: dict[object, list[Option]] = {}
    convolutions: dict[object, list[Option]] = {}
    narrowed: dict[object, list[Option]] = {}
    for option in options:
        if conv_spec(option.edit) is not None:
            unit, span = next(iter(place(unet, option.plan).replaced.items()))
            convolutions.setdefault((unit, span[0]), []).append(option)
        elif kept_share(option.edit) is not None:
            narrowed.setdefault(option.site, []).append(option)
        else:
            taken_out.setdefault(option.name, []).append(option)
    parts = [part for kind in (taken_out, convolutions, narrowed) for part in processes.share(list(kind.values()))]
    return list(chain.from_iterable(parts))


def fit_options(
    unet: UNet2DConditionModel, options: Sequence[Option], calibration: Calibration
) -> Iterator[tuple[list[Option], dict[str, SlotWeights]]]:
    """Fit the convolution of every option to the teacher's activations, in groups that fit into memory.

    Yields the options of one unit at a time with their slot weights by option.
    """
    spans = {o.name: next(iter(place(unet, o.plan).replaced.items())) for o in options}
    for group in _within_memory(_bearers(unet, options, spans), lambda bearer: bearer.bytes(unet)):
        sums = _accumulate(unet, group, calibration)
        for bearer in group:
            width = slot_widths(unet, bearer.unit)[1]
            targets = [slice(i * width, (i + 1) * width) for i in range(len(bearer.spans))]
            fits = SlotFits(sums.pop(0), calibration, unet.get_submodule(bearer.unit), targets)
            weights: dict[str, SlotWeights] = {}
            for option in bearer.options:
                spec = conv_spec(option.edit)
                assert spec is not None
                span = bearer.spans.index(spans[option.name][1])
                weights[option.name] = {bearer.unit: fits.state(spec, span)}
            yield list(bearer.options), weights


def fitting_places(unet: UNet2DConditionModel, places: Mapping[Edit, Sequence[str]]) -> dict[Edit, tuple[str, ...]]:
    """The places without those where a convolution's normal equations would take more than there is room for.

    Where that is due to a kernel per timestep band, the same convolution with one kernel takes the place.
    """
    most = memory_for_sums(unet.device)
    left: dict[Edit, dict[str, None]] = {}
    for edit, paths in places.items():
        spec = conv_spec(edit)
        for path in paths:
            for possible in (None,) if spec is None else dict.fromkeys((spec, conv_spec(as_run(edit)))):
                if possible is None or _bytes(unet, path, possible) <= most:
                    left.setdefault(edit if possible is None else possible.name, {})[path] = None
                    break
    return {edit: tuple(paths) for edit, paths in left.items()}


def _bytes(unet: UNet2DConditionModel, path: str, spec: ConvSpec) -> int:
    return BandSums.bytes(groups_of(spec), *slot_widths(unet, path), spec.kernel)


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


def absorber(unet: UNet2DConditionModel, option: Option) -> tuple[str, str] | None:
    """The unit that can take over the part of what an option takes out, and the last unit whose part that is.

    That is the first module that the option changes, where it still has a projection, or the one before it. Both are
    given by their paths in `unet`; None where there is none.
    """
    placed = place(unet, option.plan)
    teacher, steps = steps_of(unet), steps_of(edited(unet, option.plan))
    student, moved = {step.path: step for step in steps}, partial(placed.edited_path, unet)
    first = shared_prefix(teacher, steps)
    for at in (first, first - 1):
        unit = teacher[at].path
        step = student.get(moved(unit))
        if at > 0 and step is not None and projections_of(step.modules[-1]):
            behind = last_absorbed(teacher, student, moved, unit)
            if at == first or behind != unit:
                return unit, behind
    return None


@torch.no_grad()
def fit_absorbers(
    unet: UNet2DConditionModel, options: Sequence[Option], calibration: Calibration
) -> Iterator[tuple[list[Option], dict[str, SlotWeights]]]:
    """Refit for every option the module that takes over the part of what is taken out (see `absorber`).

    Yields groups of options with their weights by option.
    """
    teacher = steps_of(unet)
    at = {step.path: i for i, step in enumerate(teacher)}
    places = {o.name: found for o in options if (found := absorber(unet, o)) is not None}
    student_steps = {}
    for option in options:
        placed = place(unet, option.plan)
        path = placed.edited_path(unet, places[option.name][0])
        student_steps[option.name] = next(s for s in steps_of(edited(unet, option.plan)) if s.path == path)

    def module_of(option: Option) -> nn.Module:
        return student_steps[option.name].modules[-1]

    @true_fp32()
    def fitted(group: Sequence[Option]) -> dict[str, SlotWeights]:
        """In a function of its own, since who gets the weights needs the memory of what they were made of."""
        sums = {o.name: Refit(module_of(o), Refit.kind_for(module_of(o), "full")) for o in group}
        for first, last in chunks_of(calibration):
            states, _ = teacher_pass(unet, teacher, calibration.part(first, last))
            for option in group:
                (unit, behind), refit = places[option.name], sums[option.name]
                with refit.watching() as taken:
                    output = take(student_steps[option.name], states[at[unit]]).hidden
                refit.add(calibration, first, taken, output, states[at[behind] + 1].hidden)
        return {o.name: {places[o.name][0]: sums[o.name].solve()} for o in group}

    for group in _within_memory(options, lambda o: Refit.bytes(module_of(o))):
        yield list(group), fitted(group)


@torch.no_grad()
@true_fp32()
def _inner_sums(unet: UNet2DConditionModel, paths: Sequence[str], calibration: Calibration) -> dict[str, InnerSums]:
    inner, steps = inner_widths(unet), steps_of(unet)
    sums = {path: InnerSums.empty(inner[path], unet.device) for path in paths}
    for first, last in chunks_of(calibration):
        with collecting(unet, sums, calibration, first):
            finish(steps, start(unet, *calibration.part(first, last).rows()))
    return sums


def _bearers(
    unet: UNet2DConditionModel, options: Sequence[Option], spans: Mapping[str, tuple[str, tuple[str, ...]]]
) -> list[_Bearer]:
    """The bearers of the options; those of one unit share their sums where there is room for sums of every kind."""
    together: dict[tuple[str, str], list[Option]] = {}
    for option in options:
        unit, span = spans[option.name]
        together.setdefault((unit, span[0]), []).append(option)
    bearers = []
    for (unit, _), ours in together.items():
        bearer = _bearer(unit, ours, spans)
        fits = bearer.bytes(unet) <= memory_for_sums(unet.device)
        bearers += [bearer] if fits else [_bearer(unit, [option], spans) for option in ours]
    return bearers


def _bearer(unit: str, options: Sequence[Option], spans: Mapping[str, tuple[str, tuple[str, ...]]]) -> _Bearer:
    specs = [spec for spec in (conv_spec(option.edit) for option in options) if spec is not None]
    all_spans = tuple(dict.fromkeys(spans[option.name][1] for option in options))
    return _Bearer(unit, tuple(options), all_spans, max(s.kernel for s in specs), max(groups_of(s) for s in specs))


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
@true_fp32()
def _accumulate(unet: UNet2DConditionModel, bearers: Sequence[_Bearer], calibration: Calibration) -> list[BandSums]:
    steps = steps_of(unet)
    at = {step.path: i for i, step in enumerate(steps)}
    sums = [bearer.empty(unet) for bearer in bearers]
    for first, last in chunks_of(calibration):
        states, _ = teacher_pass(unet, steps, calibration.part(first, last))
        for bearer, here in zip(bearers, sums, strict=True):
            step, before = steps[at[bearer.unit]], states[at[bearer.spans[0][0]]]
            module = unet.get_submodule(bearer.unit)
            pairs = [slot_activations(step, module, before, states[at[span[-1]] + 1].hidden) for span in bearer.spans]
            here.add(calibration, first, pairs[0][0], torch.cat([y for _, y in pairs], dim=1))
    return sums


def slot_widths(unet: UNet2DConditionModel, unit: str) -> tuple[int, int]:
    """Input and output channels of a slot's convolution in a unit's place."""
    module: Any = unet.get_submodule(unit)
    if ".attentions." in unit:
        return module.in_channels, module.in_channels
    if "samplers." in unit:
        return module.channels, module.out_channels
    return module.in_channels, module.out_channels
