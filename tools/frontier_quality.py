"""Which of hundreds of ways draws the best pictures, for `bench_frontier.py`: to judge one of them takes a minute.

What a sampler's own part of a step takes is nothing beside the UNet's, so that of several samplers one is timed; of
DeepCache's intervals at a branch only the shortest that is in time is judged; and on some of the prompts first, of
which some ways go on.
"""

from __future__ import annotations

from collections.abc import Sequence

from asdm_compress.inheritance.modes import Mode
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.scheduling.ways import Way
from asdm_compress.scheduling.worth import Worth, best_of
from asdm_compress.workflows.budget_search import Search

SCREENING_PROMPTS, SCREENED = 32, 8  # prompts that are looked at first, and ways that go on


def shortest_intervals(ways: Sequence[Way]) -> list[Way]:
    """Of DeepCache's ways with the same sampler, steps and branch the one that computes the most."""
    shortest: dict[tuple[str | None, int, str], tuple[float, Way]] = {}
    for way in ways:
        assert isinstance(way.rule, Mode)
        which, interval = (way.scheduler, way.steps, way.rule.light.name), way.rule.interval
        if which not in shortest or interval < shortest[which][0]:
            shortest[which] = interval, way
    return [way for _, way in shortest.values()]


def best_by_quality(search: Search, ways: Sequence[Way]) -> Way:
    """The best by the command's own rule, of those that a part of the validation prompts leaves in."""
    if len(ways) > SCREENED:
        few = search.quality_on(search.splits.validation[:SCREENING_PROMPTS])
        worths = [few.worth(way) for way in ways]
        most = max(worths, key=Worth.mean)
        standing = [number for number, worth in enumerate(worths) if not worth.is_behind(most)]
        ways = [ways[number] for number in sorted(standing, key=lambda number: worths[number].distance)[:SCREENED]]
    return ways[best_of([search.worth(way) for way in ways])]


def shape_of(way: Way) -> tuple[str, ...]:
    """What a way does at every step, whatever the sampler."""
    actions = way.rule.actions if isinstance(way.rule, Schedule) else way.rule.actions(way.steps)  # type: ignore[union-attr]
    return tuple(action.name for action in actions)
