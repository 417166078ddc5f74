"""What `optimize` tries: ways of sampling with their time, and how near they are to the reference or what they show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import Action
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.scheduling.rollouts import Score
from asdm_compress.scheduling.ways import Way
from asdm_compress.scheduling.worth import Worth, best_of

FIDELITY_PROMPTS, QUALITY_PROMPTS = (16, 32), (128, 128)  # to choose on, and for the report
CHEAP: Final = 8  # steps, that are soon measured


@dataclass(frozen=True, slots=True)
class Criterion:
    """What counts: fidelity to the full run's pictures, or the quality of pictures by themselves.

    Quality is judged by the CLIP model in the folder `clip`, or by the bundled world's reader, of that world's own
    captions. Raises AsdmError for any other name, and for a judge of what is not asked for.
    """

    name: str = "fidelity"
    clip: Path | None = None

    def __post_init__(self) -> None:
        if self.name not in ("fidelity", "quality"):
            raise AsdmError(f"there is no criterion {self.name!r}", "Use fidelity or quality.")
        if self.clip is not None and not self.is_quality:
            raise AsdmError("--clip judges quality, which is not what counts here", "Add --criterion quality.")

    @property
    def is_quality(self) -> bool:
        """Whether it is the pictures by themselves."""
        return self.name == "quality"

    def prompts(self, calibration: int, own: int | None = None) -> tuple[int, int, int]:
        """How many prompts are usually measured on, chosen on and reported on.

        Of one picture its nearness to another says more than what it shows, so that quality takes many; of a user's
        `own` as many as are left of those that are measured on, at most a third.
        """
        if not self.is_quality:
            return calibration, *FIDELITY_PROMPTS
        if own is None:
            return calibration, *QUALITY_PROMPTS
        first = min(calibration, max(1, own // 3))
        half = (own - first) // 2
        return first, max(1, min(half, QUALITY_PROMPTS[0])), max(1, min(own - first - half, QUALITY_PROMPTS[1]))


FIDELITY: Final = Criterion()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way of sampling, its time for a whole image over the reference's, and its scores against the reference.

    `worth` is what its pictures of the validation prompts are worth where quality is the criterion, and the way keeps
    the time.
    """

    role: str
    way: Way
    share: float
    validation: Score
    test: Score | None = None
    worth: Worth | None = None
    test_worth: Worth | None = None

    def texts(self) -> tuple[str, str]:
        """What chose it, on validation and on test prompts, for tables."""
        if self.worth is not None:
            return self.worth.text(), self.test_worth.text() if self.test_worth else ""
        return self.validation.text(), self.test.text() if self.test else ""

    def as_json(self) -> dict[str, Any]:
        """For files."""
        rule = self.way.rule
        return {
            "role": self.role, "way": self.way.name, "steps": self.way.steps, "scheduler": self.way.scheduler,
            "share": self.share, "validation": self.validation.as_json(),
            "test": self.test.as_json() if self.test else None,
            "worth": self.worth.as_json() if self.worth else None,
            "test_worth": self.test_worth.as_json() if self.test_worth else None,
            "actions": [action.name for action in rule.actions] if isinstance(rule, Schedule) else None,
        }  # fmt: skip


def best_within(tried: Sequence[Candidate], share: float) -> int | None:
    """The place of the best candidate that takes no more than a share of the time; None where none does."""
    within = [number for number, candidate in enumerate(tried) if candidate.share <= share]
    if not within:
        return None
    return within[_best([tried[number] for number in within])]


def frontier_of(tried: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """For every time the best candidate that takes no more; of those whose worth is known, where any's is."""
    known = [candidate for candidate in tried if candidate.worth is not None] or tried
    ordered = sorted(known, key=lambda c: c.share)
    found: list[Candidate] = []
    for count in range(1, len(ordered) + 1):
        best = ordered[_best(ordered[:count])]
        if not found or best is not found[-1]:
            found.append(best)
    return tuple(found)


def _best(candidates: Sequence[Candidate]) -> int:
    """The place of the best on validation prompts, the first of equals; test ones choose nothing."""
    worths = [candidate.worth for candidate in candidates if candidate.worth is not None]
    if len(worths) == len(candidates):
        return best_of(worths)
    return max(range(len(candidates)), key=lambda number: candidates[number].validation.mean())


def schedule_way(steps: int, solver: str | None, actions: tuple[Action, ...], seconds: float) -> Way:
    """A schedule, named by what it does."""
    name = f"{steps} steps of {solver or 'its own sampler'}, {_spent(actions)}"
    return Way(name, steps, seconds, Schedule(actions), solver)


def _spent(actions: Sequence[Action]) -> str:
    """What a schedule's steps do, counted, for people: two of them are told apart by it."""
    counts = Counter(
        "skipped" if action.skips else f"{action.member}{'' if action.is_whole else ' in part'}" for action in actions
    )
    return ", ".join(f"{count} {what}" for what, count in counts.items())


def tried_steps(full: int, fastest: int, reference: int, longer: Sequence[float]) -> list[int]:
    """How many steps schedules are tried with that run a member, or several.

    `longer` times those that it, of several the teacher, computes in `full` in the time, at most the reference's; where
    it has time for next to none, times a few of those that the `fastest` member computes.
    """
    most = max(full, min(fastest, CHEAP))
    return list(dict.fromkeys(min(reference, max(2, round(factor * most))) for factor in longer))
