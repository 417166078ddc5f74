"""What is said of an assembled student: its plan, what is proven of it, and a grid of its images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL.Image import Image

from asdm_compress.assembly.damage import Damage
from asdm_compress.assembly.verify import Verified
from asdm_compress.profiling.profile import Profile
from asdm_compress.reporting.grid import labelled_grid
from asdm_compress.sampling.images import Samples

GRID_COLUMNS = 6


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One edit: where, which, the share of the teacher's latency that it saves, and its one-shot damage."""

    site: str
    edit: str
    saved: float
    damage: float


def proof_text(verified: Verified, budget: Sequence[str]) -> str:
    """What is proven of the plan, and for which limits."""
    solution, attempt = verified.solution, verified.attempt
    solved_for = [str(limit) for limit in verified.solved_for]
    # Budgets that a search has changed have more digits than anyone reads.
    limits = re.sub(r"\d+\.\d{5,}", lambda number: f"{float(number[0]):.4f}", ", ".join(solved_for))
    pairs = f" with the terms of {verified.pairs} pairs" if verified.pairs else ""
    best = "which is proven to be the least" if solution.proven else f"of which {solution.gap:.1%} at most is too much,"
    text = (
        f"Its edits' summed {attempt.damages}{pairs} is {solution.damage:.4g}, {best} among {attempt.plans} that are "
        f"predicted to keep {limits}."
    )
    if solved_for != list(budget):
        text += f" So much was asked of predictions for plans to keep {', '.join(budget)} when they are timed."
    return text


def plan_rows(verified: Verified, profile: Profile, damages: Mapping[str, Damage]) -> list[PlanRow]:
    """The plan's edits with what each saves and damages."""
    return [
        PlanRow(o.site, o.edit, o.savings["latency"] / profile.latency, damages[o.name].total)
        for o in verified.solution.options
    ]


def teacher_student_grid(
    teacher: Samples,
    cut: Samples | None,
    student: Samples,
    prompts: Sequence[str],
    first_seed: int,
    latency_ratio: float,
) -> Image:
    """The first held-out prompts at the same seeds: teacher, the cut with nothing fitted (if any is), student."""
    shown = prompts[:GRID_COLUMNS]
    ratio = f"UNet {latency_ratio:.2f}x"
    runs = {f"teacher\n{teacher.seconds:.2f} s/image": teacher}
    if cut is not None:
        runs[f"the same cut,\nnothing fitted\n{ratio}"] = cut
    runs[f"student\n{student.seconds:.2f} s/image\n{ratio}"] = student
    rows = [(label, run.images[: len(shown)]) for label, run in runs.items()]
    return labelled_grid(rows, [f"{prompt} [seed {first_seed + i}]" for i, prompt in enumerate(shown)])
