"""One call of an enabled pipeline, from which its run takes its steps."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from asdm_compress.inheritance.attachment import Attachment
from asdm_compress.inheritance.corrections import Correction, CorrectionKey
from asdm_compress.inheritance.dispatcher import Forward
from asdm_compress.inheritance.members import HasMembers, with_own_members
from asdm_compress.inheritance.remapping import CarriedOver, for_this_run
from asdm_compress.inheritance.run import Run
from asdm_compress.inheritance.schedule import Schedule, actions_of
from asdm_compress.inheritance.timeline import timeline_of
from asdm_compress.inheritance.validity import validity_of
from asdm_compress.models.call import UNetCall


class OpenRun:
    """One call of an enabled pipeline. The run itself begins with the first call of the UNet, when all is known."""

    def __init__(self, pipeline: DiffusionPipeline, attachment: Attachment) -> None:
        self.pipeline, self.attachment = pipeline, attachment
        self.run: Run | None = None
        self.timesteps: Tensor | None = None
        self._shares = False

    @property
    def unet(self) -> UNet2DConditionModel:
        """The UNet whose calls belong to this run."""
        return self.attachment.unet

    @property
    def guided(self) -> bool:
        """Whether a call's rows are two halves, without and with the prompt."""
        # Three parts: one more for the image that is edited, or for the perturbed attention.
        three = hasattr(type(self.pipeline), "image_guidance_scale") or getattr(
            self.pipeline, "do_perturbed_attention_guidance", False
        )
        return bool(getattr(self.pipeline, "do_classifier_free_guidance", False)) and not three

    def evaluate(self, call: UNetCall, before: Forward) -> Tensor:
        """The prediction: the run's next step, or the UNet's own where this call is not that."""
        if self.run is None or self.pipeline.scheduler.timesteps is not self.timesteps:
            self.run = self._begin(call, before)
        if self.run.finished or not self._is_next(call):
            return self.attachment.outside(before)(call)
        return self.run.evaluate(call, self.guided)

    def close(self) -> None:
        """Let go of all features, also of a run that did not come to its end."""
        if self.run is not None:
            self.run.release()
        self.run = self.timesteps = None

    def _begin(self, call: UNetCall, before: Forward) -> Run:
        scheduler, attachment = self.pipeline.scheduler, self.attachment
        self.timesteps, self._shares = scheduler.timesteps, False
        timeline = timeline_of(scheduler)
        start = self._start(call, len(timeline))
        rule = attachment.rule
        corrections: Mapping[CorrectionKey, Correction] = {}
        whole = None
        if isinstance(rule, Schedule):
            if rule.validity is not None:
                seen = validity_of(self.pipeline, timeline, call.sample, attachment.mark)
                rule, notice = for_this_run(rule, rule.validity, seen)
                if notice is not None and notice not in attachment.notices:
                    attachment.notices.add(notice)
                    warnings.warn(notice, CarriedOver, stacklevel=2)
            # Moved before the run: within it nothing waits for the device.
            corrections = attachment.corrections_on(rule, call.sample)
            if start and corrections:
                all_of_them = with_own_members(self.unet, actions_of(rule, timeline, 0), timeline, 0)
                whole = attachment.evaluator.plan(all_of_them, timeline, self.guided)
        actions = with_own_members(self.unet, actions_of(rule, timeline, start), timeline, start)
        # Who asks for compiled passes of a UNet that is not compiled gets them for whole passes too. So does a compiled
        # one with members: what compiles its forward compiles its own schedule.
        is_own = not attachment.is_compiled or isinstance(self.unet, HasMembers)
        ours = attachment.evaluator.compile_options is not None and is_own
        plain = None if ours else attachment.plain(before)
        since = timeline.since(start)
        return Run(attachment.evaluator, actions, since, self.guided, corrections, start, plain, whole)

    def _start(self, call: UNetCall, evaluations: int) -> int:
        """The evaluation that a run begins with: 0, or a later one in pipelines such as image-to-image."""
        place = self._place(call)
        if place is not None:
            return place
        return evaluations - int(getattr(self.pipeline, "num_timesteps", None) or evaluations)

    def _place(self, call: UNetCall) -> int | None:
        """Which of the scheduler's timesteps the given one is, told by its memory; None where it is none of them."""
        given, all_of_them = call.timestep, self.timesteps
        assert all_of_them is not None
        if not isinstance(given, Tensor) or given.device.type == "meta" or all_of_them.device.type == "meta":
            return None
        if given.untyped_storage().data_ptr() != all_of_them.untyped_storage().data_ptr():
            return None
        apart = max(all_of_them.stride(0), 1) * all_of_them.element_size()
        place = (given.data_ptr() - all_of_them.data_ptr()) // apart
        return place if 0 <= place < len(all_of_them) else None

    def _is_next(self, call: UNetCall) -> bool:
        """Whether the timestep given is the very one that the scheduler has for the next step.

        A callback may call the UNet for purposes of its own. Timesteps that are no part of the scheduler's tensor tell
        nothing, and are taken for the next unless others were part of it.
        """
        run, place = self.run, self._place(call)
        assert run is not None
        if place is None:
            return not self._shares
        self._shares = True
        return place == run.first_step + run.step
