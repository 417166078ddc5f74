"""Actions carried over to a run of another number of steps, by the noise levels of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import Action

CALIBRATE_HINT: Final = (
    "Sample as it was made for (--scheduler, --guidance, --image-size), calibrate a schedule for these settings with "
    "`asdm-compress calibrate`, or use a mode such as uniform:3."
)
# The σs of two runs do not divide each other evenly; by so much of a step a computed one may come early.
_SLACK: Final = 0.25


class CarriedOver(UserWarning):
    """Says that a run follows a schedule that was made for another number of steps."""


def remap(actions: Sequence[Action], made: Sequence[float], seen: Sequence[float]) -> tuple[Action, ...]:
    """The actions, made for the noise levels `made`, for those of a run, `seen`; both in the order of the run.

    As large a share of the evaluations computes everything as before, denser where it was denser: between two of them
    the share is taken to be even. What the others do is what the evaluation next to them in log σ did that did not
    compute everything, and what computes is the member that did next to them. Corrections were fitted to other steps
    and are left out.

    Raises AsdmError for noise levels that do not fall from each evaluation to the next, as with samplers that evaluate
    some twice, and for those outside of the range, give or take a step, that the actions were made for.
    """
    old, new = _log_sigmas(made), _log_sigmas(seen)
    _check_range(old, new)
    # A fractional place in the old run for each new evaluation; np.interp wants rising abscissae.
    places = np.interp(-new, -old, np.arange(len(old)))
    if len(new) > 1:
        # Samplers begin a little earlier with more steps; the first evaluation is the first in any case.
        places[0] = 0.0
    per_step = (len(new) - 1) / (places[-1] - places[0]) if len(new) > 1 else 1.0
    full = [i for i, action in enumerate(actions) if action.is_whole]
    counted = per_step * np.interp(places, [*full, len(old)], np.arange(len(full) + 1))
    counted += _SLACK * np.diff(counted, prepend=counted[0])
    others = [i for i, action in enumerate(actions) if not action.is_whole]
    found: list[Action] = []
    due = 0
    for place, count in zip(places, counted, strict=True):
        if not found or not others or count >= due:
            found.append(actions[min(full, key=lambda i: abs(i - place))])
            due = math.floor(count) + 1
        else:
            found.append(_uncorrected(actions[min(others, key=lambda i: abs(i - place))]))
    return tuple(found)


def _uncorrected(action: Action) -> Action:
    return replace(action, inherits=tuple(replace(entry, corrected=False) for entry in action.inherits))


def _log_sigmas(sigmas: Sequence[float]) -> npt.NDArray[np.float64]:
    if not sigmas:
        raise AsdmError("an inheritance schedule can be carried over to other steps only by σs", CALIBRATE_HINT)
    found = np.log(np.asarray(sigmas, dtype=np.float64))
    if len(found) > 1 and not bool((np.diff(found) < 0).all()):
        raise AsdmError(
            "an inheritance schedule cannot be carried over to other steps for a sampler that evaluates some noise "
            "levels twice",
            CALIBRATE_HINT,
        )
    return found


def _check_range(old: npt.NDArray[np.float64], new: npt.NDArray[np.float64]) -> None:
    if len(old) < 2:
        raise AsdmError("an inheritance schedule for one step cannot be carried over to others", CALIBRATE_HINT)
    first, last = old[0] - old[1], old[-2] - old[-1]
    beside = len(new) > 1 and new[-1] >= old[0]
    if beside or new[0] > old[0] + first or new[-1] < old[-1] - last:
        raise AsdmError(
            f"this inheritance schedule cannot be carried over: it was calibrated for σ from {math.exp(old[0]):.4g} to "
            f"{math.exp(old[-1]):.4g}, and the run goes from {math.exp(new[0]):.4g} to {math.exp(new[-1]):.4g}",
            CALIBRATE_HINT,
        )
