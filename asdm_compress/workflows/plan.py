"""`plan`: from a pipeline and a budget to a verified plan, with everything that was measured on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from asdm_compress.assembly.attempts import Search
from asdm_compress.assembly.calibration import DEFAULT_BANDS, Calibration, Effort, check_bands, record
from asdm_compress.assembly.damage import Damage
from asdm_compress.assembly.duration import measuring_time
from asdm_compress.assembly.option_fit import fitting_places, measure_options
from asdm_compress.assembly.options import (
    Finest,
    Option,
    SlotChoice,
    check_finest,
    find_options,
    is_coarse_enough,
    slot_specs,
    teacher_costs,
    useful_options,
)
from asdm_compress.assembly.plan import check_teacher
from asdm_compress.assembly.plan_fit import RefitChoice, check_refit, for_memory, scaled_for_memory
from asdm_compress.assembly.search import check_reachable
from asdm_compress.assembly.slot_fit import check_fits, check_prompts
from asdm_compress.assembly.store import TRIPLES, measurement_folder, recorded
from asdm_compress.assembly.verify import Verified, search_verified
from asdm_compress.core.defaults import (
    CALIBRATION_PROMPTS,
    EXPERTS,
    HELD_OUT_PROMPTS,
    NARROW_SHARES,
    NEIGHBOURS_SECONDS,
)
from asdm_compress.core.edits import SHARED, Routing, has_weights
from asdm_compress.core.processes import ALONE, Processes
from asdm_compress.core.units import Limit, format_duration, parse_budget
from asdm_compress.evaluation.prompts import PromptSplit, choose_prompts
from asdm_compress.models.precision import measured_in
from asdm_compress.profiling.profile import (
    Profile,
    ProfileSettings,
    check_fingerprint,
    fingerprint,
    load_profile,
    profile,
)
from asdm_compress.profiling.slot_costs import places_of, slot_costs
from asdm_compress.sampling.run import check_one_evaluation_per_step
from asdm_compress.sampling.schedulers import choose_scheduler
from asdm_compress.sampling.settings import SamplingSettings, check_not_offloaded, check_text_to_image
from asdm_compress.workflows.progress import Progress, Silent

LONG: Final = 3600.0  # seconds


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """Everything that changes a plan besides the model and the budget.

    `prompts` are a user's own; `known_profile` is a `profile.json` to use instead of profiling again. `slot`, `experts`
    (None is the usual number) and `routing` say which convolutions the search may put into the places of what it takes
    out, `narrow` to which shares of their inner width ResNets, attentions and feed-forwards may be narrowed, `finest`
    the smallest parts that it may edit, and `refit` how much of what stays is solved anew after the cut (see
    `assembly.refit`); `exact` that it may use edits that compute the same function in less time. `measure_dtype` is the
    precision of the UNet that errors are measured on and fits are made to (see `models.precision`); times are those of
    the pipeline's own. For
    `neighbours_seconds` plans are tried that are like the best one, and within as many those of
    like damage once more.
    """

    profile: ProfileSettings = field(default_factory=ProfileSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    scheduler: str | None = None
    prompts: tuple[str, ...] | None = None
    calibration_prompts: int = CALIBRATION_PROMPTS
    held_out_prompts: int = HELD_OUT_PROMPTS
    bands: int = DEFAULT_BANDS
    effort: Effort = field(default_factory=Effort)
    known_profile: Path | None = None
    slot: SlotChoice = "auto"
    experts: int | None = None
    routing: Routing = "timestep"
    narrow: tuple[float, ...] = NARROW_SHARES
    finest: Finest = "sub-unit"
    refit: RefitChoice = "full"
    exact: bool = True
    measure_dtype: torch.dtype | None = None
    neighbours_seconds: float = NEIGHBOURS_SECONDS

    @property
    def experts_of_bands(self) -> int:
        """Of a routed convolution: what was asked for, or the usual, of which each has a timestep band of its own."""
        return min(EXPERTS, self.bands) if self.experts is None else self.experts


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that a search goes by: what every possible edit saves, and what it damages.

    `calibration` is what plans are fitted to, as much of it as there is memory for; `of_options` what single edits were
    fitted to and measured on. `teacher` is the UNet of all of them, in the precision that errors are measured in.
    """

    teacher: UNet2DConditionModel
    limits: Sequence[Limit]
    shape: ProfileSettings
    profile: Profile
    prompts: PromptSplit
    calibration: Calibration
    options: Sequence[Option]
    damages: Mapping[str, Damage]
    plain_damages: Mapping[str, Damage]
    of_options: tuple[Calibration, Calibration]


@dataclass(frozen=True, slots=True)
class PlanResult:
    """A verified plan and what it was found with."""

    verified: Verified
    profile: Profile
    prompts: PromptSplit
    calibration: Calibration
    options: Sequence[Option]
    damages: Mapping[str, Damage]
    plain_damages: Mapping[str, Damage]


def plan(
    pipeline: StableDiffusionPipeline,
    budget: str | Sequence[Limit],
    settings: PlanSettings | None = None,
    progress: Progress | None = None,
    model_name: str = "model",
) -> PlanResult:
    """The plan with the least summed damage whose measured student keeps the budget, for example "latency=0.7x".

    Where pairs of edits had to be measured, the one of least measured damage of the plans searched (see `verify`).

    Measurements are kept on disk by content. The pipeline is left as it was, except for its scheduler where the
    settings name one, and the UNet's layout in memory. Raises AsdmError for what cannot be planned, with exit code 3
    for a budget that cannot be met.
    """
    settings, progress = settings or PlanSettings(), progress or Silent()
    limits = parse_budget([budget]) if isinstance(budget, str) else budget
    return choose(pipeline, measure(pipeline, limits, settings, progress, model_name), settings, progress)


def choose(
    pipeline: StableDiffusionPipeline, measured: Measured, settings: PlanSettings, progress: Progress
) -> PlanResult:
    """The plan that the measurements call for. Raises AsdmError, with exit code 3 where no plan keeps the limits."""
    m = measured
    with progress.stage("Searching, fitting and verifying the plan"):
        search = Search(
            m.teacher, m.profile, m.options, m.damages, m.limits, m.shape, m.calibration, settings.refit,
            settings.neighbours_seconds, m.plain_damages, m.of_options, pipeline.unet,
        )  # fmt: skip
        verified = search_verified(search)
    return PlanResult(verified, m.profile, m.prompts, m.calibration, m.options, m.damages, m.plain_damages)


def measure(
    pipeline: StableDiffusionPipeline,
    limits: Sequence[Limit],
    settings: PlanSettings,
    progress: Progress,
    model_name: str,
    processes: Processes = ALONE,
) -> Measured:
    """Profile the teacher, find every edit that helps to keep the limits, and measure its damage.

    The main one of several processes does the timing, alone; they share the recording and the damages, and each has the
    whole result. Raises AsdmError for what cannot be planned.
    """
    specs = slot_specs(settings.slot, settings.experts_of_bands, settings.routing, limits)
    check_fits(specs, settings.bands)
    check_refit(settings.refit)
    check_finest(settings.finest)
    teacher, sampling = pipeline.unet, settings.sampling
    check_teacher(teacher)
    check_not_offloaded(pipeline)
    check_text_to_image(pipeline)
    check_bands(sampling.steps, settings.bands)
    _choose_scheduler(pipeline, settings, progress if processes.is_main else Silent())
    prompts = _prompts(pipeline, settings, progress if processes.is_main else Silent())
    is_fitted = bool(specs or settings.narrow or settings.refit != "none")
    if is_fitted:
        check_prompts(len(prompts.calibration))
    shape = replace(settings.profile, text_tokens=int(pipeline.tokenizer.model_max_length))
    if shape.channels_last:  # here for all: a known profile runs no pass, nor do processes that do not time
        teacher.to(memory_format=torch.channels_last)
    processes.wait()  # until the others are still
    with progress.stage("Profiling"):
        costs = processes.on_main(lambda: _costs(teacher, shape, settings, model_name))
    processes.wait()
    with progress.stage("Timing convolutions in slots and narrower modules"):
        options = processes.on_main(lambda: _options(teacher, costs, limits, shape, settings))
    check_reachable(options, teacher_costs(costs), limits)
    _note_duration(costs, settings, prompts, options, is_fitted, progress if processes.is_main else Silent())
    pipeline = measured_in(pipeline, settings.measure_dtype)  # from here on nothing is timed
    teacher = pipeline.unet
    folder = measurement_folder(
        pipeline, prompts.calibration, sampling, settings.bands, settings.effort, shape.channels_last
    )
    with progress.bar("Recording the teacher's trajectories") as bar:
        calibration = recorded(
            folder / TRIPLES,
            lambda: record(
                pipeline, prompts.calibration, sampling, settings.bands, bar, None, settings.effort, processes
            ),
            processes,
        ).to(pipeline.device)
    calibration = replace(calibration, held_out=is_fitted)
    of_options = calibration.for_options()
    _note_empty_bands(of_options[1], settings, progress, processes)
    refit = settings.refit == "full"
    if refit and (scaled := scaled_for_memory(teacher)) and processes.is_main:
        progress.note(f"{len(scaled)} modules are too wide for the memory here and are refitted by scales alone")
    with progress.bar("Fitting and measuring the damage of every edit") as bar:
        plain_store = folder / ("damages.jsonl" if is_fitted else "damages_unfitted.jsonl")
        store = folder / "damages_refitted.jsonl" if refit else plain_store
        damages = measure_options(teacher, options, calibration, store, bar, refit, processes)
    plain: dict[str, Damage] = {}
    if refit:
        cuts = [option for option in options if not has_weights(option.edit)]
        with progress.bar("Measuring what nothing makes up for") as bar:
            plain = measure_options(teacher, cuts, calibration, plain_store, bar, False, processes)
    if is_fitted:
        calibration = _held(teacher, calibration, progress if processes.is_main else Silent())
    return Measured(teacher, limits, shape, costs, prompts, calibration, options, damages, plain, of_options)


def _held(teacher: UNet2DConditionModel, calibration: Calibration, progress: Progress) -> Calibration:
    """What plans are fitted to: as much as there is memory for."""
    held = for_memory(teacher, calibration)
    if len(held) < len(calibration):
        progress.note(f"plans are fitted to {len(held)} of {len(calibration)} triples: more do not fit into the memory")
    return held


def _note_duration(
    costs: Profile,
    settings: PlanSettings,
    prompts: PromptSplit,
    options: Sequence[Option],
    is_fitted: bool,
    progress: Progress,
) -> None:
    """Say how long it will take where that is long: nobody should find out by waiting."""
    effort, bands = settings.effort, settings.bands
    expected = measuring_time(
        costs, len(prompts.calibration), settings.sampling, effort, bands, options, is_fitted, settings.refit == "full"
    )
    if expected.total > LONG:
        recording, measuring = format_duration(expected.recording), format_duration(expected.measuring)
        progress.note(
            f"recording runs of {len(prompts.calibration)} prompts takes about {recording} at the speed of the "
            f"profiled pass, and measuring {len(options)} edits {measuring}, fits apart; what was measured before is "
            "not measured again. Fewer prompts and moments, parts no finer than units, and fewer kinds of slots and "
            "widths take less"
        )


def _choose_scheduler(pipeline: StableDiffusionPipeline, settings: PlanSettings, progress: Progress) -> None:
    steps = settings.sampling.steps
    if notice := choose_scheduler(pipeline, settings.scheduler, steps):
        progress.note(notice)
    check_one_evaluation_per_step(pipeline.scheduler, steps)


def _prompts(pipeline: StableDiffusionPipeline, settings: PlanSettings, progress: Progress) -> PromptSplit:
    """The prompts of both kinds; who has given own ones is told what becomes of them."""
    found = choose_prompts(pipeline, settings.prompts, settings.calibration_prompts, settings.held_out_prompts)
    if settings.prompts is not None:
        progress.note(found.of_own(len(set(settings.prompts))))
    return found


def _note_empty_bands(measuring: Calibration, settings: PlanSettings, progress: Progress, processes: Processes) -> None:
    if (empty := measuring.bands_without_moments()) and processes.is_main:
        progress.note(
            f"{len(empty)} of {settings.bands} timestep bands have no moments to measure damage on, and count "
            "as the others do; more --calibration-prompts or --calibration-triples, or fewer --bands, mend that"
        )


def _costs(teacher: UNet2DConditionModel, shape: ProfileSettings, settings: PlanSettings, model_name: str) -> Profile:
    if settings.known_profile is None:
        return profile(teacher, shape, model_name)
    costs = load_profile(settings.known_profile)
    check_fingerprint(fingerprint(teacher, shape, model_name), costs.fingerprint)
    return costs


def _options(
    teacher: UNet2DConditionModel,
    costs: Profile,
    limits: Sequence[Limit],
    shape: ProfileSettings,
    settings: PlanSettings,
) -> tuple[Option, ...]:
    specs = slot_specs(settings.slot, settings.experts_of_bands, settings.routing, limits)
    everywhere = places_of(teacher, specs, settings.narrow, settings.exact)
    if settings.sampling.guidance <= 1 or shape.batch % 2:
        everywhere.pop(SHARED, None)  # there are no two branches that could share anything
    finest = settings.finest
    wanted = {edit: [p for p in paths if is_coarse_enough(p, edit, finest)] for edit, paths in everywhere.items()}
    places = fitting_places(teacher, wanted)
    slots = slot_costs(teacher, places, shape, costs)
    found = useful_options(find_options(teacher, costs, places, slots), limits)
    return tuple(option for option in found if is_coarse_enough(option.site, option.edit, finest))
