"""A report: from what the stages have left to sections of figures and drawings, the same for every form of it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from diffusers import UNet2DConditionModel

from asdm_compress.assembly import frontier as frontier_file
from asdm_compress.assembly import record as assembly_file
from asdm_compress.assembly.plan import Plan
from asdm_compress.evaluation import record as evaluation_file
from asdm_compress.reporting.figures import Missing, Section
from asdm_compress.reporting.sections_assembly import costs_section, predictions_section, time_section
from asdm_compress.reporting.sections_damage import damage_section, frontier_section
from asdm_compress.reporting.sections_plan import plan_section
from asdm_compress.reporting.sections_stages import (
    evaluation_section,
    experts_section,
    provenance_section,
    schedule_section,
    training_section,
)
from asdm_compress.reporting.sections_switching import optimize_section, switching_section
from asdm_compress.reporting.stages import Stages
from asdm_compress.reporting.unet_drawing import STATES, states_of
from asdm_compress.reporting.verdict import headline, verdict

MOST_PAIRS: Final = 12


@dataclass(frozen=True, slots=True)
class ImagePair:
    """Images of teacher and student at one prompt and seed, and what is said of them."""

    prompt: str
    seed: int
    teacher: Path
    student: Path
    unfitted: Path | None
    figures: str


@dataclass(frozen=True, slots=True)
class PlanPanel:
    """A plan on the frontier: its figures, its edits, and the images of its student where it was built."""

    key: str
    title: str
    facts: tuple[tuple[str, str], ...]
    edits: tuple[tuple[str, str], ...]
    images: tuple[ImagePair, ...]
    is_chosen: bool


@dataclass(frozen=True, slots=True)
class Command:
    """A command that reproduces a part of this."""

    what: str
    line: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that a report shows.

    `headline` are a few numbers with their names, `verdict` three lines at most, `legend` the classes of the UNet's
    drawing with their meanings, `first_plan` the key of the frontier's plan that is shown first.
    """

    name: str
    title: str
    headline: tuple[tuple[str, str], ...]
    verdict: tuple[str, ...]
    sections: tuple[Section, ...]
    missing: tuple[Missing, ...]
    pairs: tuple[ImagePair, ...]
    pairs_unseen: bool  # by the search: of captions that a user has given to `evaluate` nobody knows
    plans: tuple[PlanPanel, ...]
    commands: tuple[Command, ...]
    legend: tuple[tuple[str, str], ...] = ()
    first_plan: str | None = None

    def section(self, key: str) -> Section | None:
        """The section of a key; None where there is none."""
        return next((s for s in self.sections if s.key == key), None)

    def as_json(self) -> dict[str, Any]:
        """The figures, for programs."""
        return {
            "schema_version": 1,
            "name": self.name,
            "title": self.title,
            "verdict": list(self.verdict),
            "sections": {section.key: section.as_json() for section in self.sections},
            "missing": {missing.title: missing.command for missing in self.missing},
            "commands": {command.what: command.line for command in self.commands},
        }


@dataclass(frozen=True, slots=True)
class Blanks:
    """UNets without weights, for drawings: the teacher that the recipe names, and the student in the folder."""

    teacher: UNet2DConditionModel | None = None
    student: UNet2DConditionModel | None = None


def report_of(stages: Stages, blanks: Blanks) -> Report:
    """The report. Sections whose files are not there are left out, and named with the command that makes them."""
    place = shlex.quote(stages.place)
    # Folders that are no student's lack these for good, and a trained one must not be made again.
    of_student = stages.recipe is not None
    assembled = "asdm-compress assemble MODEL --budget latency=0.7x" if of_student and not stages.is_trained else ""
    made = [
        (costs_section(stages), "Costs", assembled),
        (plan_section(stages, blanks.teacher), "The UNet, part by part", assembled),
        (time_section(stages, blanks.teacher), "Where the time goes", assembled),
        (predictions_section(stages), "Predicted against measured", assembled),
        (damage_section(stages), "Damage by timestep band", assembled),
        (frontier_section(stages), "Frontier", f"asdm-compress frontier {place}" if stages.assembly else ""),
        (
            evaluation_section(stages),
            "Evaluation",
            f"asdm-compress evaluate {place} --against TEACHER --out {place}/evaluation" if stages.is_model else "",
        ),
        (
            schedule_section(stages, blanks.student),
            "Inheritance schedule",
            f"asdm-compress calibrate {place} --budget latency=0.6x --out {place}/schedule" if of_student else "",
        ),
        # These two are of folders of their own, not of a student that could lack them.
        (switching_section(stages), "Switching between members", ""),
        (optimize_section(stages), "One budget over everything", ""),
        (
            experts_section(stages),
            "Experts over the timesteps",
            "a plan with convolutions such as conv1x1*8@timestep" if of_student else "",
        ),
        (training_section(stages), "Distillation", f"asdm-compress distill {place}" if of_student else ""),
        (provenance_section(stages), "Where this came from", ""),
    ]
    sections = [section for section, _, _ in made if section is not None]
    missing = [Missing(title, command) for section, title, command in made if section is None and command]
    pairs = tuple(_pairs(stages))
    if not pairs and assembled:
        missing.insert(0, Missing("Teacher and student, image by image", assembled))
    return Report(
        name=stages.name,
        title=_title(stages),
        headline=tuple(headline(stages)),
        verdict=tuple(verdict(stages)),
        sections=tuple(sections),
        missing=tuple(missing),
        pairs=pairs,
        pairs_unseen=_unseen(stages),
        plans=tuple(_plans(stages)),
        commands=tuple(_commands(stages)),
        legend=_legend(stages, blanks.teacher),
        first_plan=_first_plan(stages),
    )


def _legend(stages: Stages, teacher: UNet2DConditionModel | None) -> tuple[tuple[str, str], ...]:
    if teacher is None or stages.recipe is None:
        return ()
    found = states_of(teacher, Plan(stages.recipe.as_edits()))
    states = tuple((f"cell {state}", STATES[state]) for state in found)
    known = (("before", "teacher's share"), ("after", "what is left"))
    return (*states, *(known if stages.assembly is not None and stages.profile is not None else known[:1]))


def _title(stages: Stages) -> str:
    recipe = stages.recipe
    if recipe is None:
        return stages.name
    budget = f" within {', '.join(recipe.budget)}" if recipe.budget else ""
    return f"{recipe.base.model}{budget}"


def _unseen(stages: Stages) -> bool:
    """Whether no pair is of a prompt that a search was calibrated on: of a user's own captions nobody knows."""
    evaluation = stages.evaluation
    is_shown = evaluation is not None and any(p.teacher_image and p.model_image for p in evaluation.pairs)
    return not is_shown or (evaluation is not None and evaluation.protocol.prompts in evaluation_file.BUILT_IN)


def _pairs(stages: Stages) -> Iterator[ImagePair]:
    """Those of the evaluation, which knows the student as it is, or else the assembly's."""
    if stages.evaluation is not None:
        place = stages.beside(evaluation_file.FILE_NAME)
        kept = [p for p in stages.evaluation.pairs if p.teacher_image and p.model_image]
        kept = [p for p in kept if (place / str(p.teacher_image)).is_file() and (place / str(p.model_image)).is_file()]
        for pair in kept[:MOST_PAIRS]:
            yield ImagePair(
                pair.prompt, pair.seed, place / str(pair.teacher_image), place / str(pair.model_image), None,
                f"{pair.psnr:.1f} dB, SSIM {pair.ssim:.3f}",
            )  # fmt: skip
        if kept:
            return
    if stages.assembly is not None:
        place = stages.beside(assembly_file.FILE_NAME)
        for known in stages.assembly.pairs[:MOST_PAIRS]:
            if (place / known.teacher).is_file() and (place / known.student).is_file():
                unfitted = None if known.unfitted is None else place / known.unfitted
                yield ImagePair(
                    known.prompt, known.seed, place / known.teacher, place / known.student,
                    unfitted if unfitted is not None and unfitted.is_file() else None,
                    f"{known.psnr:.1f} dB, SSIM {known.ssim:.3f}",
                )  # fmt: skip


def _plans(stages: Stages) -> Iterator[PlanPanel]:
    frontier = stages.frontier
    if frontier is None:
        return
    place = stages.beside(frontier_file.FILE_NAME)
    chosen = stages.recipe.as_edits() if stages.recipe else None
    for number, point in enumerate(frontier.points):
        costs, teacher = point.costs, frontier.teacher
        facts = [
            ("budget", point.budget),
            ("latency", f"{costs.latency / teacher.latency:.3f}x predicted"),
            ("MACs", f"{costs.macs / teacher.macs:.3f}x"),
            ("parameters", f"{costs.params / teacher.params:.3f}x"),
            (
                "damage, summed",
                f"{point.summed_damage:.3g}" + (", proven least" if point.proven else f", at least {point.bound:.3g}"),
            ),
            ("damage, predicted", f"{point.predicted_damage:.3g}"),
        ]
        if point.measured_damage is not None:
            facts.append(("damage, measured", f"{point.measured_damage:.3g}"))
        if point.measured_latency is not None:
            facts.append(("latency, measured", f"{point.measured_latency:.3f}x"))
        images = tuple(
            ImagePair(i.prompt, i.seed, place / i.teacher, place / i.student, None, f"{i.psnr:.1f} dB")
            for i in point.images
            if (place / i.teacher).is_file() and (place / i.student).is_file()
        )
        edits = tuple((e.site, e.edit) for e in point.edits)
        yield PlanPanel(
            f"plan-{number}", f"{frontier.share(point):.3f}x of the {_resource(frontier.resource)}",
            tuple(facts), edits, images, chosen is not None and dict(edits) == chosen,
        )  # fmt: skip


def _first_plan(stages: Stages) -> str | None:
    """The plan of the frontier that is nearest to the student's, or one in the middle."""
    frontier, evidence = stages.frontier, stages.recipe.evidence if stages.recipe else None
    if frontier is None or not frontier.points:
        return None
    if evidence is None:
        return f"plan-{len(frontier.points) // 2}"
    share = getattr(evidence.measured, frontier.resource) / getattr(evidence.teacher, frontier.resource)
    numbers = range(len(frontier.points))
    return f"plan-{min(numbers, key=lambda i: abs(frontier.share(frontier.points[i]) - share))}"


def _resource(name: str) -> str:
    return {"latency": "latency", "macs": "MACs", "params": "parameters"}[name]


def _training_command(stages: Stages) -> str | None:
    distilled = stages.recipe.provenance.get("distilled") if stages.recipe else None
    return str(distilled.get("command", "")) if isinstance(distilled, Mapping) else None


def _commands(stages: Stages) -> Iterator[Command]:
    seen: set[str] = set()
    known: Sequence[tuple[str, str | None]] = (
        ("This student", stages.assembly.command if stages.assembly else None),
        ("The evaluation", stages.evaluation.command if stages.evaluation else None),
        ("The frontier", stages.frontier.command if stages.frontier else None),
        ("The schedule", stages.calibration.command if stages.calibration else None),
        ("The schedule of members", stages.switched.command if stages.switched else None),
        ("The ways that were tried", stages.optimized.command if stages.optimized else None),
        ("The training", _training_command(stages)),
    )
    for what, line in known:
        if line and line.startswith("asdm-compress") and line not in seen:
            seen.add(line)
            yield Command(what, line)
    place = shlex.quote(stages.place)
    if stages.recipe is not None:
        recipe, teacher = shlex.quote(f"{stages.place}/recipe.yaml"), shlex.quote(stages.recipe.base.model)
        yield Command("The same plan on another checkpoint", f"asdm-compress apply {recipe} MODEL --out student")
        yield Command("Images beside the teacher's", f'asdm-compress generate {place} "PROMPT" --compare {teacher}')
    yield Command("This report", f"asdm-compress report {place}")
