"""What the report of an assembled student says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL.Image import Image

from asdm_compress.assembly.damage import Damage
from asdm_compress.assembly.options import Option
from asdm_compress.assembly.verify import Verified
from asdm_compress.core.recipe import Recipe
from asdm_compress.evaluation.quality import Quality
from asdm_compress.profiling.profile import Profile
from asdm_compress.reporting.grid import labelled_grid
from asdm_compress.reporting.html import PlanRow, ReportContent
from asdm_compress.reporting.plots import options_svg, profile_svg
from asdm_compress.sampling.images import Samples

GRID_COLUMNS = 6


def proof_text(verified: Verified, budget: Sequence[str]) -> str:
    """What is proven of the plan, and for which limits."""
    solution = verified.solution
    solved_for = [str(limit) for limit in verified.solved_for]
    limits = f"predicted {', '.join(solved_for)}"
    if solved_for != list(budget):
        limits += f", tightened in round {verified.rounds} to keep {', '.join(budget)} as measured"
    summed = f"Summed damage{f' with the terms of {verified.pairs} pairs' if verified.pairs else ''}"
    if solution.proven:
        return f"{summed} {solution.damage:.4g}, proven optimal (lower bound {solution.bound:.4g}) for {limits}."
    return f"{summed} {solution.damage:.4g}, at most {solution.gap:.1%} above the best possible for {limits}."


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


def report_content(
    recipe: Recipe,
    verified: Verified,
    profile: Profile,
    options: Sequence[Option],
    damages: Mapping[str, Damage],
    quality: Quality,
    grid: Image,
    is_stock: bool,
) -> ReportContent:
    """Everything that the template shows."""
    evidence = recipe.evidence
    assert evidence is not None
    rows = plan_rows(verified, profile, damages)
    savings = {o.name: o.savings["latency"] / profile.latency for o in options}
    totals = {name: damage.total for name, damage in damages.items()}
    pairs = f" and what {verified.pairs} pairs of edits add" if verified.pairs else ""
    factor = evidence.predicted_damage / verified.solution.damage if verified.solution.damage else 1.0
    off = "" if factor == 1 else f", times {factor:.2f}, by which the other plans searched were off"
    opens = (
        "The student opens in plain diffusers."
        if is_stock
        else "The student opens with StableDiffusionPipeline.from_pretrained after `import asdm_compress`."
    )
    return ReportContent(
        title=f"{recipe.base.model} within {', '.join(recipe.budget)}",
        recipe=recipe,
        summary=[
            f"{len(rows)} edits, chosen from {len(options)} by integer programming. "
            f"{proof_text(verified, recipe.budget)}",
            *(["What stays behind the cuts was solved anew, in closed form."] if recipe.refit == "full" else []),
            opens,
        ],
        plan=rows,
        quality=[
            (
                "predicted damage",
                f"{evidence.predicted_damage:.4g}",
                "sum of the edits' one-shot damages" + pairs + off,
            ),
            ("measured damage", f"{evidence.measured_damage:.4g}", "of the whole plan, fitted without these prompts"),
            ("held-out damage", f"{evidence.held_out_damage:.4g}", "the same on prompts and seeds not searched"),
            *quality.rows(),
        ],
        grid=grid,
        plots=[profile_svg(profile), options_svg(savings, totals, [o.name for o in verified.solution.options])],
        notes=[
            "Damage is the relative squared error of the guided noise prediction, with every timestep band weighted by "
            "what an error there does to the final latent.",
            "Predicted latency is the teacher's less the sites' shares, timed inside whole forward passes. Measured "
            "latency is the teacher's times the ratio of the two, timed in turns.",
            "Nothing has been trained after the cut.",
        ],
    )
