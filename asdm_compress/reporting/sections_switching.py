"""The sections on whole runs: which member takes which step, and what one budget over everything found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from asdm_compress.inheritance.actions import Action
from asdm_compress.reporting.charts import Dot, heat_map, points_chart
from asdm_compress.reporting.figures import Cell, Section, Table, nothing, plain, score, times, whole, words
from asdm_compress.reporting.stages import OptimizedFacts, Stages, SwitchingFacts, TriedFacts, WorthFacts

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
    """What chose, over time, of everything that was tried within one budget."""
    facts = stages.optimized
    if facts is None:
        return None
    measure = _shown if facts.by_quality else _psnr
    kept = sorted((e for e in facts.tried if measure(e) is not None), key=lambda e: e.share)
    dots = []
    for e in kept:
        lines = [f"{e.share:.3f}x of the time", _worth(e.worth).text if facts.by_quality else score(e.validation).text]
        lines += ["the best within the budget"] if e == facts.best else []
        kind = "chosen" if e == facts.best else "dot"
        dots.append(Dot(e.share, measure(e) or 0.0, f"{e.role}: {e.way}", tuple(lines), None, kind))
    drawings = []
    if dots:
        axis = f"{facts.judged_by[0]} on validation prompts" if facts.by_quality else "PSNR on validation prompts, dB"
        title = ("What was tried", "time of a whole image over the reference's", axis)
        drawings.append(("optimize", points_chart(dots, *title, joined=None, log=False)))
    reference = facts.reference
    lead = (
        f"Asked for: {facts.share:.3g}x of the time of a whole image of {reference.steps} steps of "
        f"{reference.scheduler}. Found: {facts.best.way}, {facts.best.share:.3f}x. Time counts the text encoder and "
        f"the decoder, which take {reference.outside_the_unet_loop / reference.seconds:.0%} of the reference's."
    )
    if facts.by_quality:
        lead += (
            " What counts is what pictures show, and how far as a set they are from the full run's of other seeds; "
            "PSNR is to its pictures of the same seeds, which others need not be like to be as good."
        )
    return Section("optimize", "One budget over everything", lead, (_tried_table(facts, kept),), tuple(drawings))


def _tried_table(facts: OptimizedFacts, kept: Sequence[TriedFacts]) -> Table:
    """Ways and their scores; where quality chose, what pictures are worth too, the full run's last."""
    titles, rows = ["", "role", "way", "steps", "time"], []
    judged = [f"{' and '.join(facts.judged_by)}, {split}" for split in ("validation", "test") if facts.by_quality]
    for e in kept:
        worths = (_worth(e.worth), _worth(e.test_worth)) if facts.by_quality else ()
        rows.append(
            (
                words("best" if e == facts.best else ""), words(e.role), words(e.way), whole(e.steps), times(e.share),
                *worths, score(e.validation), score(e.test or {}),
            )
        )  # fmt: skip
    if facts.by_quality:
        full = facts.reference
        worths = (_worth(full.worth), _worth(full.test_worth))
        what = (words(""), words("the full run"), words(full.scheduler), whole(full.steps), times(1.0))
        rows.append((*what, *worths, nothing(), nothing()))
    titles += [*judged, "PSNR, validation", "PSNR, test"]
    return Table("What was tried", tuple(titles), tuple(rows), "Test prompts chose nothing.", key="tried")


def _worth(worth: WorthFacts | None) -> Cell:
    return nothing() if worth is None else Cell(worth.shown, worth.text)


def _shown(tried: TriedFacts) -> float | None:
    return None if tried.worth is None else tried.worth.shown


def _psnr(tried: TriedFacts) -> float | None:
    value = tried.validation.get("psnr")
    return float(value) if isinstance(value, (int, float)) else None
