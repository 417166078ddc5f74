"""A calibrated schedule for a run of another number of steps: its actions carried over by σ."""

from __future__ import annotations

from dataclasses import replace

from asdm_compress.inheritance.carrying import CarriedOver, remap
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.validity import Validity

__all__ = ["CarriedOver", "for_this_run", "remap"]


def for_this_run(schedule: Schedule, made: Validity, seen: Validity) -> tuple[Schedule, str | None]:
    """A schedule as it is for a run, or carried over to its number of steps; then also what to tell people of it.

    Raises AsdmError, naming what differs, for a run of another kind, and where nothing can be carried over.
    """
    if seen.evaluations == made.evaluations:
        made.check(seen)
        return schedule, None
    made.check_but_for_steps(seen)
    actions = remap(schedule.actions, made.sigmas, seen.sigmas)
    before, after = (sum(a.is_whole for a in some) for some in (schedule.actions, actions))
    lost = ", without its fitted corrections" if schedule.corrections else ""
    notice = (
        f"this inheritance schedule was calibrated for {made.evaluations} evaluations of the UNet and is carried over "
        f"to {seen.evaluations}{lost}: {after} compute everything, where {before} did; its time and its quality are "
        "not those that were measured"
    )
    return Schedule(actions, {}, replace(made, evaluations=seen.evaluations, sigmas=seen.sigmas)), notice
