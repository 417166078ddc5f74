"""What a schedule does to the final latent, to first order, from measured responses: no UNet is run for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
        runs = int(errors.shape[1])
        together = np.tensordot(self.gains, errors, 1)
        summed = float(np.vdot(together, together))
        apart = float(self.gains**2 @ np.square(errors).reshape(len(errors), -1).sum(1))
        return float(coherent * summed + (1 - coherent) * apart) / runs

    def errors(self, choices: Sequence[Choice]) -> npt.NDArray[np.float64] | None:
        """Sketches of the error of every step's guided prediction, (T, N, D); None where an anchor is out of reach.

        What one step inherits from another that inherited itself carries the other's error along, where it is a whole
        prediction or the difference of the guidance branches.
        """
        with_prompt = self.branches - 1
        anchors: list[list[Pair]] = [[(NEVER, 0)] * self.branches for _ in self.menu.lights]
        differences = (NEVER, 0)
        of_rows = np.zeros((self.steps, *self.responses.predictions.shape[1:]))
        of_difference = np.zeros((self.steps, *self.responses.predictions.shape[2:]))
        for step, choice in enumerate(choices[1:], start=1):
            rows = (with_prompt,) if choice.conditional else tuple(range(self.branches))
            if choice.light != WHOLE:
                pairs = [anchors[choice.light][row] for row in rows]
                # Mostly both branches take theirs from the same steps.
                together = pairs[0] == pairs[-1]
                parts = [slice(rows[0], rows[-1] + 1)] if together else [slice(row, row + 1) for row in rows]
                for part, pair in zip(parts, pairs, strict=False):
                    if not self._inherit(step, choice, part, pair, of_rows):
                        return None
            if choice.conditional:
                steps, factors = self.taken(step, differences, choice.difference)
                carried = sum(f * of_difference[then] for then, f in zip(steps, factors, strict=True))
                of_difference[step] = self.difference_error(step, steps, factors) + carried
                of_rows[step, 0] = of_rows[step, with_prompt] - of_difference[step]
            elif self.branches == 2:
                of_difference[step] = of_rows[step, 1] - of_rows[step, 0]
                if self.menu.computes(choice.light):
                    differences = differences[1], step
            for light in self._refreshed[choice.light]:
                for row in rows:
                    anchors[light][row] = anchors[light][row][1], step
        return np.asarray(of_rows[:, with_prompt] + (self.guidance - 1) * of_difference)

    def _inherit(self, step: int, choice: Choice, rows: slice, pair: Pair, of_rows: npt.NDArray[np.float64]) -> bool:
        """Fill in the errors of branches' predictions at a step that inherits; False where they are not known."""
        steps, factors = self.taken(step, pair, choice.forecast)
        if step - steps[-1] > REACH:
            return False
        found = self.feature_error(step, choice.light, rows, steps, factors)
        if not self.menu.computes(choice.light):
            for then, factor in zip(steps, factors, strict=True):
                found += factor * self._share(step, then, choice.light) * of_rows[then, rows]
        of_rows[step, rows] = found
        return True

    @cached_property
    def _refreshed(self) -> dict[int, tuple[int, ...]]:
        """The light actions whose features a step computes that does another one, or `WHOLE`."""
        rows = {**dict(enumerate(self.menu.refreshes)), WHOLE: self.menu.refreshes[-1]}
        return {light: tuple(other for other, fresh in enumerate(row) if fresh) for light, row in rows.items()}

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
        self, step: int, light: int, rows: int | slice, steps: Sequence[int], factors: Sequence[float]
    ) -> npt.NDArray[np.float64]:
        """What a forecast of a light action's features from these steps does to branches' predictions, (N, D) each."""
        responses = self.responses.errors[light, step]
        total = np.asarray(responses[step - steps[0] - 1, rows] * np.float64(factors[0]))
        for then, factor in zip(steps[1:], factors[1:], strict=True):
            total += factor * responses[step - then - 1, rows]
        return total

    def difference_error(self, step: int, steps: Sequence[int], factors: Sequence[float]) -> npt.NDArray[np.float64]:
        """The error of a forecast of the guidance branches' difference from these steps, (N, D)."""
        differences = self._differences
        total: npt.NDArray[np.float64] = -differences[step]
        for then, factor in zip(steps, factors, strict=True):
            total += factor * differences[then]
        return total

    @cached_property
    def _differences(self) -> npt.NDArray[np.float64]:
        predictions = self.responses.predictions
        return np.asarray(predictions[:, 1] - predictions[:, 0], dtype=np.float64)
