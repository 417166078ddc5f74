"""Which member does which step, as a switched UNet keeps it, and what that means for runs with other timesteps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from diffusers import DDIMScheduler
from torch import Tensor

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import Action, Inherit
from asdm_compress.inheritance.carrying import remap
from asdm_compress.inheritance.forecast import parse_forecast
from asdm_compress.inheritance.timeline import Timeline, timeline_at

# What of a scheduler's config says how much noise there is at a timestep, and what of that is predicted.
_NOISE: Final = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type",
)  # fmt: skip
_SAME_SIGMA: Final = 1e-3


@dataclass(frozen=True)
class SwitchingSchedule:
    """The action of every evaluation of a run with these timesteps; `noise` is the model's noise schedule.

    The first action computes everything. Raises AsdmError for what makes no schedule.
    """

    actions: tuple[Action, ...]
    timesteps: tuple[float, ...]
    noise: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not self.actions or len(self.actions) != len(self.timesteps):
            raise AsdmError(f"{len(self.actions)} actions were given for {len(self.timesteps)} evaluations of the UNet")
        if not self.actions[0].is_whole:
            raise AsdmError("the first step has nothing to inherit, so a member has to compute it")
        if any(entry.corrected for action in self.actions for entry in action.inherits):
            raise AsdmError("a switched UNet keeps no fitted corrections", "Keep them in an inheritance.yaml.")

    @cached_property
    def alphas(self) -> Tensor:
        """ᾱ of the training schedule, one value per timestep."""
        alphas: Tensor = DDIMScheduler(**self.noise).alphas_cumprod
        return alphas

    @cached_property
    def timeline(self) -> Timeline:
        """The evaluations that it was made for."""
        return self.timeline_of(self.timesteps)

    @property
    def is_whole(self) -> bool:
        """Whether every step is computed in full by some member."""
        return all(action.is_whole for action in self.actions)

    @property
    def reuses_guidance(self) -> bool:
        """Whether some step leaves the unconditional branch out."""
        return any(action.guidance is not None for action in self.actions)

    def timeline_of(self, timesteps: Sequence[float]) -> Timeline:
        """The evaluations at these timesteps of the same model."""
        return timeline_at(timesteps, self.alphas, str(self.noise.get("prediction_type", "epsilon")))

    def fits(self, timeline: Timeline) -> bool:
        """Whether these are the evaluations that it was made for."""
        made, seen = self._sigmas(self.timeline), self._sigmas(timeline)
        return len(made) == len(seen) and all(
            math.isclose(a, b, rel_tol=_SAME_SIGMA) for a, b in zip(made, seen, strict=True)
        )

    def actions_at(self, timeline: Timeline) -> tuple[Action, ...]:
        """The actions of a run with other timesteps: each what was done at the nearest noise level.

        Where steps inherit, as large a share of them as before computes. Raises AsdmError where that cannot be carried
        over.
        """
        if self.fits(timeline):
            return self.actions
        if self.is_whole:
            return tuple(self.nearest(sigma) for sigma in self._sigmas(timeline))
        try:
            return remap(self.actions, self._sigmas(self.timeline), self._sigmas(timeline))
        except AsdmError as error:
            # What is said of an inheritance schedule's file does not help: this one is a part of the UNet.
            raise AsdmError(
                f"this UNet's own schedule is for other steps: {error.message}",
                f"Sample with about {len(self.actions)} steps of the sampler in its folder, as `generate` does.",
            ) from error

    def nearest(self, sigma: float) -> Action:
        """What computes at a noise level by itself: the member that does at the nearest one (in log σ)."""
        made = self._sigmas(self.timeline)
        computing = [i for i, action in enumerate(self.actions) if not action.skips]
        return self.actions[min(computing, key=lambda i: abs(math.log(made[i] / sigma)))].whole()

    def as_config(self) -> dict[str, Any]:
        """For `config.json`."""
        named = {action.name: _as_plain(action) for action in self.actions}
        return {
            "noise": dict(self.noise),
            "timesteps": list(self.timesteps),
            "actions": named,
            "steps": [action.name for action in self.actions],
        }

    @staticmethod
    def of_config(config: Mapping[str, Any]) -> SwitchingSchedule:
        """As it was written; raises AsdmError for what was not written so."""
        try:
            actions = {name: _of_plain(entry) for name, entry in config["actions"].items()}
            steps = tuple(actions[name] for name in config["steps"])
            timesteps = tuple(float(t) for t in config["timesteps"])
            noise = {key: value for key, value in config["noise"].items() if key in _NOISE}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AsdmError(
                f"the switched UNet's schedule cannot be read: {type(error).__name__} {error}",
                "Its config.json was damaged or edited by hand; make it again with `asdm-compress switch`.",
            ) from error
        return SwitchingSchedule(steps, timesteps, noise)

    @staticmethod
    def _sigmas(timeline: Timeline) -> tuple[float, ...]:
        assert timeline.sigmas is not None
        return timeline.sigmas


def noise_of(scheduler: Any) -> dict[str, Any]:
    """The noise schedule of a pipeline's scheduler; raises AsdmError for one that has none of the usual kind."""
    config = scheduler.config
    if config.get("beta_schedule") is None or config.get("num_train_timesteps") is None:
        raise AsdmError(f"{type(scheduler).__name__} has no noise schedule of Stable Diffusion's kind")
    return {key: config[key] for key in _NOISE if config.get(key) is not None}


def _as_plain(action: Action) -> dict[str, Any]:
    entries = [{"place": e.place, "thing": e.thing, "forecast": e.forecast.name} for e in action.inherits]
    plain: dict[str, Any] = {"inherit": entries} if entries else {}
    if action.guidance is not None:
        plain["guidance"] = action.guidance.name
    return plain | ({"member": action.member} if action.member is not None else {})


def _of_plain(entry: Mapping[str, Any]) -> Action:
    inherits = tuple(
        Inherit(e["place"], e.get("thing", "output"), parse_forecast(e["forecast"])) for e in entry.get("inherit", ())
    )
    guidance = entry.get("guidance")
    return Action(inherits, None if guidance is None else parse_forecast(guidance), entry.get("member"))
