"""The sections on damage: of the plan by timestep band, of its edits, and of the best plans of other budgets."""

from __future__ import annotations

from asdm_compress.core.recipe import Costs
from asdm_compress.reporting.charts import Dot, heat_map, log_class, points_chart
from asdm_compress.reporting.figures import (
    Section,
    Table,
    nothing,
    percent,
    plain,
    times,
    whole,
    words,
)
from asdm_compress.reporting.stages import Stages


def damage_section(stages: Stages) -> Section | None:
    """The damage of the whole plan in every band, and of every edit on its own."""
    assembly, recipe = stages.assembly, stages.recipe
    if assembly is None or not assembly.bands:
        return None
    parts = [band.weight * band.held_out_damage for band in assembly.bands]
    total = sum(parts) or 1.0
    most = max(band.held_out_damage for band in assembly.bands) or 1.0
    rows = []
    for band, part in zip(assembly.bands, parts, strict=True):
        rows.append(
            (
                words(f"{band.first:.0f}\u00a0to\u00a0{band.last:.0f}"),
                percent(band.weight),
                plain(band.held_out_damage, (band.held_out_damage / most,)),
                percent(part / total, (part / total,)),
            )
        )
    columns = ("timesteps", "weight", "damage", "share of the total")
    note = "A band's weight is what an equal relative error there does to the final latent, of all bands."
    tables = [Table("The whole plan, on held-out prompts", columns, tuple(rows), note, "bands")]
    drawings: list[tuple[str, str]] = []
    chosen = [o for e in (recipe.edits if recipe else ()) if (o := assembly.option(e.site, e.edit)) is not None]
    if chosen:
        values = [v for option in chosen for v in option.bands if v > 0]
        low, high = (min(values), max(values)) if values else (1.0, 1.0)
        low = max(low, high * 1e-6)
        names = [f"{band.first:.0f}" for band in assembly.bands]
        cells = [[(log_class(v, low, high), f"damage {v:.3g} alone") for v in option.bands] for option in chosen]
        title = "One-shot damage of every edit in every timestep band"
        picture = heat_map([_named(o.site, o.edit) for o in chosen], names, cells, title, "band from timestep", 250.0)
        drawings.append(("edits", picture))
        table_rows = tuple((words(o.site), words(o.edit), *(plain(v) for v in o.bands)) for o in chosen)
        tables.append(
            Table("Every edit alone", ("site", "edit", *(f"from {n}" for n in names)), table_rows, key="edit-bands")
        )
    lead = (
        "Damage is the relative squared error of the guided noise prediction on the teacher's own trajectories. Noise "
        "is above and left, the finished image below and right."
    )
    return Section("damage", "Damage by timestep band", lead, tuple(tables), tuple(drawings))


def _named(site: str, edit: str) -> str:
    short = (
        site.replace("down_blocks", "down")
        .replace("up_blocks", "up")
        .replace("attentions", "attn")
        .replace("resnets", "res")
    )
    return f"{short.replace('.transformer_blocks.0', '')} {edit.replace('@timestep', '')}"


def frontier_section(stages: Stages) -> Section | None:
    """The best plan of every budget; and the edits that there were to choose from."""
    frontier = stages.frontier
    if frontier is None or not frontier.points:
        return None
    name = {"latency": "latency", "macs": "MACs", "params": "parameters"}[frontier.resource]
    dots, rows = [], []
    for number, point in enumerate(frontier.points):
        share = frontier.share(point)
        lines = (f"{len(point.edits)} edits", f"predicted damage {point.predicted_damage:.3g}")
        dots.append(Dot(share, point.predicted_damage, f"{share:.3f}x of the {name}", lines, f"plan-{number}"))
        rows.append(
            (
                words(point.budget), times(share), whole(len(point.edits)), plain(point.summed_damage),
                words(frontier.proof(point)), plain(point.predicted_damage),
                nothing() if point.measured_damage is None else plain(point.measured_damage),
            )
        )  # fmt: skip
    evidence = stages.recipe.evidence if stages.recipe else None
    if evidence is not None:
        measured = _measured_share(evidence.measured, evidence.teacher, frontier.resource)
        lines = (f"{measured:.3f}x of the {name}", f"damage {evidence.held_out_damage:.3g} on held-out prompts")
        dots.append(Dot(measured, evidence.held_out_damage, "this student, as measured", lines, None, "chosen"))
    columns = ("budget", name, "edits", "summed damage", "proven", "predicted damage", "measured damage")
    also = f" under {', '.join(frontier.also)}" if frontier.also else ""
    picture = points_chart(
        dots, f"Damage over {name}", f"{name}, share of the teacher's", "predicted damage", "{:.2f}x"
    )
    lead = (
        f"For every budget of {name}{also}, the plan of least summed damage among {frontier.options} possible edits; "
        f"no plan goes under {frontier.smallest:.3f}x. Pick a point to see its plan."
    )
    if evidence is not None:
        lead += " The orange point is this student as measured, on held-out prompts."
    note = (
        "Damages are summed from single edits, each with what is fitted for it; most plans were never built."
        if not any(p.measured_damage is not None for p in frontier.points)
        else "Measured: built, fitted, and compared on prompts kept out of the fit."
    )
    table = Table("Frontier", columns, tuple(rows), note, "frontier")
    drawings = [("frontier", picture)]
    if (cloud := _cloud(stages)) is not None:
        drawings.append(("options", cloud))
    return Section("frontier", "Frontier: the best plan of every budget", lead, (table,), tuple(drawings))


def _measured_share(student: Costs, teacher: Costs, resource: str) -> float:
    return float(getattr(student, resource) / getattr(teacher, resource))


def _cloud(stages: Stages) -> str | None:
    """Every edit that the search could choose, by what it saves and what it damages."""
    assembly, profile = stages.assembly, stages.profile
    if assembly is None or profile is None:
        return None
    chosen = set(stages.recipe.as_edits().items()) if stages.recipe else set()
    dots = []
    for option in assembly.options:
        if option.saved_latency <= 0:
            continue
        saved = 100 * option.saved_latency / profile.latency
        is_chosen = (option.site, option.edit) in chosen
        lines = [f"saves {saved:.1f} % of the latency", f"damage {option.damage:.2g} alone"]
        lines += ["chosen"] if is_chosen else []
        kind = "chosen" if is_chosen else "faint"
        dots.append(Dot(saved, option.damage, f"{option.site} {option.edit}", tuple(lines), None, kind))
    if not dots:
        return None
    dots.sort(key=lambda dot: dot.kind == "chosen")
    return points_chart(
        dots,
        "Every edit that could be chosen",
        "saved share of the latency, %",
        "damage alone",
        joined=None,
    )
