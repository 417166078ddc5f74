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
from asdm_compress.scheduling.quality import Worth, best_of
from asdm_compress.scheduling.rollouts import Score
from asdm_compress.scheduling.ways import Way

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

    def is_better_than(self, other: Candidate) -> bool:
        """On validation prompts; test ones choose nothing."""
        if self.worth is None or other.worth is None:
            return self.validation.mean() > other.validation.mean()
        return best_of([other.worth, self.worth]) == 1

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
    worths = [worth for number in within if (worth := tried[number].worth) is not None]
    if worths and len(worths) == len(within):
        return within[best_of(worths)]
    return max(within, key=lambda number: tried[number].validation.mean(), default=None)


def frontier_of(tried: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates that none which takes less time is as good as; of those whose worth is known, where any's is."""
    known = [candidate for candidate in tried if candidate.worth is not None] or tried
    found: list[Candidate] = []
    for candidate in sorted(known, key=lambda c: c.share):
        if not found or candidate.is_better_than(found[-1]):
            found.append(candidate)
    return tuple(found)


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
