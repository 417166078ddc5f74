"""One sampling run: its own count of steps, the features that it has kept, and nothing of any other run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import Action
from asdm_compress.inheritance.corrections import Correction, CorrectionKey
from asdm_compress.inheritance.evaluator import Evaluator
from asdm_compress.inheritance.forecast import combine
from asdm_compress.inheritance.passes import NOTHING_GIVEN, Corrected, Given
from asdm_compress.inheritance.places import Feature
from asdm_compress.inheritance.program import Program, program_of
from asdm_compress.inheritance.run_plan import (
    DENOISED,
    DERIVED,
    DIFFERENCE,
    Kept,
    RunPlan,
    StepPlan,
    Use,
    forecast_from,
    needed_from,
)
from asdm_compress.inheritance.timeline import Timeline
from asdm_compress.models.call import UNetCall

Plain = Callable[[UNetCall], Tensor]


@dataclass(frozen=True, slots=True)
class Inspection:
    """All about one feature that a step is about to inherit, over the rows that it computes.

    `truth` is what it would be, computed in full from the run's own latents, `forecast` what the step takes it for and
    `last` its last computed value. `source` is the value that a correction looks at as the step will compute it,
    `source_forecast` and `source_last` are its forecast and its last value; all None where the step corrects nothing.
    """

    feature: Feature
    truth: Tensor
    forecast: Tensor
    last: Tensor
    source: Tensor | None = None
    source_forecast: Tensor | None = None
    source_last: Tensor | None = None


class Run:
    """A run of `len(actions)` evaluations, one `evaluate` each.

    With `guided` the rows of every call are two halves, without and with the prompt, in diffusers' order.
    `corrections` are looked up by `first_step` plus the run's count when a step needs them; where one is missing the
    forecast stands as it is, and so where a run that begins mid-way or anew forecasts from other steps than `whole`,
    the plan of the run that they were fitted along (this run's own, if it is not given). `plain` is the UNet's own
    forward pass for steps that do nothing else.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        actions: Sequence[Action],
        timeline: Timeline,
        guided: bool = False,
        corrections: Mapping[CorrectionKey, Correction] | None = None,
        first_step: int = 0,
        plain: Plain | None = None,
        whole: RunPlan | None = None,
    ) -> None:
        if len(actions) != len(timeline):
            raise AsdmError(f"{len(actions)} actions were given for a run of {len(timeline)} evaluations")
        self.evaluator, self.actions, self.timeline, self.guided = evaluator, tuple(actions), timeline, guided
        self.corrections: Mapping[CorrectionKey, Correction] = {} if corrections is None else corrections
        self.first_step, self.plain = first_step, plain
        self.step = 0
        self._planned_from = 0
        self._plan = evaluator.plan(self.actions, timeline, guided)
        self._fitted_from = forecast_from(whole, 0) if whole else forecast_from(self._plan, first_step)
        self._forecast_from = forecast_from(self._plan, first_step)
        self._kept: dict[Kept, Tensor] = {}
        self._seen: tuple[object, ...] | None = None

    @property
    def finished(self) -> bool:
        """Whether all evaluations are made; nothing is held any more then."""
        return self.step == len(self.actions)

    @property
    def held_bytes(self) -> int:
        """Bytes of the tensors that the run holds for later steps."""
        # Told apart by themselves and not by their memory, of which the meta device has none.
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in self._kept.values()}
        return sum(storages.values())

    @property
    def plan(self) -> tuple[StepPlan, ...]:
        """What is done at every step since the run began, or last began anew."""
        return self._plan.steps

    def fork(self) -> Run:
        """A second run that goes on from this moment; the tensors held are shared, never changed."""
        twin = copy.copy(self)
        twin._kept = dict(self._kept)
        return twin

    def branch(self, plan: RunPlan) -> Run:
        """A fork that goes on by another plan, whose steps so far are this run's own and of which it has kept all that
        is needed (see `Evaluator.plan_forks`)."""
        twin = self.fork()
        twin.actions, twin._plan = tuple(step.action for step in plan.steps), plan
        twin._forecast_from = forecast_from(plan, self.first_step)
        twin._kept = {kept: self._kept[kept] for kept in needed_from(plan, self.step)}
        return twin

    def evaluate(self, call: UNetCall, guided: bool | None = None) -> Tensor:
        """The next prediction (B, C, H, W), all rows of it.

        Calls with other rows, sizes, types or guidance than the last one begin anew: this step computes everything.
        Raises AsdmError when the run is over.
        """
        step = self._current(call, self.guided if guided is None else guided)
        active = call.second_half() if step.conditional_only else call
        recorded: tuple[Tensor, ...] = ()
        if step.program.is_plain and self.plain is not None:
            prediction = self._plainly(step, active)
            # What is compiled, by us or by whoever made the UNet, may put the next prediction where this one lies.
            recorded = (prediction.clone(),) * len(step.program.recorded) if step.program.recorded else ()
        else:
            timestep = self.timeline.timesteps[self.step]
            evaluator = self.evaluator.of(step.action.member)
            prediction, recorded = evaluator.evaluate(step.program, active, self._given(step, active), timestep)
        self._keep(step, dict(zip(step.program.recorded, recorded, strict=True)))
        if step.difference is not None:
            prediction = torch.cat((prediction - self._value(step.difference), prediction))
        self._keep_derived(step, call, prediction)
        for kept in step.forgets:
            self._kept.pop(kept, None)
        self.step += 1
        if self.finished:
            self._kept.clear()
        return prediction

    def _plainly(self, step: StepPlan, call: UNetCall) -> Tensor:
        """The prediction by the own forward pass of the UNet, or of the member, that computes the step."""
        assert self.plain is not None
        if step.action.member is None:
            return self.plain(call)
        unet = self.evaluator.of(step.action.member).unet
        return unet(**call.arguments(), return_dict=False)[0]  # type: ignore[no-any-return]

    def inspect(self, call: UNetCall, guided: bool | None = None) -> tuple[Inspection, ...]:
        """What the next step would inherit, beside the truth from a full pass of the same call; the run stays as it is.

        This is what corrections are fitted from, along the trajectory that the run itself has taken. Sources are those
        that the step will have, after what it inherits upstream of them, with the corrections there that are fitted.
        """
        step = self._current(call, self.guided if guided is None else guided)
        active = call.second_half() if step.conditional_only else call
        member, graph = step.action.member, self._plan.graph_of(step)
        sources = {feature: Feature(value).of(member) for feature, value in step.program.corrections.items()}
        truth = self._recorded(program_of(graph, (), step.program.taken), active, member=member)
        # Corrections look at what the step itself will have there, which is not the truth where the step inherits
        # something before it.
        seen = program_of(graph, step.program.taken, list(sources.values()), step.program.corrections)
        here = self._recorded(seen, active, self._given(step, active), member) if sources else {}
        found = []
        for use in step.uses:
            source = sources.get(use.feature)
            more: tuple[Tensor, ...] = ()
            if source is not None:
                looked_at = step.sources[use.feature]
                more = (here[source], self._value(looked_at), self._value(looked_at.last()))
            taken = (self._value(use, active), self._value(use.last(), active))
            found.append(Inspection(use.feature, truth[use.feature], *taken, *more))
        return tuple(found)

    def _recorded(
        self, program: Program, call: UNetCall, given: Given = NOTHING_GIVEN, member: str | None = None
    ) -> dict[Feature, Tensor]:
        evaluator = self.evaluator.of(member)
        _, recorded = evaluator.evaluate(program, call, given, self.timeline.timesteps[self.step])
        return dict(zip(program.recorded, recorded, strict=True))

    def release(self) -> None:
        """Forget all features; steps that still follow begin anew."""
        self._kept.clear()
        self._seen = ()  # unlike any call

    def _current(self, call: UNetCall, guided: bool) -> StepPlan:
        if self.finished:
            raise AsdmError(f"a run of {len(self.actions)} evaluations was asked for one more")
        seen = (call.sample.shape, call.sample.dtype, call.sample.device, guided)
        if self._seen != seen:
            if self._seen is not None or guided != self.guided:
                self._restart(guided)
            self._seen = seen
        return self._plan.steps[self.step - self._planned_from]

    def _restart(self, guided: bool) -> None:
        self._kept.clear()
        self.guided, self._planned_from = guided, self.step
        self._plan = self.evaluator.plan(self.actions[self.step :], self.timeline.since(self.step), guided)
        self._forecast_from = forecast_from(self._plan, self.first_step + self.step)

    def _given(self, step: StepPlan, call: UNetCall) -> Given:
        values = [self._value(use, call) for use in step.uses]
        needed: dict[Feature, Corrected] = {}
        for use in step.uses:
            correction = self._correction(use.feature) if use.feature in step.sources else None
            if correction is not None:
                source = step.sources[use.feature]
                needed[use.feature] = Corrected(
                    self._value(source), self._value(source.last()), self._value(use.last()), correction
                )
        return Given(values, needed)

    def _correction(self, feature: Feature) -> Correction | None:
        """What was fitted for this step, if it was to this very forecast."""
        key = (self.first_step + self.step, feature.name)
        if self._fitted_from.get(key) != self._forecast_from[key]:
            return None
        return self.corrections.get(key)

    def _value(self, use: Use, call: UNetCall | None = None) -> Tensor:
        """A forecast from what is kept, for all groups of rows that the step computes, which are those of `call`."""
        parts = [combine([self._kept[k] for k in kept], factors) for kept, factors in use.groups]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        if use.denoised is None:
            return value
        assert call is not None
        of_input, of_prediction = use.denoised
        return ((value - of_input * _latents(call, value).float()) / of_prediction).to(call.sample.dtype)

    def _keep(self, step: StepPlan, recorded: Mapping[Feature, Tensor]) -> None:
        for kept in step.keeps:
            feature, rows, _ = kept
            if feature in DERIVED:
                continue
            tensor = recorded[feature]
            if rows != "all" and not step.conditional_only:
                # Halves of their own: a view of one would keep the other's memory.
                tensor = tensor.chunk(2)[0 if rows == "unconditional" else 1].clone()
            self._kept[kept] = tensor

    def _keep_derived(self, step: StepPlan, call: UNetCall, prediction: Tensor) -> None:
        for kept in step.keeps:
            feature, rows, _ = kept
            if feature == DIFFERENCE:
                unconditional, conditional = prediction.chunk(2)
                self._kept[kept] = conditional - unconditional
            elif feature == DENOISED:
                own, latents = prediction, _latents(call, prediction)
                if rows != "all":
                    own, latents = (x.chunk(2)[0 if rows == "unconditional" else 1] for x in (own, latents))
                of_input, of_prediction = self.timeline.denoised(self.step)
                # A difference of what may be large: half precision would leave little of it.
                self._kept[kept] = of_input * latents.float() + of_prediction * own.float()


def _latents(call: UNetCall, like: Tensor) -> Tensor:
    """The latents of a call: its first channels, of which inpainting UNets and their like have more."""
    return call.sample[:, : like.shape[1]]
