"""Schedules: the actions of all steps of a run, and what they are valid for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import Action
from asdm_compress.inheritance.corrections import Correction, CorrectionKey
from asdm_compress.inheritance.modes import Mode
from asdm_compress.inheritance.timeline import Timeline
from asdm_compress.inheritance.validity import Validity


@dataclass(frozen=True, slots=True)
class Schedule:
    """One action per evaluation of the UNet in a whole run, the fitted corrections, and what it is valid for.

    Without `validity` it is taken for any model and sampler that makes as many evaluations.
    """

    actions: tuple[Action, ...]
    corrections: Mapping[CorrectionKey, Correction] = field(default_factory=dict)
    validity: Validity | None = None


Rule = Mode | Schedule


def actions_of(rule: Rule, timeline: Timeline, start: int) -> tuple[Action, ...]:
    """The actions of a run that begins at evaluation `start` of a timeline.

    A mode counts the run's own evaluations, a schedule those of the whole timeline. Raises AsdmError for a schedule of
    another number of evaluations.
    """
    if isinstance(rule, Mode):
        return rule.actions(len(timeline) - start)
    if len(rule.actions) != len(timeline):
        raise AsdmError(
            f"this inheritance schedule is for {len(rule.actions)} evaluations of the UNet, and the sampler makes "
            f"{len(timeline)}",
            "Sample with the number of steps that it was made for, or use a mode such as uniform:3.",
        )
    return rule.actions[start:]
