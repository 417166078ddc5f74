"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from asdm_compress.assembly.frontier import Frontier
from asdm_compress.core.recipe import Evidence
from asdm_compress.core.units import format_bytes, format_count, format_seconds
from asdm_compress.profiling.profile import Profile, SiteProfile
from asdm_compress.reporting.assembly import PlanRow

_DEPTH = {"block": 0, "layer": 1, "unit": 2, "sub-unit": 3}


def profile_table(profile: Profile, depth: str = "unit") -> Table:
    """The profile as a tree in table form, down to `depth` (block, layer, unit or sub-unit)."""
    table = Table(title=_title(profile), title_justify="left", caption=_caption(profile), caption_justify="left")
    table.add_column("site")
    for name in ("params", "weights", "MACs", "conv+linear", "activations", "latency", "± IQR", "share", "efficiency"):
        table.add_column(name, justify="right")
    for check in profile.cross_check:
        table.add_column(check.counter, justify="right")
    shown = [s for s in profile.sites if _DEPTH[s.level] <= _DEPTH[depth]]
    for site in shown:
        cells = [
            format_count(site.parameters),
            format_bytes(site.bytes),
            format_count(site.macs),
            format_count(site.macs_conv_linear),
            format_bytes(site.peak_activation_bytes),
            format_seconds(site.latency),
            format_seconds(site.latency_iqr),
            f"{site.share:.1%}",
            "" if site.efficiency is None else f"{site.efficiency:.0%}",
        ]
        cells += [format_count(check.sites.get(site.path, 0)) for check in profile.cross_check]
        table.add_row(_label(site), *cells, style="bold" if site.level == "block" else "")
    total = [
        format_count(profile.parameters),
        format_bytes(profile.bytes),
        format_count(profile.macs),
        format_count(profile.macs_conv_linear),
        format_bytes(profile.peak_activation_bytes),
        format_seconds(profile.latency),
        "",
        f"{profile.explained:.1%}",
        f"{profile.macs / profile.latency / profile.matmul_peak:.0%}",
    ]
    table.add_section()
    table.add_row("whole UNet", *total, *(format_count(c.macs) for c in profile.cross_check), style="bold")
    return table


def _label(site: SiteProfile) -> Text:
    depth = _DEPTH[site.level]
    name = site.path
    if site.level == "layer":
        name = "layer " + site.path.rsplit(".", 1)[1]
    elif site.level == "unit":
        name = ".".join(site.path.split(".")[-2:])
    elif site.level == "sub-unit":
        name = site.kind
    return Text("  " * depth + name)


def _title(profile: Profile) -> str:
    mark = profile.fingerprint
    layout = ", channels-last" if mark.channels_last else ""
    return (
        f"{mark.model}: {mark.image_size} px, batch {mark.batch}, {mark.dtype}{layout}, {mark.device}, "
        f"{mark.threads} threads"
    )


def _caption(profile: Profile) -> str:
    lines = [
        f"The sites explain {profile.explained:.1%} of the forward pass; matrix products reach "
        f"{format_count(profile.matmul_peak)}MACs/s here, to which efficiency is the share.",
        "MACs count every product of attention once; conv+linear leaves these out, as many published tables do.",
    ]
    lines += [f"{c.counter}: {c.convention}." for c in profile.cross_check]
    return "\n".join(lines)


def evidence_table(evidence: Evidence) -> Table:
    """Costs of teacher and student, predicted and measured."""
    table = Table(title="Costs", title_justify="left")
    for name in ("", "teacher", "predicted", "measured", "measured / teacher"):
        table.add_column(name, justify="left" if not name else "right")
    teacher, predicted, measured = evidence.teacher, evidence.predicted, evidence.measured
    table.add_row(
        "latency",
        format_seconds(teacher.latency),
        format_seconds(predicted.latency),
        format_seconds(measured.latency),
        f"{evidence.measured_latency_ratio:.3f}x",
    )
    table.add_row(
        "MACs",
        format_count(teacher.macs),
        format_count(predicted.macs),
        format_count(measured.macs),
        f"{measured.macs / teacher.macs:.3f}x",
    )
    table.add_row(
        "parameters",
        format_count(teacher.params),
        format_count(predicted.params),
        format_count(measured.params),
        f"{measured.params / teacher.params:.3f}x",
    )
    table.add_section()
    table.add_row("damage", "0", f"{evidence.predicted_damage:.4g}", f"{evidence.measured_damage:.4g}", "")
    table.add_row("damage, held out", "0", "", f"{evidence.held_out_damage:.4g}", "")
    return table


def plan_tree(rows: Sequence[PlanRow]) -> Tree:
    """The plan's edits with what each saves and damages."""
    tree = Tree(f"Plan: {len(rows)} edits")
    for row in rows:
        tree.add(f"{row.site}: {row.edit}  (saves {row.saved:.1%} of the latency, damage {row.damage:.3g})")
    return tree


def frontier_table(frontier: Frontier) -> Table:
    """The plans from the loosest budget to the tightest."""
    also = f", under {', '.join(frontier.also)}" if frontier.also else ""
    table = Table(title=f"{frontier.model}: the plan of least damage for every budget{also}", title_justify="left")
    measured = any(point.measured_damage is not None for point in frontier.points)
    for name in ("budget", "latency", "MACs", "parameters", "edits", "summed damage", "proven", "predicted damage"):
        table.add_column(name, justify="left" if name == "budget" else "right")
    if measured:
        table.add_column("measured damage", justify="right")
    whole = frontier.teacher
    for point in frontier.points:
        shares = [
            point.costs.latency / whole.latency, point.costs.macs / whole.macs, point.costs.params / whole.params,
        ]  # fmt: skip
        damages = [f"{point.summed_damage:.3g}", frontier.proof(point)]
        row = [*(f"{s:.3f}x" for s in shares), str(len(point.edits)), *damages, f"{point.predicted_damage:.3g}"]
        if measured:
            row.append("" if point.measured_damage is None else f"{point.measured_damage:.3g}")
        table.add_row(point.budget, *row)
    table.caption = f"No plan goes under {frontier.smallest:.4f}x of the {frontier.resource}."
    return table
