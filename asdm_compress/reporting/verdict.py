"""What a report says first: a few numbers, and three lines."""

from __future__ import annotations

from collections.abc import Iterator

from asdm_compress.core.units import format_count, format_seconds
from asdm_compress.reporting.figures import score
from asdm_compress.reporting.stages import Stages


def headline(stages: Stages) -> Iterator[tuple[str, str]]:
    """The numbers that are asked for first."""
    evidence = stages.recipe.evidence if stages.recipe else None
    if evidence is not None:
        teacher, student = evidence.teacher, evidence.measured
        yield f"{evidence.measured_latency_ratio:.2f}x", "of the teacher's time per step"
        yield f"{student.macs / teacher.macs:.2f}x", "of its MACs"
        yield f"{student.params / teacher.params:.2f}x", "of its parameters"
    psnr = stages.evaluation.find("psnr") if stages.evaluation else None
    if psnr is not None and psnr.model is not None:
        steps = stages.evaluation.protocol.steps if stages.evaluation else 0
        yield f"{psnr.model.value:.1f} dB", f"PSNR to the teacher's run of {steps} steps, {psnr.model.n} images"
    elif stages.assembly is not None and isinstance(value := stages.assembly.quality.get("psnr"), float):
        yield f"{value:.1f} dB", f"PSNR to the teacher, {stages.assembly.quality.get('pairs')} images"
    if stages.calibration is not None:
        yield f"{stages.calibration.time.measured_share:.2f}x", "of a run's time with the schedule"
    if stages.switched is not None:
        yield f"{stages.switched.time.measured_share:.2f}x", "of a run's time with these members"
    if stages.optimized is not None:
        steps = stages.optimized.reference.steps
        yield f"{stages.optimized.best.share:.2f}x", f"of the time of a whole image of {steps} steps"


def verdict(stages: Stages) -> Iterator[str]:
    """What it costs, how near it is to its teacher, and how far that can be trusted."""
    recipe = stages.recipe
    evidence = recipe.evidence if recipe else None
    if recipe is not None and evidence is not None:
        teacher, student = evidence.teacher, evidence.measured
        asked = f"; asked for was {', '.join(recipe.budget)}" if recipe.budget else ""
        yield (
            f"A denoising step takes {evidence.measured_latency_ratio:.3f}x of the teacher's time "
            f"({format_seconds(student.latency)} instead of {format_seconds(teacher.latency)}), with "
            f"{student.macs / teacher.macs:.3f}x of its MACs and {student.params / teacher.params:.3f}x of its "
            f"parameters ({format_count(student.params)}){asked}."
        )
        yield (
            f"{_nearness(stages)}Damage on held-out prompts{' before the training' if stages.is_trained else ''}: "
            f"{evidence.held_out_damage:.3g}, predicted {evidence.predicted_damage:.3g}."
        )
    elif stages.evaluation is not None:
        yield f"{stages.evaluation.model.name} against {stages.evaluation.teacher.name}. {_nearness(stages)}".strip()
    if recipe is not None and evidence is not None:
        gap = (
            "proven to be the least damage when that of its edits is summed"
            if evidence.proven_optimal
            else f"bounded from below at {evidence.damage_bound:.3g}"
        )
        yield f"{len(recipe.edits)} edits, {gap}; {_training_words(stages)}."
    elif stages.training is not None:
        yield f"{_training_words(stages)}.".capitalize()
    if recipe is None and stages.calibration is not None:
        found = stages.calibration
        yield f"The schedule takes {found.time.measured_share:.3f}x of a run's time. {found.verdict}".strip()
    elif recipe is None and stages.switched is not None:
        yield f"The members take {stages.switched.time.measured_share:.3f}x of a run's time. {stages.switched.verdict}"
    elif recipe is None and stages.optimized is not None:
        best = stages.optimized.best
        said = f"A whole image takes {best.share:.3f}x of the reference's time: {best.way}"
        worth, full = best.test_worth, stages.optimized.reference.test_worth
        if worth is not None and full is not None:
            what = " and ".join(stages.optimized.judged_by)
            yield f"{said}. On test prompts {what}: {worth.text}; of the full run {full.text}."
        else:
            yield f"{said}, {score(best.test or best.validation).text} from it."
    elif recipe is not None and evidence is None and stages.evaluation is None:
        yield f"{len(recipe.edits)} edits of {recipe.base.model}; what they cost and damage has not been measured."


def _nearness(stages: Stages) -> str:
    """How far the images are from the teacher's."""
    if stages.evaluation is not None and (measure := stages.evaluation.find("psnr")) and measure.model:
        found = measure.model
        known = found.low is not None and found.high is not None
        between = f" (95 %: {found.low:.1f} to {found.high:.1f})" if known else ""
        return (
            f"{found.n} images are {found.value:.1f} dB{between} from the teacher's of "
            f"{stages.evaluation.protocol.steps} steps at the same prompts and seeds. "
        )
    if stages.assembly is not None and isinstance(psnr := stages.assembly.quality.get("psnr"), float):
        pairs = stages.assembly.quality.get("pairs")
        return f"{pairs} images of held-out prompts and seeds are {psnr:.1f} dB from the teacher's. "
    return ""


def _training_words(stages: Stages) -> str:
    if stages.training is None:
        return "trained after the cut" if stages.is_trained else "nothing was trained after the cut"
    probes, losses = stages.training.probes, stages.training.losses
    steps = max(line["step"] for line in (*probes, *losses))
    if len(probes) < 2:
        return f"distilled for {steps:,} steps"
    kept = stages.training.kept
    first, best = probes[0]["latent_error"], kept["latent_error"]
    return (
        f"distilled for {steps:,} steps: latent error on the prompts of its probes {first:.3g} before, {best:.3g} with "
        f"the weights of step {kept['step']:,}, which were kept"
    )
