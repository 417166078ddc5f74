"""The evaluations of one sampling run on the abscissae that forecasts are made on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.forecast import Abscissa

_SMALLEST_ALPHA: Final = 2.0**-24  # schedules with zero terminal SNR would put their first step at infinity
# By what is predicted: from σ and sqrt(ᾱ) the factors of the input and of the prediction in the denoised latent.
_DENOISED: Final[Mapping[str, Callable[[float, float], tuple[float, float]]]] = {
    "epsilon": lambda sigma, alpha: (1 / alpha, -sigma),
    "v_prediction": lambda sigma, alpha: (alpha, -sigma * alpha),
    "sample": lambda sigma, alpha: (0.0, 1.0),
}


@dataclass(frozen=True, slots=True)
class Timeline:
    """One entry per evaluation of the UNet: its timestep, and σ = sqrt((1 - ᾱ) / ᾱ) where the scheduler tells.

    Samplers that evaluate a timestep twice have it here twice. `prediction` is what the model predicts, as diffusers'
    schedulers call it.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...] | None = None
    prediction: str = "epsilon"

    def __len__(self) -> int:
        return len(self.timesteps)

    def at(self, step: int, abscissa: Abscissa) -> float:
        """The abscissa of an evaluation; raises AsdmError for σ and log-SNR where the scheduler has no σs."""
        if abscissa == "index":
            return float(step)
        if self.sigmas is None:
            raise AsdmError(
                f"this scheduler has no σs, so nothing can be forecast over {abscissa}", "Forecast over the index."
            )
        sigma = self.sigmas[step]
        return sigma if abscissa == "sigma" else -2 * math.log(sigma)

    def denoised(self, step: int) -> tuple[float, float]:
        """a and b with which the denoised latent of an evaluation is a times the UNet's input plus b times what it
        predicts; raises AsdmError where nobody tells.

        With ᾱ = 1 / (1 + σ²): x_0 = (x - sqrt(1 - ᾱ) ε) / sqrt(ᾱ), and sqrt(ᾱ) x - sqrt(1 - ᾱ) v.
        """
        if self.sigmas is None or self.prediction not in _DENOISED:
            raise AsdmError(
                "what this sampler's model predicts says nothing of the denoised latent, which therefore cannot be "
                "inherited",
                "Inherit the prediction.",
            )
        return _DENOISED[self.prediction](self.sigmas[step], (1 + self.sigmas[step] ** 2) ** -0.5)

    @property
    def tells_denoised(self) -> bool:
        """Whether `denoised` is known."""
        return self.sigmas is not None and self.prediction in _DENOISED

    def since(self, start: int) -> Timeline:
        """The part from an evaluation on, for runs that start mid-way."""
        return replace(
            self, timesteps=self.timesteps[start:], sigmas=None if self.sigmas is None else self.sigmas[start:]
        )


def timeline_of(scheduler: Any) -> Timeline:
    """The timeline of a scheduler whose timesteps are set.

    This reads the timesteps from the device, once for a run. σs are those of the training schedule at these timesteps,
    interpolated where they are fractions, which every sampler with `alphas_cumprod` shares; of others, their own.
    """
    timesteps = tuple(float(t) for t in torch.as_tensor(scheduler.timesteps).tolist())
    predicted = str(getattr(getattr(scheduler, "config", None), "prediction_type", "epsilon"))
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is not None:
        return timeline_at(timesteps, alphas, predicted)
    own = getattr(scheduler, "sigmas", None)
    if own is not None and len(own) >= len(timesteps):
        found = [float(s) for s in torch.as_tensor(own)[: len(timesteps)].tolist()]
        if all(s > 0 for s in found):
            return Timeline(timesteps, tuple(found), predicted)
    return Timeline(timesteps, None, predicted)


def timeline_at(timesteps: Sequence[float], alphas: Any, prediction: str = "epsilon") -> Timeline:
    """The timeline of these timesteps under a training schedule's ᾱ, one value per timestep of it."""
    kept = np.clip(torch.as_tensor(alphas).double().cpu().numpy(), _SMALLEST_ALPHA, 1 - 2.0**-40)
    log_sigma = 0.5 * (np.log1p(-kept) - np.log(kept))
    sigmas = np.exp(np.interp(timesteps, np.arange(len(kept)), log_sigma))
    return Timeline(tuple(timesteps), tuple(sigmas.tolist()), prediction)


def distinct(steps: Sequence[int], timeline: Timeline, abscissa: Abscissa, count: int) -> tuple[int, ...]:
    """The newest `count` of `steps` (given oldest first) that differ in their abscissa, the newest first."""
    found: list[int] = []
    for step in reversed(steps):
        if len(found) == count:
            break
        here = timeline.at(step, abscissa)
        if all(not math.isclose(here, timeline.at(other, abscissa), rel_tol=1e-9) for other in found):
            found.append(step)
    return tuple(found)
