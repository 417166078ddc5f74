"""What an enabled pipeline carries: its rule, and what all its runs share."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch._dynamo.eval_frame import OptimizedModule

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.corrections import Correction, CorrectionKey
from asdm_compress.inheritance.dispatcher import Forward, attach_to, compiled_in_place, leave
from asdm_compress.inheritance.evaluator import Evaluator
from asdm_compress.inheritance.members import HasMembers
from asdm_compress.inheritance.run import Plain
from asdm_compress.inheritance.schedule import Rule, Schedule
from asdm_compress.inheritance.validity import ModelMark, mark_of
from asdm_compress.models.call import UNetCall
from asdm_compress.models.families import check_supported

Corrections = Mapping[CorrectionKey, Correction]
# A rule's own, and what became of them for a device and a type.
_Moved = tuple[Corrections, torch.device, torch.dtype, Corrections]
COMPILED: Final[Mapping[str, Any]] = {"fullgraph": True}


class Attachment:
    """The rule of one pipeline, and the programs, plans and compiled passes for the UNet that it has now.

    Raises AsdmError for a pipeline whose UNet is not of the Stable Diffusion kind, and for a rule that does not fit it.
    """

    def __init__(self, pipeline: DiffusionPipeline, rule: Rule, compile_options: Mapping[str, Any] | None) -> None:
        self.rule, self.compile_options = rule, compile_options
        self.compiled: OptimizedModule | None = None
        self.unet, self.compiled = _opened(pipeline)
        self.notices: set[str] = set()  # given already
        self._moved: _Moved | None = None
        self._renew()

    @functools.cached_property
    def mark(self) -> ModelMark:
        """Which model this is, read once."""
        return mark_of(self.unet)

    def install(self, pipeline: DiffusionPipeline) -> None:
        """Let the UNet ask for runs; a compiled one is opened, since its passes are compiled one by one."""
        attach_to(self.unet, self)
        if self.compiled is not None:
            pipeline.unet = self.unet

    def uninstall(self, pipeline: DiffusionPipeline) -> None:
        """Give the UNet its own forward back, unless other pipelines need it still."""
        leave(self.unet, self)
        if self.compiled is not None and pipeline.unet is self.unet:
            pipeline.unet = self.compiled

    def follow(self, pipeline: DiffusionPipeline) -> None:
        """Notice that the pipeline's UNet has been replaced, compiled, or given hooks."""
        if pipeline.unet is not self.unet:
            unet, compiled = _opened(pipeline)
            if unet is not self.unet:
                leave(self.unet, self)
                self.__dict__.pop("mark", None)
            self.unet, self.compiled = unet, compiled
            self._renew()
        elif self.evaluator.compile_options is None and compiled_in_place(self.unet) is not None:
            self._renew()
        self.install(pipeline)

    def plain(self, before: Forward) -> Plain:
        """A whole pass of the UNet as steps of a run make it; `before` is the UNet's own forward."""
        # The forward of a UNet with members follows a schedule of its own; the run has one already.
        return self.outside(self.unet.body_forward if isinstance(self.unet, HasMembers) else before)

    def outside(self, before: Forward) -> Plain:
        """The whole pass as the pipeline does it when it is not enabled, for calls that are no step of a run."""
        made = (self.compiled, compiled_in_place(self.unet), before)
        called: Forward = next(found for found in made if found is not None)

        def plain(call: UNetCall) -> Tensor:
            return called(**call.arguments(), return_dict=False)[0]  # type: ignore[no-any-return]

        return plain

    def corrections_on(self, rule: Schedule, like: Tensor) -> Corrections:
        """A rule's corrections with the device and type of `like`, moved once for all runs that have these."""
        moved = self._moved
        if moved is None or moved[0] is not rule.corrections or moved[1:3] != (like.device, like.dtype):
            there = {key: correction.on(like) for key, correction in rule.corrections.items()}
            moved = self._moved = (rule.corrections, like.device, like.dtype, there)
        return moved[3]

    @property
    def is_compiled(self) -> bool:
        """Whether the pipeline's UNet is compiled when it is not enabled."""
        return self.compiled is not None or compiled_in_place(self.unet) is not None

    def _renew(self) -> None:
        options = self.compile_options
        if options is None and self.is_compiled:
            options = COMPILED
        self.evaluator = Evaluator(self.unet, options)
        self.evaluator.check(self.rule.actions if isinstance(self.rule, Schedule) else (self.rule.light,))


def _opened(pipeline: DiffusionPipeline) -> tuple[UNet2DConditionModel, OptimizedModule | None]:
    """A pipeline's UNet, and what `torch.compile` has put around it."""
    unet = getattr(pipeline, "unet", None)
    compiled = unet if isinstance(unet, OptimizedModule) else None
    if compiled is not None:
        unet = compiled._orig_mod
    if not isinstance(unet, UNet2DConditionModel):
        raise AsdmError(f"{type(pipeline).__name__} has no UNet of the Stable Diffusion kind")
    check_supported(unet)
    return unet, compiled
