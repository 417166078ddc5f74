"""What a training carries from step to step besides weights and optimiser: counts, running losses, the best so far."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from asdm_compress.core.errors import AsdmError

DIVERGED: Final = 10.0  # times the lowest smoothed loss
BROKEN: Final = 100.0  # the same, for single steps, whose losses scatter
_SMOOTHING: Final = 0.2
_SETTLED: Final = 5  # logged losses before divergence is judged


@dataclass
class TrainingState:
    """`step` is the number of steps taken; `sums` the loss terms since the last log over `count` of them, `first`
    the latent error and damage before the first step."""

    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    logged: int = 0
    smoothed: float | None = None
    lowest: float = math.inf
    best_damage: float = math.inf
    best_error: float = math.inf  # the latent error there
    best_step: int | None = None
    first: tuple[float, float] | None = None

    def add(self, terms: dict[str, float]) -> None:
        """Count one step's terms."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def means(self) -> dict[str, float]:
        """The terms' means since the last call."""
        found = {name: value / max(self.count, 1) for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return found

    def is_sound(self, loss: float) -> bool:
        """Whether the loss of a single step is one of weights to go on from."""
        return math.isfinite(loss) and loss <= BROKEN * self.lowest

    def judge(self, loss: float, last_good: Callable[[], str]) -> None:
        """Raise AsdmError for a loss that is no number or has run away; `last_good` names the last good checkpoint."""
        if not math.isfinite(loss):
            raise AsdmError(
                f"the loss is no number any more at step {self.step}; {last_good()}",
                "Go on from there with --resume and a lower --learning-rate, or with --dtype fp32.",
            )
        self.smoothed = loss if self.smoothed is None else self.smoothed + _SMOOTHING * (loss - self.smoothed)
        self.logged += 1
        if self.logged > _SETTLED and self.smoothed > DIVERGED * self.lowest:
            raise AsdmError(
                f"the training diverges: the loss at step {self.step} is {self.smoothed / self.lowest:.1f} times its "
                f"lowest; {last_good()}",
                "Start again with a lower --learning-rate or more --warmup.",
            )
        self.lowest = min(self.lowest, self.smoothed)

    def as_content(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)
