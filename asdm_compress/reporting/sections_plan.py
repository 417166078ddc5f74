"""The section on the plan: the UNet part by part, with what every part costs and what was done to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffusers import UNet2DConditionModel

from asdm_compress.assembly.plan import LEVELS, Plan
from asdm_compress.assembly.record import StudentSite
from asdm_compress.core.units import format_count, format_seconds
from asdm_compress.models.families import latent_size_of
from asdm_compress.models.sites import find_sites
from asdm_compress.profiling.counting import MacCount, count_macs
from asdm_compress.profiling.profile import Profile, SiteProfile
from asdm_compress.reporting.figures import (
    Section,
    Table,
    nothing,
    percent,
    plain,
    words,
)
from asdm_compress.reporting.stages import Stages
from asdm_compress.reporting.unet_drawing import SiteFigures, changes_of, draw_costs


def plan_section(stages: Stages, teacher: UNet2DConditionModel | None) -> Section | None:
    """The UNet as a drawing, and the plan's edits."""
    recipe = stages.recipe
    if recipe is None or teacher is None:
        return None
    figures, what = site_figures(stages, teacher)
    picture = draw_costs(teacher, Plan(recipe.as_edits()), figures, what)
    rows = []
    for entry in recipe.edits:
        option = stages.assembly.option(entry.site, entry.edit) if stages.assembly else None
        whole_latency = stages.profile.latency if stages.profile else None
        saved = nothing() if option is None or not whole_latency else percent(option.saved_latency / whole_latency)
        macs = nothing() if option is None or not stages.profile else percent(option.saved_macs / stages.profile.macs)
        damage = nothing() if option is None else plain(option.damage)
        rows.append((words(entry.site), words(entry.edit), saved, macs, damage))
    table = Table(
        "Edits", ("site", "edit", "latency saved", "MACs saved", "damage alone"), tuple(rows), key="edits",
        note="Savings and damages of each edit on its own; together they need not add up.",
    )  # fmt: skip
    after = ", and what is left of it in the student" if any(f.after is not None for f in figures.values()) else ""
    return Section(
        "plan",
        "The UNet, part by part",
        f"Bars and shares are of the teacher's {what}{after}. Point at a part, or reach it with Tab and the arrow "
        "keys, for its figures.",
        (table,),
        (("unet", picture),),
    )


def site_figures(stages: Stages, teacher: UNet2DConditionModel) -> tuple[dict[str, SiteFigures], str]:
    """What is known of every site, and what its share is of: latency where there is a profile, else MACs."""
    assert stages.recipe is not None
    after = {site.path: site for site in stages.assembly.student_sites} if stages.assembly else {}
    told = _edits_told(stages, teacher)
    if stages.profile is None:
        return _counted_figures(teacher, told), "MACs"
    changes = changes_of(teacher, Plan(stages.recipe.as_edits()))
    found = {}
    for site in stages.profile.sites:
        left = after.get(site.path)
        gone = site.path in changes.gone and left is None
        lines = _cost_lines(site, left, gone and bool(after), stages.profile)
        share = None
        if after:
            share = 0.0 if left is None else left.latency / stages.profile.latency
        found[site.path] = SiteFigures(site.share, share, (*lines, *told.get(site.path, ())))
    return found, "latency"


def _cost_lines(site: SiteProfile, left: StudentSite | None, gone: bool, profile: Profile) -> list[str]:
    rows = (
        ("latency", format_seconds(site.latency), format_seconds(left.latency) if left and left.latency > 0 else "0"),
        ("MACs", format_count(site.macs), format_count(left.macs) if left else "0"),
        ("parameters", format_count(site.parameters), format_count(left.parameters) if left else "0"),
    )
    lines = [f"{name} {a} → {b}" if left or gone else f"{name} {a}" for name, a, b in rows]
    lines[0] += f" ({site.share:.1%} of the teacher's)"
    return lines


def _counted_figures(teacher: UNet2DConditionModel, told: Mapping[str, Sequence[str]]) -> dict[str, SiteFigures]:
    """From MACs counted on the UNet without weights."""
    size = latent_size_of(teacher)
    macs = count_macs(teacher, 1, size, size, 77)
    total = macs[""].total or 1
    found = {}
    for site in find_sites(teacher):
        own = sum(macs.get(m, MacCount()).total for m in site.modules)
        found[site.path] = SiteFigures(
            own / total, None, (f"MACs {format_count(own)} ({own / total:.1%})", *told.get(site.path, ()))
        )
    return found


def _edits_told(stages: Stages, teacher: UNet2DConditionModel) -> dict[str, list[str]]:
    """For the sites that an edit is named for, and the modules in them, what the edit does on its own."""
    recipe = stages.recipe
    assert recipe is not None
    sites = {site.path: site for site in find_sites(teacher)}
    told: dict[str, list[str]] = {}
    for entry in recipe.edits:
        option = stages.assembly.option(entry.site, entry.edit) if stages.assembly else None
        text = f"edit {entry.edit} at {entry.site}"
        if option is not None and stages.profile is not None:
            text += f": alone saves {option.saved_latency / stages.profile.latency:.1%}, damages {option.damage:.2g}"
        touched = [p for p in sites if p == entry.site or p.startswith(f"{entry.site}.")]
        if entry.site in sites:
            touched += sites[entry.site].modules
        if entry.site.startswith(LEVELS):
            touched = sorted(changes_of(teacher, Plan({entry.site: entry.edit})).gone)
        for path in dict.fromkeys(touched):
            told.setdefault(path, []).append(text)
    return told
