"""The sections on what comes after the cut: evaluation, inheritance schedule, experts, distillation, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from diffusers import UNet2DConditionModel

from asdm_compress.core.units import format_bytes, format_count, format_seconds
from asdm_compress.evaluation.record import Estimate, Measure
from asdm_compress.reporting.charts import heat_map, lines_chart, routing_chart
from asdm_compress.reporting.figures import (
    Cell,
    Section,
    Table,
    nothing,
    percent,
    plain,
    score,
    seconds,
    times,
    whole,
    words,
)
from asdm_compress.reporting.schedule_map import MEANINGS, map_of_places, map_on
from asdm_compress.reporting.stages import Stages

_GROUPS: Final = {
    "pairs": "Image pairs, same prompts and seeds", "content": "What the images show", "distances": "Distances of sets",
    "speed": "Speed", "memory": "Memory", "size": "Size",
}  # fmt: skip
_TIMESTEPS: Final = np.linspace(999.0, 0.0, 250)


def evaluation_section(stages: Stages) -> Section | None:
    """Every measure of `eval.json`, by group."""
    found = stages.evaluation
    if found is None:
        return None
    tables = []
    for group, title in _GROUPS.items():
        measures = [m for m in found.measures if m.group == group]
        if not measures:
            continue
        rows = tuple(
            (
                words(_measure_name(m)),
                _estimate(m, m.teacher),
                _estimate(m, m.model),
                _change(m),
                whole((m.model or m.teacher or m.change).n) if (m.model or m.teacher or m.change) else nothing(),  # type: ignore[union-attr]
            )
            for m in measures
        )
        notes = "; ".join(dict.fromkeys(m.note for m in measures if m.note))
        tables.append(Table(title, ("measure", "teacher", "student", "change", "n"), rows, notes, f"eval-{group}"))
    how = found.protocol
    protocol = [
        ("protocol", how.name), ("prompts", f"{how.prompt_count}, {how.prompts}"),
        ("sampler", f"{how.sampler}, {how.steps} steps, guidance {how.guidance:g}, first seed {how.seed}"),
        *([("the model's sampler", f"{own.sampler}, {own.steps} steps")] if (own := found.model.sampling) else []),
        ("images", f"{how.image_size} px"), ("departures", "; ".join(how.departures) or "none"),
        ("machine", f"{found.machine.device}, {found.machine.dtype}, {found.machine.threads} threads"),
        *((e.name, f"weights {e.weights}, SHA-256 {e.sha256[:16]}…") for e in how.extractors),
    ]  # fmt: skip
    tables.append(Table("Protocol", ("what", "how"), tuple((words(a), words(b)) for a, b in protocol), key="protocol"))
    inherit = f", inheriting by {found.model.inherit}" if found.model.inherit else ""
    lead = (
        f"{found.model.name}{inherit} against {found.teacher.name}, measured in one run. Brackets are 95 % intervals; "
        "figures without are counted, or of too few for an interval."
    )
    return Section("evaluation", "Evaluation", lead, tuple(tables), open_tables=True)


def _measure_name(measure: Measure) -> str:
    parts = [p for p in (measure.part, measure.extractor, measure.reference and f"to {measure.reference}") if p]
    arrow = {"higher": " ↑", "lower": " ↓"}.get(measure.better or "", "")
    of_what = f" ({', '.join(parts)})" if parts else ""
    return f"{measure.title}{of_what}{arrow}"


def _estimate(measure: Measure, estimate: Estimate | None) -> Cell:
    if estimate is None:
        return nothing()
    text = _with_unit(measure.unit, estimate.value)
    if estimate.method not in ("exact", "none") and estimate.low is not None and estimate.high is not None:
        text += f" [{_with_unit(measure.unit, estimate.low)}, {_with_unit(measure.unit, estimate.high)}]"
    return Cell(estimate.value, text)


def _change(measure: Measure) -> Cell:
    found = measure.change
    if found is None:
        return nothing()
    if measure.change_kind == "ratio":
        text = f"{found.value:.3f}x"
        if found.method not in ("exact", "none") and found.low is not None:
            text += f" [{found.low:.3f}, {found.high:.3f}]"
        return Cell(found.value, text)
    text = f"{found.value:+.4g}"
    if found.method not in ("exact", "none") and found.low is not None:
        text += f" [{found.low:+.3g}, {found.high:+.3g}]"
    return Cell(found.value, text)


def _with_unit(unit: str, value: float) -> str:
    if unit == "s":
        return format_seconds(value) if value > 0 else "0 s"
    if unit == "B":
        return format_bytes(value)
    if unit == "MACs":
        return format_count(value)
    return f"{value:.2f} dB" if unit == "dB" else f"{value:.4g}" if abs(value) < 1e4 else format_count(value)


def schedule_section(stages: Stages, student: UNet2DConditionModel | None) -> Section | None:
    """Sites by steps, and how the schedule does beside what else fits into its time."""
    schedule = stages.schedule
    if schedule is None:
        return None
    made = map_of_places(schedule.actions) if student is None else map_on(student, schedule.actions)
    cells = [[(kind, MEANINGS[kind]) for kind in row] for row in made.cells]
    picture = heat_map(made.rows, made.steps, cells, "What every step computes and inherits", "step")
    rows = tuple((words(name), percent(made.share(i))) for i, name in enumerate(made.rows))
    tables = [
        Table("Steps in which a part is computed", ("part", "steps"), rows, key="computed"),
        Table(
            "Steps", ("step", "action"),
            tuple((whole(i), words(action.name)) for i, action in enumerate(schedule.actions)), key="steps",
        ),
    ]  # fmt: skip
    drawings = [("schedule", picture)]
    facts = stages.calibration
    lead = f"{len(schedule.actions)} evaluations of the UNet."
    validity = schedule.validity
    if validity is not None:
        lead += f" Valid for {validity.model}, {validity.scheduler}, guidance {validity.guidance:g}."
    if facts is not None:
        lead = (
            f"A run takes {facts.time.measured_share:.3f}x of the full one's time, predicted "
            f"{facts.time.predicted_share:.3f}x. {facts.verdict} {lead}"
        ).strip()
        if facts.contestants:
            tables.insert(0, _contestants(facts.contestants))
        if facts.steps:
            drawings.append(("schedule-errors", _errors(facts.steps)))
            tables.append(_step_table(facts.steps))
    return Section("schedule", "Inheritance schedule", lead, tuple(tables), tuple(drawings))


def _contestants(contestants: Sequence[Any]) -> Table:
    rows = []
    for c in contestants:
        scores = [score(split) for split in (c.validation, c.test)]
        rows.append((words(c.role), words(c.way), times(c.share), *scores))
    columns = ("", "way", "time", "PSNR, validation", "PSNR, test")
    return Table("In the same time", columns, tuple(rows), key="contestants")


def _errors(steps: Sequence[Any]) -> str:
    predicted = [(float(i), s.predicted_error) for i, s in enumerate(steps) if s.predicted_error is not None]
    series = {"predicted": predicted} if predicted else {}
    series["measured"] = [(float(i), s.measured_error) for i, s in enumerate(steps)]
    return lines_chart(series, "Error of every step", "step", "error of the prediction (RMS)", log=False)


def _step_table(steps: Sequence[Any]) -> Table:
    rows = tuple(
        (
            whole(i), words(s.action), nothing() if s.predicted_error is None else plain(s.predicted_error),
            plain(s.measured_error), seconds(s.predicted_seconds), seconds(s.measured_seconds),
        )
        for i, s in enumerate(steps)
    )  # fmt: skip
    columns = ("step", "action", "error, predicted", "error, measured", "time, predicted", "time, measured")
    return Table("Step by step", columns, rows, key="step-checks")


def experts_section(stages: Stages) -> Section | None:
    """Which expert answers at which timestep."""
    if not stages.routes:
        return None
    shares = {f"{r.site}: {r.spec.name}": r.shares(_TIMESTEPS) for r in stages.routes}
    picture = routing_chart(shares, _TIMESTEPS, "Which expert answers at which timestep")
    rows = []
    for routes in stages.routes:
        of = routes.shares(_TIMESTEPS)
        lead = of.argmax(axis=1)
        for expert in range(of.shape[1]):
            reigns = _TIMESTEPS[lead == expert]
            span = f"{reigns.max():.0f} to {reigns.min():.0f}" if len(reigns) else "none"
            rows.append((words(routes.site), whole(expert + 1), words(span), percent(float(of[:, expert].mean()))))
    features = any(r.spec.routing == "both" for r in stages.routes)
    lead_text = "Each strip is a convolution whose kernel is a mixture of experts, routed by the timestep."
    if features:
        lead_text += " Where features route too, only the timestep's part is drawn."
    table = Table("Experts", ("convolution", "expert", "timesteps", "share of all"), tuple(rows), key="experts")
    return Section("experts", "Experts over the timesteps", lead_text, (table,), (("experts", picture),))


def training_section(stages: Stages) -> Section | None:
    """Losses and probes over the steps."""
    training = stages.training
    if training is None:
        return None
    drawings, tables = [], []
    if training.probes:
        series = {
            "latent error": [(float(p["step"]), float(p["latent_error"])) for p in training.probes],
            "damage": [(float(p["step"]), float(p["damage"])) for p in training.probes if "damage" in p],
        }
        series = {name: points for name, points in series.items() if points}
        drawings.append(
            ("probes", lines_chart(series, "Probes, whose best step was kept", "step", "on the probes' prompts"))
        )
        rows = tuple(
            (whole(p["step"]), plain(p["latent_error"]), plain(p["damage"]) if "damage" in p else nothing())
            for p in training.probes
        )
        tables.append(Table("Probes", ("step", "latent error", "damage"), rows, key="probes"))
    if training.losses:
        names = [n for n in training.losses[0] if n == "loss" or (n in ("task", "output", "feature", "trajectory"))]
        names += [n for n in training.losses[0] if n.endswith("_loss")]
        curves = {
            name: [
                (float(line["step"]), float(line[name]))
                for line in training.losses
                if isinstance(line.get(name), float)
            ]
            for name in names
        }
        curves = {name: points for name, points in curves.items() if any(y > 0 for _, y in points)}
        drawings.append(("losses", lines_chart(curves, "Losses in training", "step", "loss, mean since the last line")))
        last = training.losses[-1]
        facts = [(k, plain(float(v)) if isinstance(v, float) else words(str(v))) for k, v in last.items()]
        tables.append(
            Table("The last line of the journal", ("what", "value"), tuple((words(a), b) for a, b in facts), key="last")
        )
    wanted = stages.recipe.distillation if stages.recipe else None
    preset = f", preset {wanted.preset}" if wanted is not None and wanted.preset else ""
    steps = max(line["step"] for line in (*training.probes, *training.losses))
    lead = (
        f"{steps:,} steps{preset}. Latent error is ‖z_S − z_T‖² / ‖z_T‖² of final latents at the same seeds, its "
        "geometric mean over the prompts."
    )
    return Section("training", "Distillation", lead, tuple(tables), tuple(drawings))


def provenance_section(stages: Stages) -> Section | None:
    """Versions, machine, seeds, hashes, and the files that this was read from."""
    rows: list[tuple[str, str]] = []
    if stages.recipe is not None:
        rows += list(_flattened(stages.recipe.provenance))
    for what, facts in (
        ("schedule", stages.calibration), ("switching", stages.switched), ("one budget", stages.optimized),
    ):  # fmt: skip
        if facts is not None:
            rows += [(f"{what}: {k}", v) for k, v in _flattened(facts.measured_on)]
    if stages.evaluation is not None:
        rows += [
            ("evaluation: student's weights", stages.evaluation.model.weights),
            ("evaluation: teacher's weights", stages.evaluation.teacher.weights),
        ]
        rows += [(f"evaluation: {k}", v) for k, v in stages.evaluation.machine.versions.items()]
    rows.append(("read from", ", ".join(_relative(stages, name) for name in stages.found)))
    table = Table("Provenance", ("what", "value"), tuple((words(a), words(b)) for a, b in rows), key="provenance")
    lead = "Versions, machine, prompts and hashes that these figures hold for."
    return Section("provenance", "Where this came from", lead, (table,), open_tables=True)


def _relative(stages: Stages, name: str) -> str:
    return str(stages.found[name].relative_to(stages.folder))


def _flattened(values: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{before}{key.replace('_', ' ')}"
        if isinstance(value, Mapping):
            found += _flattened(value, f"{name}: ")
        else:
            found.append((name, str(value)))
    return found
