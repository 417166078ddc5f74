"""Orders of members that need no measurement, for any number of steps.

small-first:10      the smallest member takes the first 10 steps, the largest the rest (T-Stitch, 2402.14167)
small-first:10/5    with three members: 10 steps of the smallest, 5 of the next one, the rest of the largest
large-first:10      the same from the largest on
interleaved:3       every third step is the largest member's, from the first on, the others are the smallest's
explicit:a*10/b*5   what every step does, members by their names; `skip` and `skip:hold` take a step with a forecast
                    of the noise prediction
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import Action, skip
from asdm_compress.inheritance.forecast import HOLD, LINEAR, parse_forecast

ORDER_GRAMMAR: Final = (
    "small-first:10, large-first:10, interleaved:3, explicit:teacher*6/student*16/skip/student/teacher"
)
_TIMES: Final = re.compile(r"(?P<what>.+?)(?:\*(?P<count>\d+))?")


def parse_order(text: str, members: Sequence[str], steps: int) -> tuple[Action, ...]:
    """The actions of a run of `steps` evaluations; `members` are given from the smallest to the largest.

    Raises AsdmError for what is no order, for members that are not there, and for counts that do not fit.
    """
    kind, _, rest = text.partition(":")
    if steps < 1:
        raise AsdmError(f"a run of {steps} steps has nothing to switch")
    if kind in ("small-first", "large-first"):
        ranked = list(members) if kind == "small-first" else list(reversed(members))
        names = _stitched(text, [_count(word, text) for word in rest.split("/")], ranked, steps)
    elif kind == "interleaved":
        every = _count(rest, text)
        if every < 1:
            raise AsdmError(f"{text!r}: the distance of the largest member's steps is at least 1")
        names = [members[-1] if i % every == 0 else members[0] for i in range(steps)]
    elif kind == "explicit":
        return _explicit(text, rest, members, steps)
    else:
        raise AsdmError(f"unknown order {text!r}", f"Orders are written like {ORDER_GRAMMAR}.")
    return tuple(Action(member=name) for name in names)


def _stitched(text: str, counts: Sequence[int], ranked: Sequence[str], steps: int) -> list[str]:
    if len(counts) >= max(len(ranked), 2):
        raise AsdmError(f"{text!r} counts steps of {len(counts)} members, and the last of {len(ranked)} takes the rest")
    if sum(counts) > steps:
        raise AsdmError(f"{text!r} counts {sum(counts)} steps, and a run has {steps}")
    names = [name for name, count in zip(ranked, counts, strict=False) for _ in range(count)]
    return names + [ranked[-1]] * (steps - len(names))


def _explicit(text: str, rest: str, members: Sequence[str], steps: int) -> tuple[Action, ...]:
    found: list[Action] = []
    for word in rest.split("/"):
        match = _TIMES.fullmatch(word.strip())
        if match is None:
            raise AsdmError(f"{text!r} has an empty step", f"Orders are written like {ORDER_GRAMMAR}.")
        found += [_action(match["what"], members)] * min(_count(match["count"] or "1", text), steps + 1)
    if len(found) != steps:
        raise AsdmError(f"{text!r} says what {len(found)} steps do, and a run has {steps}")
    if not found[0].is_whole:
        raise AsdmError(f"{text!r}: the first step has nothing to forecast from, so a member has to compute it")
    return tuple(found)


def _action(word: str, members: Sequence[str]) -> Action:
    kind, colon, forecast = word.partition(":")
    if kind == "skip":
        return skip(parse_forecast(forecast) if colon else LINEAR)
    if kind == "skip.denoised":
        return skip(parse_forecast(forecast) if colon else HOLD, "denoised")
    if word not in members:
        raise AsdmError(f"there is no member {word!r}", f"There are {', '.join(members)}, and skip.")
    return Action(member=word)


def _count(word: str, text: str) -> int:
    if not (word.strip().isdecimal() and len(word.strip()) < 10):
        raise AsdmError(f"{word!r} in {text!r} is no number", f"Orders are written like {ORDER_GRAMMAR}.")
    return int(word)
