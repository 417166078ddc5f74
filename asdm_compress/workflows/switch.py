"""`switch`: a teacher and its students as one model, of which every sampling step runs the one that is its."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import check_apart, check_space, output_folder
from asdm_compress.core.units import format_bytes
from asdm_compress.inheritance.actions import Action
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.schedule_file import load_schedule, save_schedule
from asdm_compress.inheritance.timeline import timeline_of
from asdm_compress.models.families import latent_size_of
from asdm_compress.models.loading import open_pipeline, open_unet, with_parts
from asdm_compress.models.resolve import resolve
from asdm_compress.models.saving import save_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.profiling.counting import count_row_macs
from asdm_compress.sampling.own_steps import save_own_steps
from asdm_compress.sampling.schedulers import evaluations, make_scheduler
from asdm_compress.switching.orders import ORDER_GRAMMAR, parse_order
from asdm_compress.switching.schedules import SwitchingSchedule, noise_of
from asdm_compress.switching.switched_unet import SwitchedUNet2DConditionModel
from asdm_compress.workflows.progress import Progress

_FILES: Final = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class SwitchSettings:
    """`order` is written as in `switching.orders`, or the path of a schedule's file; `steps` are those of the
    scheduler, which is the teacher's own where none is named, and is ignored for a file."""

    order: str
    steps: int
    scheduler: str | None = None


@dataclass(frozen=True, slots=True)
class SwitchResult:
    """What was written: how many of the steps each member takes, and what the members take together and apart."""

    out: Path
    steps: Mapping[str, int]
    together: int
    apart: int

    def lines(self) -> list[str]:
        """For the terminal."""
        counted = ", ".join(f"{count} of {name}" for name, count in self.steps.items())
        return [
            f"Steps: {counted}.",
            f"The members take {format_bytes(self.together)} together, where apart they would take "
            f"{format_bytes(self.apart)}.",
        ]

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "out": str(self.out), "steps": dict(self.steps), "bytes": self.together, "bytes_apart": self.apart,
        }  # fmt: skip


def run_switch(
    models: Sequence[str],
    out: Path,
    options: LoadOptions,
    settings: SwitchSettings,
    progress: Progress,
    overwrite: bool = False,
) -> SwitchResult:
    """Write a pipeline folder whose UNet is switched; of the models the first, a whole pipeline, gives the other parts.

    Raises AsdmError for fewer than two models, for members that cannot stand in for one another, and for a schedule
    that does not fit them.
    """
    check_apart(out, overwrite, models)
    pipeline, members = open_members(models, options, progress, settings.scheduler)
    with progress.stage("Sharing what the members have in common"):
        schedule = schedule_of(pipeline, members, settings)
        switched = SwitchedUNet2DConditionModel.of(members, schedule)
    together, apart = parameter_bytes([switched]), sum(parameter_bytes([unet]) for unet in members.values())
    check_space(out, together)
    whole = switched_pipeline(pipeline, switched)
    with progress.stage("Writing"), output_folder(out, overwrite) as aside:
        save_pipeline(whole, aside)
        save_schedule(Schedule(schedule.actions), aside / "switching.yaml")
        steps = len(schedule.actions) if _is_file(settings.order) else settings.steps
        # Of a file for a scheduler that calls the UNet more than once per step nobody knows the steps.
        if evaluations(whole.scheduler, steps) == len(schedule.actions):
            save_own_steps(aside, whole, steps)
    names = [_what(action, switched) for action in schedule.actions]
    return SwitchResult(out, {name: names.count(name) for name in dict.fromkeys(names)}, together, apart)


def open_members(
    models: Sequence[str], options: LoadOptions, progress: Progress, scheduler: str | None = None
) -> tuple[StableDiffusionPipeline, dict[str, UNet2DConditionModel]]:
    """As `open_models`; raises AsdmError for fewer than two models."""
    if len(models) < 2:
        raise AsdmError("switching takes a teacher and at least one other model", "Name a student beside it.")
    return open_models(models, options, progress, scheduler)


def open_models(
    models: Sequence[str], options: LoadOptions, progress: Progress, scheduler: str | None = None
) -> tuple[StableDiffusionPipeline, dict[str, UNet2DConditionModel]]:
    """The first model's pipeline and the UNets of all by name, in one precision: the first one's own, if none is asked
    for. Of a switched model behind the first these are its members without the first model itself."""
    members: dict[str, UNet2DConditionModel] = {}
    pipeline: StableDiffusionPipeline | None = None
    opened: dict[Path, str] = {}
    for model in models:
        with progress.stage(f"Opening {model}"):
            source = resolve(model, options, beside=pipeline is not None)
            if source.path is not None and source.path.resolve() in opened:
                raise AsdmError(
                    f"{model} is given twice, before as {opened[source.path.resolve()]}", "Name every member once."
                )
            if source.path is not None:
                opened[source.path.resolve()] = model
            if pipeline is None:
                pipeline = open_pipeline(source, options)
                found = {_name_of(model): pipeline.unet}
            else:
                other = open_unet(source, options)
                if other.dtype != pipeline.unet.dtype:
                    other = other.to(pipeline.unet.dtype)  # else it would share nothing
                found = _apart(model, other, pipeline.unet)
        for note in source.notes:
            progress.note(note)
        for name, unet in found.items():
            members[_free_name(name, members)] = unet
    assert pipeline is not None
    if scheduler:
        pipeline.scheduler = make_scheduler(scheduler, pipeline)
    return pipeline, members


def _apart(model: str, unet: UNet2DConditionModel, teacher: UNet2DConditionModel) -> dict[str, UNet2DConditionModel]:
    """A UNet by its folder's name, and of one that is switched the members that are not the teacher, by theirs."""
    if not isinstance(unet, SwitchedUNet2DConditionModel):
        return {_name_of(model): unet}
    members = {name: unet.alone(name) for name in unet.member_names}
    return {name: member for name, member in members.items() if not _equal(member, teacher)}


def _name_of(model: str) -> str:
    return Path(model).name or Path(model).resolve().name or model


def _equal(one: UNet2DConditionModel, other: UNet2DConditionModel) -> bool:
    """Whether two UNets have the same tensors."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def schedule_of(
    pipeline: StableDiffusionPipeline, members: Mapping[str, UNet2DConditionModel], settings: SwitchSettings
) -> SwitchingSchedule:
    """The schedule for a pipeline's sampler; raises AsdmError for one that does not fit the members."""
    actions: tuple[Action, ...] | None = None
    steps = settings.steps
    if _is_file(settings.order):
        actions = load_schedule(Path(settings.order)).actions
        steps = len(actions)
    elif ":" not in settings.order:
        raise AsdmError(
            f"{settings.order!r} is neither an order nor a schedule's file", f"Orders are written like {ORDER_GRAMMAR}."
        )
    scheduler = copy.deepcopy(pipeline.scheduler)  # see `sampler_timeline`
    scheduler.set_timesteps(steps)
    timeline = timeline_of(scheduler)
    if actions is not None and len(actions) != len(timeline):
        raise AsdmError(
            f"{settings.order} has {steps} actions, and {type(scheduler).__name__} calls the UNet {len(timeline)} "
            f"times in {steps} steps: it is for another sampler",
            "Name the sampler that it was calibrated for with --scheduler.",
        )
    if actions is None:
        actions = parse_order(settings.order, by_size(pipeline, members), len(timeline))
    unknown = [a.member for a in actions if a.member is not None and a.member not in members]
    if unknown:
        raise AsdmError(f"the schedule names a member {unknown[0]!r}", f"There are {', '.join(members)}.")
    return SwitchingSchedule(actions, timeline.timesteps, noise_of(scheduler))


def by_size(pipeline: StableDiffusionPipeline, members: Mapping[str, UNet2DConditionModel]) -> list[str]:
    """The members' names, from the one that computes least to the one that computes most."""
    tokens = int(pipeline.tokenizer.model_max_length)
    size = latent_size_of(pipeline.unet)
    macs = {name: count_row_macs(unet, size, size, tokens)[""].total for name, unet in members.items()}
    return sorted(macs, key=lambda name: macs[name])


def _is_file(order: str) -> bool:
    return Path(order).suffix in _FILES


def switched_pipeline(
    pipeline: StableDiffusionPipeline, switched: SwitchedUNet2DConditionModel
) -> StableDiffusionPipeline:
    """The pipeline with this UNet in the place of its own."""
    return with_parts(pipeline, unet=switched)


def parameter_bytes(unets: Sequence[UNet2DConditionModel]) -> int:
    """The bytes of all different tensors."""
    found = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for unet in unets for p in unet.parameters()}
    return sum(found.values())


def _what(action: Action, switched: SwitchedUNet2DConditionModel) -> str:
    if action.skips:
        return "skip"
    member = action.member or switched.member_names[0]
    return member if action.is_whole else f"{member}, inheriting"


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    number, free = 2, name
    while free in taken or free == "skip":
        number, free = number + 1, f"{name}-{number}"
    return free
