"""The weights of a whole plan, fitted in network order: what its edits bring along, and what stays."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Final, Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from asdm_compress.assembly.calibration import Calibration
from asdm_compress.assembly.damage import chunks_of
from asdm_compress.assembly.narrowing import InnerSums, collecting, narrowed_state
from asdm_compress.assembly.option_fit import slot_widths
from asdm_compress.assembly.plan import PlacedEdits, Plan, place
from asdm_compress.assembly.refit import Refit, last_absorbed, projections_of
from asdm_compress.assembly.regression import memory_for_sums, memory_of
from asdm_compress.assembly.slot_fit import BandSums, SlotFits, check_fits, groups_of, slot_activations
from asdm_compress.assembly.teacher_runs import TeacherRuns
from asdm_compress.core.edits import conv_spec, has_weights, kept_share
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.edits import SlotWeights, edited_copy, put_tensors
from asdm_compress.models.precision import true_fp32
from asdm_compress.models.walk import State, Step, shared_prefix, start, steps_of, take
from asdm_compress.models.widths import inner_widths

Progress = Callable[[int, int], None]
RefitChoice = Literal["full", "scale", "none"]
REFITS: Final = ("full", "scale", "none")
SHARE_FOR_STATES: Final = 0.15  # of the memory, that the activations of a plan's fit may take


def check_refit(name: str) -> None:
    """Raise AsdmError unless `name` says how much is refitted."""
    if name not in REFITS:
        raise AsdmError(f"unknown refit {name!r}", f"Use {', '.join(REFITS)}.")


@torch.no_grad()
@true_fp32()
def fit_plan(
    unet: UNet2DConditionModel,
    plan: Plan,
    calibration: Calibration,
    progress: Progress | None = None,
    refit: RefitChoice = "none",
    refit_at: Collection[str] | None = None,
    runs: TeacherRuns | None = None,
) -> SlotWeights:
    """Fit everything that the edits of a whole plan bring along, and refit what stays, in the order in which it runs.

    A convolution is fitted from what the student, with all earlier edits in place, hands to it, to what the teacher has
    behind the modules that it stands for, and so makes up for what was damaged before it. A narrowed module is fitted
    to do on the student's activations what the whole one would. With `refit`, every kept module behind the first edit
    is then solved anew for what the teacher has behind it (see `Refit`), and behind the dropped modules that follow it;
    or only those at `refit_at`. Activations of all moments are held (see `for_memory`); `runs` has the teacher's
    already, with which the result is the same.
    Raises AsdmError for convolutions that have no fit (see `check_fits`) and those whose sums do not fit into memory,
    before anything is fitted.
    """
    plan = plan.unshared
    placed = place(unet, plan)
    specs = [spec for edit in placed.units.values() if (spec := conv_spec(edit)) is not None]
    check_fits(specs, len(calibration.band_weights))
    check_plan_memory(unet, plan)
    if not plan.edits or (refit == "none" and not any(has_weights(edit) for edit in placed.units.values())):
        return {}
    runs = runs or TeacherRuns(unet, calibration)
    assert runs.calibration is calibration
    fit = _PlanFit(unet, placed, runs, refit, refit_at)
    units = fit.units_to_fit()
    for number, unit in enumerate(units):
        fit.fit_unit(unit)
        if progress is not None:
            progress(number + 1, len(units))
    return fit.weights


def scaled_for_memory(unet: UNet2DConditionModel) -> tuple[str, ...]:
    """The units that are only refitted by scales, whatever is asked for: other sums would not fit into memory."""
    most = memory_for_sums(unet.device)
    steps = {step.path: step.modules[-1] for step in steps_of(unet) if step.modules}
    return tuple(p for p, module in steps.items() if projections_of(module) and Refit.bytes(module) > most)


def check_plan_memory(unet: UNet2DConditionModel, plan: Plan) -> None:
    """Raise AsdmError for a plan with a convolution whose fit does not fit into memory."""
    for path, edit in place(unet, plan).units.items():
        spec = conv_spec(edit)
        if spec is None:
            continue
        needed = BandSums.bytes(groups_of(spec), *slot_widths(unet, path), spec.kernel)
        if needed > memory_for_sums(unet.device):
            raise AsdmError(
                f"the fit of {spec.name} at {path} would take {needed / 2**30:.1f} GiB",
                "Use fewer experts there, a 1x1 kernel, or a machine with more memory.",
            )


@torch.no_grad()
def for_memory(unet: UNet2DConditionModel, calibration: Calibration, share: float = SHARE_FOR_STATES) -> Calibration:
    """The moments that a plan's fit can take in: it holds the activations of teacher and student of all of them.

    They may take a share of the memory; one moment is taken in any case.
    """
    state = start(unet, *calibration.part(0, 1).rows())
    most = 0
    for step in steps_of(unet):
        state = take(step, state)
        held = {id(x): x for x in (state.hidden, *state.skips)}
        most = max(most, sum(x.nbytes for x in held.values()))
    return calibration.thinned(max(1, int(share * memory_of(unet.device) / (2 * most))))


class _PlanFit:
    """A student under way: fitted up to some unit, and the activations of teacher and student there."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        placed: PlacedEdits,
        runs: TeacherRuns,
        refit: RefitChoice,
        refit_at: Collection[str] | None,
    ) -> None:
        self.unet, self.placed, self.calibration, self.refit = unet, placed, runs.calibration, refit
        self.refit_at = refit_at
        self.weights: dict[str, dict[str, Tensor]] = {}
        self.teacher_steps = runs.steps
        self.inner = inner_widths(unet)
        self.inside: dict[str, list[str]] = {}  # unit to its edited places with weights, in the order in which they run
        order = {path: i for i, path in enumerate(self.inner)}
        for path in sorted(placed.units, key=lambda path: order.get(path, 0)):
            if has_weights(placed.units[path]):
                self.inside.setdefault(_unit_of(path), []).append(path)
        self.student = self._student_so_far()
        self.first_changed = shared_prefix(self.teacher_steps, steps_of(self.student))
        self.chunks = chunks_of(self.calibration)
        at = {step.path: i for i, step in enumerate(self.teacher_steps)}
        # A narrowed module is whole until it is fitted, and so may stand before the first change. The unit before a
        # change may take over what follows it.
        self.first = max(0, min([self.first_changed - 1, *(at[unit] for unit in self.inside)]))
        self.runs = [_Lockstep(runs, number, self.student, self.first) for number in range(len(self.chunks))]

    def units_to_fit(self) -> list[str]:
        """The teacher's units, in the order in which they run, at which there is something to fit or to refit."""
        there = {step.path for step in steps_of(self.student)}
        units = []
        for number, step in enumerate(self.teacher_steps):
            kept = self.placed.edited_path(self.unet, step.path) in there
            if kept and (step.path in self.inside or (number >= self.first and self.is_refitted(step.path))):
                units.append(step.path)
        return units

    def is_refitted(self, unit: str) -> bool:
        """Whether a unit is one of those to refit."""
        return self.refit != "none" and (self.refit_at is None or unit in self.refit_at)

    def fit_unit(self, unit: str) -> None:
        """Fit what the edits at a unit bring along, and refit the unit."""
        for path in self.inside.get(unit, ()):
            share = kept_share(self.placed.units[path])
            self.weights[path] = self._fit_slot(path) if share is None else self._fit_narrowing(path, share)
            self._go_on_with(self._student_so_far())
        if self.is_refitted(unit):
            self._refit(unit)

    def _fit_slot(self, path: str) -> dict[str, Tensor]:
        spec, module = conv_spec(self.placed.units[path]), self.unet.get_submodule(path)
        assert spec is not None
        inputs, outputs = slot_widths(self.unet, path)
        sums = BandSums.empty(groups_of(spec), inputs, outputs, spec.kernel, self.unet.device)
        there, behind = self.placed.edited_path(self.unet, path), self.placed.replaced[path][-1]
        for (first, _), lockstep in zip(self.chunks, self.runs, strict=True):
            step, state = lockstep.student_before(there)
            wanted = lockstep.teacher_behind(behind)
            sums.add(self.calibration, first, *slot_activations(step, module, state, wanted))
        return SlotFits(sums, self.calibration, module, [slice(0, outputs)]).state(spec)

    def _fit_narrowing(self, path: str, share: float) -> dict[str, Tensor]:
        there = self.placed.edited_path(self.unet, path)
        inside = InnerSums.empty(self.inner[path], self.unet.device)
        for (first, _), lockstep in zip(self.chunks, self.runs, strict=True):
            step, state = lockstep.student_before(_unit_of(there))
            with collecting(self.student, {there: inside}, self.calibration, first):
                take(step, state)
        return narrowed_state(self.unet.get_submodule(path), share, inside)

    def _refit(self, unit: str) -> None:
        there = self.placed.edited_path(self.unet, unit)
        step, _ = self.runs[0].student_before(there)
        module = step.modules[-1]
        if not projections_of(module):
            return
        student = {step.path: step for step in steps_of(self.student)}
        behind = last_absorbed(self.teacher_steps, student, partial(self.placed.edited_path, self.unet), unit)
        if behind == unit and self._is_untouched_up_to(unit):
            return
        sums = Refit(module, Refit.kind_for(module, "full" if self.refit == "full" else "scale"))
        for (first, _), lockstep in zip(self.chunks, self.runs, strict=True):
            step, state = lockstep.student_before(there)
            with sums.watching() as taken:
                output = take(step, state).hidden
            sums.add(self.calibration, first, taken, output, lockstep.teacher_behind(behind))
        found = sums.solve()
        if found:
            self.weights[unit] = {**self.weights.get(unit, {}), **found}
            put_tensors(self.student, there, found)
            self._go_on_with(self.student)

    def _is_untouched_up_to(self, unit: str) -> bool:
        """Whether the student is still the teacher, up to and with a unit."""
        at = [step.path for step in self.teacher_steps].index(unit)
        return shared_prefix(self.teacher_steps, steps_of(self.student)) > at

    def _student_so_far(self) -> UNet2DConditionModel:
        """The student with what is fitted; modules still to be narrowed are whole, convolutions still to come zero."""
        units = self.placed.units
        edits = {path: edit for path, edit in units.items() if kept_share(edit) is None or path in self.weights}
        return edited_copy(self.unet, edits, self.placed.drop_mid, self.placed.keep_levels, self.weights)

    def _go_on_with(self, student: UNet2DConditionModel) -> None:
        self.student = student
        for lockstep in self.runs:
            lockstep.student_steps = steps_of(student)


def _unit_of(path: str) -> str:
    """The unit that a sub-unit is a part of; a unit's own path."""
    return path.split(".transformer_blocks.", maxsplit=1)[0]


class _Lockstep:
    """Teacher and student on the same triples, each going on from where it was; the first `shared` steps are alike."""

    def __init__(self, teacher: TeacherRuns, chunk: int, student: UNet2DConditionModel, shared: int) -> None:
        self.teacher, self.chunk = teacher, chunk
        self.behind = {step.path: i + 1 for i, step in enumerate(teacher.steps)}
        self.student_steps = steps_of(student)
        self.student, self.student_at = teacher.state(chunk, shared), shared

    def student_before(self, unit: str) -> tuple[Step, State]:
        """A unit's step in the student, and the state before it."""
        while self.student_steps[self.student_at].path != unit:
            self.student = take(self.student_steps[self.student_at], self.student)
            self.student_at += 1
        return self.student_steps[self.student_at], self.student

    def teacher_behind(self, unit: str) -> Tensor:
        """The teacher's hidden state behind a unit."""
        return self.teacher.state(self.chunk, self.behind[unit]).hidden
