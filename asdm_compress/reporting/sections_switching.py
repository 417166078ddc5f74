"""The sections on whole runs: which member takes which step, and what one budget over everything found."""

from __future__ import annotations

from typing import Final

from asdm_compress.inheritance.actions import Action
from asdm_compress.reporting.charts import Dot, heat_map, points_chart
from asdm_compress.reporting.figures import Section, Table, nothing, plain, score, times, whole, words
from asdm_compress.reporting.stages import Stages, SwitchingFacts, TriedFacts

SKIPPED: Final = "none, forecast"


def switching_section(stages: Stages) -> Section | None:
    """Members by steps, and how the schedule does beside what else fits into its time."""
    schedule = stages.switching
    if schedule is None:
        return None
    actions = schedule.actions
    members = list(dict.fromkeys(action.member or "the UNet itself" for action in actions if not action.skips))
    rows = [*members, *([SKIPPED] if any(action.skips for action in actions) else [])]
    cells = [[_cell(row, action) for action in actions] for row in rows]
    picture = heat_map(rows, [str(i) for i in range(len(actions))], cells, "Which member takes which step", "step")
    counts = tuple((words(row), whole(sum(_takes(row, action) for action in actions))) for row in rows)
    steps = tuple((whole(i), words(action.name)) for i, action in enumerate(actions))
    tables = [
        Table("Steps of each member", ("member", "steps"), counts, key="member-steps"),
        Table("Steps", ("step", "action"), steps, key="switching-steps"),
    ]
    lead = f"{len(actions)} evaluations of the UNet."
    facts = stages.switched
    if facts is not None:
        lead = (
            f"A run takes {facts.time.measured_share:.3f}x of the full one's time, predicted "
            f"{facts.time.predicted_share:.3f}x. {facts.verdict} {lead}"
        )
        tables.insert(0, _entrants(facts))
    return Section("switching", "Switching between members", lead, tuple(tables), (("switching", picture),))


def _takes(row: str, action: Action) -> bool:
    return action.skips if row == SKIPPED else not action.skips and row == (action.member or "the UNet itself")


def _cell(row: str, action: Action) -> tuple[str, str]:
    if not _takes(row, action):
        return "none", "another's step"
    kind = "forecast" if action.skips else "computed" if action.is_whole else "part"
    return kind, action.name


def _entrants(facts: SwitchingFacts) -> Table:
    rows = tuple(
        (
            words(e.role), words(e.way), times(e.share),
            nothing() if e.latent_error is None else plain(e.latent_error), score(e.test),
        )
        for e in facts.entrants
    )  # fmt: skip
    columns = ("", "way", "time", "final-latent error", "PSNR, test")
    return Table("In the same time", columns, rows, key="entrants")


def optimize_section(stages: Stages) -> Section | None:
    """Nearness to the reference over time, of everything that was tried within one budget."""
    facts = stages.optimized
    if facts is None:
        return None
    kept = sorted((e for e in facts.tried if _psnr(e) is not None), key=lambda e: e.share)
    dots = []
    for e in kept:
        lines = [f"{e.share:.3f}x of the time", score(e.validation).text]
        lines += ["the best within the budget"] if e == facts.best else []
        kind = "chosen" if e == facts.best else "dot"
        dots.append(Dot(e.share, _psnr(e) or 0.0, f"{e.role}: {e.way}", tuple(lines), None, kind))
    drawings = []
    if dots:
        title = ("What was tried", "time of a whole image over the reference's", "PSNR on validation prompts, dB")
        drawings.append(("optimize", points_chart(dots, *title, joined=None, log=False)))
    rows = tuple(
        (
            words("best" if e == facts.best else ""), words(e.role), words(e.way), whole(e.steps),
            times(e.share), score(e.validation), score(e.test or {}),
        )
        for e in kept
    )  # fmt: skip
    columns = ("", "role", "way", "steps", "time", "PSNR, validation", "PSNR, test")
    reference = facts.reference
    lead = (
        f"Asked for: {facts.share:.3g}x of the time of a whole image of {reference.steps} steps of "
        f"{reference.scheduler}. Found: {facts.best.way}, {facts.best.share:.3f}x. Time counts the text encoder and "
        f"the decoder, which take {reference.outside_the_unet_loop / reference.seconds:.0%} of the reference's."
    )
    table = Table("What was tried", columns, rows, "Test prompts chose nothing.", key="tried")
    return Section("optimize", "One budget over everything", lead, (table,), tuple(drawings))


def _psnr(tried: TriedFacts) -> float | None:
    value = tried.validation.get("psnr")
    return float(value) if isinstance(value, (int, float)) else None
