"""What `assemble` leaves beside the student for reports: `assembly.json` with its image pairs, `frontier.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from asdm_compress.assembly.damage import Damage
from asdm_compress.assembly.frontier import Frontier, Menu, Question, frontier_of
from asdm_compress.assembly.options import Option, teacher_costs
from asdm_compress.assembly.plan import Plan, edited, place
from asdm_compress.assembly.record import (
    FILE_NAME,
    PAIRS_FOLDER,
    Assembly,
    Pair,
    StudentSite,
    bands_of,
    measured_options,
    pair_terms,
)
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.units import Limit
from asdm_compress.evaluation.fidelity import compare_pairs
from asdm_compress.evaluation.quality import Quality
from asdm_compress.models.edits import SlotWeights
from asdm_compress.models.sites import find_sites
from asdm_compress.profiling.profile import Profile, ProfileSettings, parameters_of, profile
from asdm_compress.profiling.slot_costs import as_run
from asdm_compress.reporting.assembly import proof_text
from asdm_compress.sampling.images import Samples
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.workflows.plan import PlanResult
from asdm_compress.workflows.progress import Progress

MOST_PAIRS: Final = 12
_REPEATS: Final = 5  # of the student's profile, which is only drawn


@dataclass(frozen=True, slots=True)
class Facts:
    """What an assembly was asked for: the model's name, the command and the budget as given, the settings."""

    model: str
    command: str
    budget: Sequence[str]
    sampling: SamplingSettings
    shape: ProfileSettings


def assembly_record(
    pipeline: StableDiffusionPipeline,
    found: PlanResult,
    held_out: Damage,
    quality: Quality,
    runs: Mapping[str, Samples],
    facts: Facts,
    is_stock: bool,
) -> Assembly:
    """The content of `assembly.json`. The pipeline has the sampler that everything was measured with.

    `runs` are the images of the `teacher`, the `student` and, where something was fitted, the `unfitted cut`.
    """
    calibration, sampling, shape = found.calibration, facts.sampling, facts.shape
    return Assembly(
        model=facts.model,
        command=facts.command,
        proof=proof_text(found.verified, facts.budget),
        opens_in_plain_diffusers=is_stock,
        sampler=f"{type(pipeline.scheduler).__name__}, {sampling.steps} steps, guidance {sampling.guidance:g}",
        bands=bands_of(
            held_out,
            calibration.band_weights,
            calibration.boundaries,
            int(pipeline.scheduler.config.num_train_timesteps),
        ),
        options=measured_options(found.options, found.damages),
        pair_terms=pair_terms(found.options, found.damages),
        student_sites=student_sites(
            pipeline.unet,
            found.verified.solution.plan,
            found.verified.slot_weights,
            found.verified.costs["latency"],
            replace(shape, repeats=min(shape.repeats, _REPEATS)),
        ),
        quality=quality.as_json(),
        seconds_per_image={"teacher": runs["teacher"].seconds, "student": runs["student"].seconds},
        pairs=_pairs(runs, found.prompts.held_out, sampling.seed),
    )


def save_assembly(record: Assembly, runs: Mapping[str, Samples], folder: Path) -> None:
    """Write the record and the images that it names into a student's folder."""
    (folder / PAIRS_FOLDER).mkdir()
    for number, pair in enumerate(record.pairs):
        for name, who in ((pair.teacher, "teacher"), (pair.student, "student"), (pair.unfitted, "unfitted cut")):
            if name is not None:
                runs[who].images[number].save(folder / name)
    record.save(folder / FILE_NAME)


def frontier_record(
    found: PlanResult, limits: Sequence[Limit], model: str, command: str, progress: Progress
) -> Frontier | None:
    """The frontier of what the first of the limits is on, under the others, from what the assembly has measured.

    None, with a note, where a search for it fails: what only illustrates must not cost a student.
    """
    first, *also = limits
    menu = menu_of(found.options, found.damages, found.profile)
    try:
        with progress.bar("Searching the plans of other budgets") as bar:
            return frontier_of(menu, Question(first.resource, also=tuple(also)), model, command, bar)
    except AsdmError as error:
        if error.exit_code != ExitCode.INFEASIBLE:
            raise
        progress.note(f"there is no frontier: {error.message}")
        return None


def menu_of(options: Sequence[Option], damages: Mapping[str, Damage], costs: Profile) -> Menu:
    """What was measured, for a search that builds nothing."""
    totals = {name: damage.total for name, damage in damages.items()}
    return Menu(options, totals, teacher_costs(costs), lambda a, b: damages[a].interaction(damages[b]))


def student_sites(
    teacher: UNet2DConditionModel,
    plan: Plan,
    slot_weights: SlotWeights,
    latency: float,
    shape: ProfileSettings,
) -> list[StudentSite]:
    """The costs of what is left, profiled in place, under the teacher's names of the sites.

    Seconds are such that the whole student takes `latency`.
    """
    placed = place(teacher, plan)
    names = {placed.edited_path(teacher, site.path): site.path for site in find_sites(teacher)}
    student = edited(teacher, plan, slot_weights)
    parameters = {
        site.path: sum(p.numel() for m in site.modules for p in parameters_of(student, m))
        for site in find_sites(student)
    }
    # Experts routed by the timestep cost the time of one, and this pass has no timestep to route by.
    costs = profile(edited(teacher, Plan({site: as_run(edit) for site, edit in plan.edits.items()})), shape)
    scale = latency / costs.latency
    return [
        StudentSite(
            path=names[site.path], latency=site.latency * scale, macs=site.macs, parameters=parameters[site.path]
        )
        for site in costs.sites
        if site.path in names
    ]


def _pairs(runs: Mapping[str, Samples], prompts: Sequence[str], first_seed: int) -> list[Pair]:
    """The first pairs; of the unfitted cut there may be fewer images."""
    teacher, student, unfitted = runs["teacher"].images, runs["student"].images, runs.get("unfitted cut")
    shown = min(MOST_PAIRS, len(teacher))
    psnr, ssim = compare_pairs(student[:shown], teacher[:shown])
    return [
        Pair(
            prompt=prompts[i],
            seed=first_seed + i,
            teacher=f"{PAIRS_FOLDER}/{i:02d}-teacher.png",
            student=f"{PAIRS_FOLDER}/{i:02d}-student.png",
            unfitted=f"{PAIRS_FOLDER}/{i:02d}-unfitted.png" if unfitted and i < len(unfitted.images) else None,
            psnr=psnr[i],
            ssim=ssim[i],
        )
        for i in range(shown)
    ]
