"""`plan`: from a pipeline and a budget to a verified plan, with everything that was measured on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffusers import StableDiffusionPipeline

from asdm_compress.assembly.calibration import DEFAULT_BANDS, Calibration, check_bands, record
from asdm_compress.assembly.damage import Damage
from asdm_compress.assembly.option_fit import fitting_places, measure_options
from asdm_compress.assembly.options import Option, SlotChoice, find_options, slot_specs, useful_options
from asdm_compress.assembly.plan import check_teacher
from asdm_compress.assembly.plan_fit import RefitChoice, check_refit
from asdm_compress.assembly.slot_fit import check_fits, check_prompts
from asdm_compress.assembly.store import measurement_folder, recorded
from asdm_compress.assembly.verify import Search, Verified, search_verified
from asdm_compress.core.defaults import CALIBRATION_PROMPTS, HELD_OUT_PROMPTS, NARROW_SHARES
from asdm_compress.core.edits import Routing
from asdm_compress.core.units import Limit, parse_budget
from asdm_compress.evaluation.prompts import PromptSplit, choose_prompts
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
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.sampling.settings import SamplingSettings, check_text_to_image
from asdm_compress.workflows.progress import Progress, Silent


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """Everything that changes a plan besides the model and the budget.

    `prompts` are a user's own; `known_profile` is a `profile.json` to use instead of profiling again. `slot`, `experts`
    and `routing` say which convolutions the search may put into the places of what it takes out, `narrow` to which
    shares of their inner width ResNets, attentions and feed-forwards may be narrowed, and `refit` how much of what
    stays is solved anew after the cut (see `assembly.refit`).
    """

    profile: ProfileSettings = field(default_factory=ProfileSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    scheduler: str | None = None
    prompts: tuple[str, ...] | None = None
    calibration_prompts: int = CALIBRATION_PROMPTS
    held_out_prompts: int = HELD_OUT_PROMPTS
    bands: int = DEFAULT_BANDS
    known_profile: Path | None = None
    slot: SlotChoice = "auto"
    experts: int = 8
    routing: Routing = "timestep"
    narrow: tuple[float, ...] = NARROW_SHARES
    refit: RefitChoice = "full"


@dataclass(frozen=True, slots=True)
class PlanResult:
    """A verified plan and what it was found with."""

    verified: Verified
    profile: Profile
    prompts: PromptSplit
    calibration: Calibration
    options: Sequence[Option]
    damages: Mapping[str, Damage]


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
    settings name one. Raises AsdmError for what cannot be planned, with exit code 3 for a budget that cannot be met.
    """
    settings, progress = settings or PlanSettings(), progress or Silent()
    limits = parse_budget([budget]) if isinstance(budget, str) else budget
    specs = slot_specs(settings.slot, settings.experts, settings.routing, limits)
    check_fits(specs, settings.bands)
    check_refit(settings.refit)
    teacher, sampling = pipeline.unet, settings.sampling
    check_teacher(teacher)
    check_text_to_image(pipeline)
    check_bands(sampling.steps, settings.bands)
    if settings.scheduler:
        pipeline.scheduler = make_scheduler(settings.scheduler, pipeline)
    check_one_evaluation_per_step(pipeline.scheduler, sampling.steps)
    prompts = choose_prompts(pipeline, settings.prompts, settings.calibration_prompts, settings.held_out_prompts)
    if specs or settings.narrow or settings.refit != "none":
        check_prompts(len(prompts.calibration))
    shape = replace(settings.profile, text_tokens=int(pipeline.tokenizer.model_max_length))
    with progress.stage("Profiling"):
        if settings.known_profile is None:
            costs = profile(teacher, shape, model_name)
        else:
            costs = load_profile(settings.known_profile)
            check_fingerprint(fingerprint(teacher, shape, model_name), costs.fingerprint)
    folder = measurement_folder(pipeline, prompts.calibration, sampling, settings.bands)
    with progress.bar("Recording the teacher's trajectories") as bar:
        calibration = recorded(
            folder / "triples.pt", lambda: record(pipeline, prompts.calibration, sampling, settings.bands, bar)
        ).to(pipeline.device)
    with progress.stage("Timing convolutions in slots and narrower modules"):
        places = fitting_places(teacher, places_of(teacher, specs, settings.narrow))
        slots = slot_costs(teacher, places, shape, costs)
    options = useful_options(find_options(teacher, costs, places, slots), limits)
    with progress.bar("Fitting and measuring the damage of every edit") as bar:
        refit = settings.refit == "full"
        store = folder / ("damages_refitted.jsonl" if refit else "damages.jsonl")
        damages = measure_options(teacher, options, calibration, store, bar, refit)
    with progress.stage("Searching, fitting and verifying the plan"):
        search = Search(teacher, costs, options, damages, limits, shape, calibration, settings.refit)
        verified = search_verified(search)
    return PlanResult(verified, costs, prompts, calibration, options, damages)
