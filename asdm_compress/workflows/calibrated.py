"""What `calibrate` found: the schedule, what else was tried in its time, and what is written and said of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from asdm_compress.core.provenance import processor_name, versions
from asdm_compress.evaluation.prompts import distinct
from asdm_compress.inheritance.actions import Action
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.reporting.calibration import Point, Row
from asdm_compress.reporting.grid import labelled_grid
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scenes.captions import Caption
from asdm_compress.scheduling.check_steps import StepCheck
from asdm_compress.scheduling.goals import Choosing, Goal, Plan
from asdm_compress.scheduling.rollouts import Score, gain
from asdm_compress.scheduling.search import Front
from asdm_compress.scheduling.ways import Way


@dataclass(frozen=True, slots=True)
class Contestant:
    """A way that was tried, its share of the full run's time as measured, its scores, and its first test pictures."""

    role: str
    way: Way
    share: float
    validation: Score
    test: Score
    pictures: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True)
class Splits:
    """Prompts for measuring, for choosing, and for the report alone; what those of the bundled world claim."""

    calibration: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    captions: Mapping[str, Caption] = field(default_factory=dict)


def own_splits(prompts: Sequence[str], calibration: int, validation: int, test: int) -> Splits:
    """A user's own prompts in the given proportions, in order, each once, and none in two splits.

    Where there are few, first each split gets one and then validation a second: one picture has no interval. Of two
    prompts the first serves calibration and validation, which differ in their seeds. Raises AsdmError where fewer than
    two differ.
    """
    prompts = distinct(prompts)
    count, wanted = len(prompts), calibration + validation + test
    if count == 2:
        return Splits(tuple(prompts[:1]), tuple(prompts[:1]), tuple(prompts[1:]))
    last = min(max(1, round(count * test / wanted)), max(1, count - 3))
    left = count - last
    middle = min(max(2, round(left * validation / (calibration + validation))), left - 1)
    first = left - middle
    return Splits(
        tuple(prompts[:first][:calibration]), tuple(prompts[first:left][:validation]), tuple(prompts[left:][:test])
    )


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A schedule (first of `contestants`), its rivals at the same time, and how predictions held step by step.

    `curve` has what they and the schedule's like reach on validation prompts in other times, `full_pictures` the full
    run's first test pictures.
    """

    choosing: Choosing
    splits: Splits
    plan: Plan
    contestants: tuple[Contestant, ...]
    steps: tuple[StepCheck, ...]
    verdict: str
    curve: tuple[Point, ...] = ()
    full_pictures: tuple[Image, ...] = ()

    @property
    def predicted_share(self) -> float:
        """Of the full run's time."""
        return self.plan.way.seconds / self.choosing.every_times.full_run

    def schedule(self, steps: int) -> Schedule:
        """What every step does, with its corrections, valid for anything."""
        return schedule_of(self.plan, steps)

    def as_json(self, goal: Goal, sampling: SamplingSettings, images: int) -> dict[str, Any]:
        """Everything, for `calibration.json`."""
        pipeline, ours = self.choosing.judge.pipeline, self.contestants[0]
        plan, splits = self.plan, self.splits
        return {
            "goal": goal.as_json(),
            "sampler": {
                "scheduler": type(pipeline.scheduler).__name__,
                "steps": sampling.steps,
                "guidance": sampling.guidance,
            },
            "measured_on": {
                "processor": processor_name(),
                "device": str(pipeline.device),
                "dtype": str(pipeline.unet.dtype),
                "images_at_once": images,
                "versions": versions(),
            },
            "prompts": {name: len(getattr(splits, name)) for name in ("calibration", "validation", "test")},
            "time": {
                "full_seconds": self.choosing.every_times.full_run,
                "predicted_share": self.predicted_share,
                "measured_share": ours.share,
            },
            "surrogate": {"damage": plan.damage, "summed_cost": plan.cost, "lower_bound": plan.bound},
            "front": front_json(self.choosing.front, self.choosing),
            "corrected_steps": sorted(plan.fit.left) if plan.fit else [],
            "contestants": [
                {
                    "role": c.role,
                    "way": c.way.name,
                    "share": c.share,
                    "validation": c.validation.as_json(),
                    "test": c.test.as_json(),
                }
                for c in self.contestants
            ],
            "curve": [
                {"role": role, "way": way, "share": share, "psnr": psnr} for role, way, share, psnr in self.curve
            ],
            "confidence": goal.confidence(ours.validation, ours.test),
            "verdict": self.verdict,
            "steps": [check.as_json() for check in self.steps],
        }

    def rows(self) -> list[Row]:
        """For the table of what was tried in the same time."""
        return [(c.role, c.way.name, c.share, c.validation.text(), c.test.text()) for c in self.contestants]

    def points(self) -> list[Point]:
        """For the plot of PSNR over time, on validation prompts."""
        return [*self.curve, *((c.role, c.way.name, c.share, c.validation.mean()) for c in self.contestants)]

    def grid(self) -> Image:
        """The full run, the schedule and what was tried in its time, at the same test prompts and seeds."""
        rows = [("full\n1.00x", self.full_pictures)]
        rows += [
            (f"{c.role}\n{c.share:.2f}x, {c.test.mean():.1f} dB", c.pictures) for c in self.contestants if c.pictures
        ]
        return labelled_grid(rows, self.splits.test[: len(self.full_pictures)])

    def lines(self, goal: Goal) -> list[str]:
        """What is to be said beside the tables."""
        ours = self.contestants[0]
        confidence = goal.confidence(ours.validation, ours.test)
        share = goal.share(self.choosing.every_times.full_run)
        fitted = len(self.plan.fit.left) if self.plan.fit else 0
        return [
            f"Time of a run: {self.predicted_share:.3f}x predicted, {ours.share:.3f}x measured in turns.",
            f"The summed cost of the dynamic program's schedule for this time is {self.plan.cost:.4g}; no schedule of "
            f"its family can be under {self.plan.bound:.4g}.",
            *([f"{fitted} steps have fitted corrections."] if fitted else []),
            *([f"Quality: {confidence}."] if confidence else []),
            *(
                [f"That is over the limit of {share:.3f}x; calibrate again on a quiet machine."]
                if share is not None and ours.share > share
                else []
            ),
            self.verdict,
        ]


def schedule_of(plan: Plan, steps: int) -> Schedule:
    """A plan as a schedule, valid for anything."""
    rule = plan.way.rule
    return rule if isinstance(rule, Schedule) else Schedule(plan.actions(steps))


def front_json(front: Front, choosing: Choosing) -> dict[str, Any]:
    """The whole front: every corner's time and cost, and its steps by their number among the actions."""
    menu = choosing.surrogate.menu
    names: dict[Action, int] = {}
    corners = []
    for corner in front.corners:
        steps = [names.setdefault(menu.action(choice), len(names)) for choice in corner.choices]
        corners.append({"share": corner.share, "summed_cost": corner.cost, "steps": steps})
    return {"actions": [action.name for action in names], "corners": corners}


def _surely_ahead(ours: Contestant, rival: Contestant) -> bool:
    difference, interval = gain(ours.test, rival.test)
    return difference - interval > 0


def decibels_ahead(difference: float, interval: float) -> str:
    """A mean difference of PSNR for people, with half its interval where there is one: of one picture there is none."""
    return f"{difference:+.2f} dB" + (f" (± {interval:.2f})" if math.isfinite(interval) else " (of one picture)")


def verdict_on(contestants: Sequence[Contestant]) -> str:
    """What won on test prompts, which chose nothing: on those for validation the schedule was chosen itself.

    Of several rivals that are ahead, validation chooses the one to recommend: the best of them on test prompts would be
    too good to be true.
    """
    ours, *rivals = contestants
    better = [c for c in rivals if c.test.mean() >= ours.test.mean()]
    if not rivals:
        return "Nothing else fits into this time."
    strongest = max(better, key=lambda c: c.validation.mean()) if better else max(rivals, key=lambda c: c.test.mean())
    difference, interval = gain(ours.test, strongest.test)
    said = f"{decibels_ahead(difference, interval)} against {strongest.role} ({strongest.way.name}) on test prompts"
    if not better:
        if not all(_surely_ahead(ours, rival) for rival in rivals):
            return f"The schedule is ahead of everything that was tried in its time, but not surely of all: {said}."
        return f"The schedule beats everything that was tried in its time: {said}."
    beaten = [c.role for c in rivals if c not in better]
    start = (
        f"The schedule beats {'; '.join(beaten)}, and nothing else"
        if beaten
        else "The schedule beats none of its rivals"
    )
    if difference + interval >= 0:
        return f"{start}: {said}, which does not tell the two apart."
    return f"{start}: {said}. Recommended: {strongest.way.name}."
