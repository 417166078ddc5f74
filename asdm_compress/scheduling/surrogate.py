"""What a schedule does to the final latent, to first order, from measured responses: no UNet is run for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from asdm_compress.inheritance.forecast import Forecast, weights
from asdm_compress.inheritance.timeline import Timeline
from asdm_compress.scheduling.menu import WHOLE, Choice, Menu
from asdm_compress.scheduling.responses import REACH, Responses

NEVER: Final = -1  # in place of a step that an older anchor would be
Pair = tuple[int, int]  # the steps of the last two anchors, the older first or `NEVER`
Sketch = npt.NDArray[np.float32]  # (N, D): of one tensor per run
# Errors of different steps partly point the same way: this share of what they do is counted as adding up in full.
COHERENT: Final = 0.5


@dataclass(frozen=True)
class Surrogate:
    """Prices schedules from responses, the gains of steps (T,), the sampler's timeline and the guidance scale."""

    menu: Menu
    responses: Responses
    gains: npt.NDArray[np.float64]
    timeline: Timeline
    guidance: float
    # What `taken` found, which a search asks for some ten thousand times.
    _taken: dict[tuple[int, Pair, Forecast], tuple[list[int], tuple[float, ...]]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    @property
    def steps(self) -> int:
        """Evaluations of the UNet in a run."""
        return len(self.gains)

    @property
    def branches(self) -> int:
        """Guidance branches: 2, or 1 without guidance. The last one is that with the prompt."""
        return int(self.responses.predictions.shape[1])

    def damage(self, choices: Sequence[Choice], coherent: float = COHERENT) -> float:
        """The mean squared error of the final latents of the runs, infinite where an anchor is out of reach."""
        errors = self.errors(choices)
        if errors is None:
            return float("inf")
        moved = errors * self.gains[:, None, None]
        together = float(np.square(moved.sum(axis=0)).sum(-1).mean())
        return coherent * together + (1 - coherent) * float(np.square(moved).sum(-1).mean(-1).sum())

    def errors(self, choices: Sequence[Choice]) -> npt.NDArray[np.float64] | None:
        """Sketches of the error of every step's guided prediction, (T, N, D); None where an anchor is out of reach.

        What one step inherits from another that inherited itself carries the other's error along, where it is a whole
        prediction or the difference of the guidance branches.
        """
        with_prompt = self.branches - 1
        anchors = [[[0] for _ in range(self.branches)] for _ in self.menu.lights]
        differences = [0]
        of_rows = np.zeros((self.steps, *self.responses.predictions.shape[1:]))
        of_difference = np.zeros((self.steps, *self.responses.predictions.shape[2:]))
        for step, choice in enumerate(choices[1:], start=1):
            rows = (with_prompt,) if choice.conditional else tuple(range(self.branches))
            if choice.light != WHOLE:
                for row in rows:
                    found = self._inherited(step, choice, row, last_two(anchors[choice.light][row]), of_rows)
                    if found is None:
                        return None
                    of_rows[step, row] = found
            if choice.conditional:
                steps, factors = self.taken(step, last_two(differences), choice.difference)
                carried = sum(f * of_difference[then] for then, f in zip(steps, factors, strict=True))
                of_difference[step] = self.difference_error(step, steps, factors) + carried
                of_rows[step, 0] = of_rows[step, with_prompt] - of_difference[step]
            elif self.branches == 2:
                of_difference[step] = of_rows[step, 1] - of_rows[step, 0]
                if self.menu.computes(choice.light):
                    differences.append(step)
            refreshed = self.menu.refreshes[choice.light if choice.light != WHOLE else len(self.menu.lights)]
            for light, fresh in enumerate(refreshed):
                if fresh:
                    for row in rows:
                        anchors[light][row].append(step)
        return np.asarray(of_rows[:, with_prompt] + (self.guidance - 1) * of_difference)

    def _inherited(
        self, step: int, choice: Choice, row: int, pair: Pair, of_rows: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64] | None:
        """The error of one branch's prediction at a step that inherits."""
        steps, factors = self.taken(step, pair, choice.forecast)
        if step - steps[-1] > REACH:
            return None
        found = self.feature_error(step, choice.light, row, steps, factors)
        if not self.menu.computes(choice.light):
            for then, factor in zip(steps, factors, strict=True):
                found += factor * self._share(step, then, choice.light) * of_rows[then, row]
        return found

    def _share(self, step: int, then: int, light: int) -> float:
        """How much of an earlier prediction's error is in one that is inherited, or made of its denoised latent."""
        if not self.menu.denoises(light):
            return 1.0
        return self.timeline.denoised(then)[1] / self.timeline.denoised(step)[1]

    def taken(self, step: int, pair: Pair, forecast: Forecast) -> tuple[list[int], tuple[float, ...]]:
        """The steps that a forecast takes, the newest first, and their factors."""
        found = self._taken.get((step, pair, forecast))
        if found is None:
            found = self._taken[step, pair, forecast] = self._weighted(step, pair, forecast)
        return found

    def _weighted(self, step: int, pair: Pair, forecast: Forecast) -> tuple[list[int], tuple[float, ...]]:
        steps = [pair[1]] if pair[0] == NEVER or not forecast.order else [pair[1], pair[0]]
        at = [self.timeline.at(then, forecast.abscissa) for then in steps]
        if len(at) == 2 and math.isclose(*at, rel_tol=1e-9):  # rounded timesteps repeat at the end of some samplers
            steps, at = steps[:1], at[:1]
        return steps, weights(at, self.timeline.at(step, forecast.abscissa), forecast.damping)

    def feature_error(
        self, step: int, light: int, row: int, steps: Sequence[int], factors: Sequence[float]
    ) -> npt.NDArray[np.float64]:
        """What a forecast of a light action's features from these steps does to a branch's prediction, (N, D)."""
        responses = self.responses.errors[light, step, :, row]
        total = np.zeros(responses.shape[1:])
        for then, factor in zip(steps, factors, strict=True):
            total += factor * responses[step - then - 1]
        return total

    def difference_error(self, step: int, steps: Sequence[int], factors: Sequence[float]) -> npt.NDArray[np.float64]:
        """The error of a forecast of the guidance branches' difference from these steps, (N, D)."""
        predictions = self.responses.predictions
        total = np.asarray(predictions[step, 0] - predictions[step, 1], dtype=np.float64)
        for then, factor in zip(steps, factors, strict=True):
            total += factor * (predictions[then, 1] - predictions[then, 0])
        return total


def last_two(steps: Sequence[int]) -> Pair:
    """The last two of a list of anchors."""
    return (steps[-2] if len(steps) > 1 else NEVER, steps[-1])
