"""The sections on a student as it was assembled: what it costs and is worth, where its time goes, predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from diffusers import UNet2DConditionModel

from asdm_compress.assembly.record import Assembly, StudentSite
from asdm_compress.core.edits import conv_spec
from asdm_compress.core.recipe import Evidence, Recipe
from asdm_compress.core.units import format_seconds
from asdm_compress.profiling.profile import Profile
from asdm_compress.reporting.figures import (
    Cell,
    Section,
    Table,
    counted,
    decibels,
    nothing,
    percent,
    plain,
    seconds,
    signed_percent,
    times,
    whole,
    words,
)
from asdm_compress.reporting.stages import Stages

_KINDS: Final = {
    "resnet": "ResNets", "self-attention": "self-attention", "cross-attention": "cross-attention",
    "feed-forward": "feed-forward", "projections": "transformers' projections", "downsampler": "downsamplers",
    "upsampler": "upsamplers", "stem": "first convolution", "head": "last convolution", "time": "time embedding",
}  # fmt: skip
_SLOT: Final = "convolutions in slots"


def costs_section(stages: Stages) -> Section | None:
    """What teacher and student cost, as measured, and what the images are worth."""
    evidence = stages.recipe.evidence if stages.recipe else None
    if evidence is None:
        return None
    teacher, student = evidence.teacher, evidence.measured
    batch = f", batch {stages.profile.fingerprint.batch}" if stages.profile else ""
    rows = [
        (
            words(f"latency of one pass{batch}"),
            seconds(teacher.latency),
            seconds(student.latency),
            times(evidence.measured_latency_ratio),
        ),
        (
            words(f"MACs of one pass{batch}"),
            counted(teacher.macs),
            counted(student.macs),
            times(student.macs / teacher.macs),
        ),
        (words("parameters"), counted(teacher.params), counted(student.params), times(student.params / teacher.params)),
    ]
    assembly = stages.assembly
    if assembly is not None:
        a, b = assembly.seconds_per_image["teacher"], assembly.seconds_per_image["student"]
        rows.append((words("one image, VAE included"), seconds(a), seconds(b), times(b / a)))
    tables = [Table("Costs", ("what", "teacher", "student", "ratio"), tuple(rows), key="costs")]
    if assembly is not None:
        tables.append(_quality(assembly, evidence))
    measured_on = stages.recipe.provenance.get("measured_on") if stages.recipe else None
    lead = f"Measured on {measured_on}." if measured_on else "As measured when the plan was made."
    if stages.is_trained:
        lead += " All of it before the training, which changes what the student is worth and not what it costs."
    return Section("costs", "What it costs, and what it is worth", lead, tuple(tables), open_tables=True)


def _quality(assembly: Assembly, evidence: Evidence) -> Table:
    quality, rows = assembly.quality, []
    if isinstance(psnr := quality.get("psnr"), float):
        rows.append(
            (
                words("PSNR"),
                decibels(psnr),
                words(f"the student's images against the teacher's, {quality.get('pairs')} pairs"),
            )
        )
    if isinstance(ssim := quality.get("ssim"), float):
        rows.append((words("SSIM"), plain(ssim), words("the same pairs")))
    if isinstance(mse := quality.get("latent_mse"), float):
        rows.append((words("latent MSE"), plain(mse), words("the same pairs, before the VAE")))
    for who in ("teacher", "student"):
        if (right := quality.get(f"{who}_right")) is not None:
            rows.append(
                (
                    words(f"{who}'s prompts right"),
                    whole(int(right)),
                    words(f"of {quality.get('pairs')}: all attributes of all objects"),
                )
            )
    rows.append(
        (
            words("damage, held out"),
            plain(evidence.held_out_damage),
            words("relative squared error of the guided noise prediction"),
        )
    )
    return Table("Quality", ("figure", "value", "what it is"), tuple(rows), key="quality")


def time_section(stages: Stages, teacher: UNet2DConditionModel | None) -> Section | None:
    """Latency by block and by kind of part, before and after."""
    profile = stages.profile
    if profile is None:
        return None
    after = {s.path: s for s in stages.assembly.student_sites} if stages.assembly else {}
    blocks = [
        (s.path, s.latency, after[s.path].latency if s.path in after else 0.0)
        for s in profile.sites
        if s.level == "block"
    ]
    kinds = _by_kind(profile, after, stages.recipe)
    tables = [
        _time_table("By block", "block", blocks, bool(after), profile.latency, "by-block"),
        _time_table("By kind of part", "kind", kinds, bool(after), profile.latency, "by-kind"),
    ]
    lead = f"One pass of the teacher takes {format_seconds(profile.latency)}"
    if after:
        evidence = stages.recipe.evidence if stages.recipe else None
        student = evidence.measured.latency if evidence else sum(t for _, _, t in blocks)
        lead += f", one of the student {format_seconds(student)}"
    mark = profile.fingerprint
    lead += f" ({mark.device}, {mark.dtype}, batch {mark.batch}, {mark.image_size} px)."
    return Section("time", "Where the time goes", lead, tuple(tables), open_tables=True)


def _time_table(
    title: str, what: str, rows: Sequence[tuple[str, float, float]], with_after: bool, total: float, key: str
) -> Table:
    most = max((max(a, b) for _, a, b in rows), default=1.0) or 1.0
    if not with_after:
        cells = tuple((words(name), seconds(a, (a / most,)), percent(a / total)) for name, a, _ in rows)
        return Table(title, (what, "teacher", "share"), cells, key=key)
    found = []
    for name, a, b in rows:
        change = signed_percent((b - a) / total)
        found.append((words(name), seconds(a, (a / most, b / most)), seconds(b), change))
    note = "Change is a share of the teacher's whole pass. Bars: teacher above, student below."
    return Table(title, (what, "teacher", "student", "change"), tuple(found), note, key)


def _by_kind(
    profile: Profile, after: Mapping[str, StudentSite], recipe: Recipe | None
) -> list[tuple[str, float, float]]:
    """Seconds by kind of the smallest parts that were timed; what an edit has put into a slot is a kind of its own."""
    slots = {e.site for e in recipe.edits if conv_spec(e.edit) is not None} if recipe else set()
    before: dict[str, float] = {}
    left: dict[str, float] = {}
    layers = {s.path: s.parent for s in profile.sites}
    parents = {s.parent for s in profile.sites}
    for site in profile.sites:
        if site.kind in _KINDS:
            before[_KINDS[site.kind]] = before.get(_KINDS[site.kind], 0.0) + site.latency
        now = after.get(site.path)
        if now is None or (site.kind not in _KINDS and site.kind != "transformer"):
            continue
        is_slot = bool({site.path, layers.get(site.path), site.path.split(".")[0]} & slots)
        if site.kind == "transformer":
            # One that is still there is the sum of its parts.
            if site.path in parents and any(s.parent == site.path and s.path in after for s in profile.sites):
                continue
            is_slot = True
        name = _SLOT if is_slot else _KINDS[site.kind]
        left[name] = left.get(name, 0.0) + now.latency
    names = sorted({*before, *left}, key=lambda name: -before.get(name, 0.0))
    found = [(name, before.get(name, 0.0), left.get(name, 0.0)) for name in names]
    return [row for row in found if max(row[1:]) > 0.001 * profile.latency or row[0] == _SLOT]


def predictions_section(stages: Stages) -> Section | None:
    """What was said beforehand, and what came."""
    evidence = stages.recipe.evidence if stages.recipe else None
    if evidence is None:
        return None
    rows = []
    shown: tuple[tuple[str, str], ...] = (("latency", "latency"), ("MACs", "macs"), ("parameters", "params"))
    for name, key in shown:
        ours, theirs, whole_cost = (
            float(getattr(c, key)) for c in (evidence.predicted, evidence.measured, evidence.teacher)
        )
        rows.append(_prediction(f"{name}, of the teacher's", ours / whole_cost, theirs / whole_cost, times))
    rows.append(_prediction("damage", evidence.predicted_damage, evidence.measured_damage, plain))
    rows.append(_prediction("damage, held-out prompts", evidence.predicted_damage, evidence.held_out_damage, plain))
    if stages.calibration is not None:
        time = stages.calibration.time
        rows.append(
            _prediction("a run with the schedule, of the full one", time.predicted_share, time.measured_share, times)
        )
    note = "Off: measured over predicted, less one."
    table = Table(
        "Predicted against measured", ("what", "predicted", "measured", "off"), tuple(rows), note, "predictions"
    )
    lead = stages.assembly.proof if stages.assembly else ""
    solved = ", ".join(evidence.solved_for)
    return Section(
        "predictions",
        "Predicted against measured",
        lead
        or f"The search was solved for {solved}; no plan's summed damage can be under {evidence.damage_bound:.3g}.",
        (table,),
        open_tables=True,
    )


def _prediction(name: str, predicted: float, measured: float, form: object) -> tuple[Cell, ...]:
    assert callable(form)
    off = signed_percent(measured / predicted - 1) if predicted else nothing()
    return (words(name), form(predicted), form(measured), off)
