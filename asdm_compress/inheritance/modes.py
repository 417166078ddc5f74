"""Sampling modes: rules that say which steps of a run compute, for any number of steps, and what the others inherit.

A mode is written as its name, the mean distance N between computed steps, and settings:

    uniform:3                   every third step
    power:3,p=1.5               the same number of steps, dense at the start
    power-late:3,p=1.5          dense at the end
    centred:3,centre=0.4,p=1.5  dense around a share of the run (DeepCache's non-uniform schedule, 2312.00858)
    gaussian:3,mu=0.5,sigma=0.2 at the quantiles of a normal distribution over the run
    explicit:0/3/6/10           these steps

Settings of all of them: `branch=0` (the cut that the others inherit), `forecast=linear`, and `guidance=2` (leave the
unconditional branch out of all but every second of all steps), `guidance-forecast=linear`. Step 0 always computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import FULL, Action, conditional_only, cut
from asdm_compress.inheritance.forecast import LINEAR, Forecast, parse_forecast

Shares = npt.NDArray[np.float64]  # of a run, 0 to 1
_COMMON: Final = ("branch", "forecast", "guidance", "guidance-forecast")
_OUTERMOST: Final = cut(0, LINEAR)
_MODES: Final[Mapping[str, Mapping[str, float]]] = {
    "uniform": {},
    "power": {"p": 1.5},
    "power-late": {"p": 1.5},
    "centred": {"centre": 0.5, "p": 1.5},
    "gaussian": {"mu": 0.5, "sigma": 0.25},
    "explicit": {},
}
MODE_GRAMMAR: Final = "uniform:3, uniform:3,branch=1,forecast=hold, power:3,p=1.5, centred:3,centre=0.4, explicit:0/3/6"


@dataclass(frozen=True, slots=True)
class Mode:
    """A rule: `interval` is the mean distance of computed steps, `steps` those of `explicit`.

    `light` is what the other steps do; with `guidance_interval` above 1, steps that are no multiple of it compute the
    conditional branch only. Raises AsdmError for settings that make no schedule.
    """

    name: str
    interval: float = 1.0
    settings: Mapping[str, float] = field(default_factory=dict)
    steps: tuple[int, ...] = ()
    light: Action = _OUTERMOST
    guidance_interval: int = 1
    guidance_forecast: Forecast = LINEAR

    def __post_init__(self) -> None:
        if self.name not in _MODES:
            raise AsdmError(f"unknown sampling mode {self.name!r}", f"Modes are written like {MODE_GRAMMAR}.")
        unknown = sorted(set(self.settings) - set(_MODES[self.name]))
        if unknown:
            known = ", ".join((*_MODES[self.name], *_COMMON))
            raise AsdmError(f"the mode {self.name} has no setting {unknown[0]!r}", f"It has {known}.")
        if not self.interval >= 1 or math.isinf(self.interval) or self.guidance_interval < 1:
            raise AsdmError("the interval of a sampling mode is at least 1")
        if any(self._setting(key) <= 0 for key in ("p", "sigma") if key in _MODES[self.name]):
            raise AsdmError(f"p and sigma of the mode {self.name} are above 0")
        if any(step < 0 for step in self.steps):
            raise AsdmError("the steps of an explicit schedule are counted from 0")

    def computed_steps(self, evaluations: int) -> tuple[int, ...]:
        """The steps that compute, in order; step 0 is always one of them."""
        if evaluations < 1:
            return ()
        if self.name == "explicit":
            found = [step for step in self.steps if step < evaluations]
        elif self.name == "uniform" and self.interval == int(self.interval):
            found = list(range(0, evaluations, int(self.interval)))
        else:
            count = math.ceil(evaluations / self.interval)
            shares = _SPREADS[self.name](np.arange(count) / count, self)
            found = [min(int(share * evaluations + 1e-9), evaluations - 1) for share in shares]
        return tuple(sorted({0, *found}))

    def actions(self, evaluations: int) -> tuple[Action, ...]:
        """The action of every evaluation of a run."""
        computed = set(self.computed_steps(evaluations))
        chosen = [FULL if i in computed else self.light for i in range(evaluations)]
        return tuple(
            action if i % self.guidance_interval == 0 else conditional_only(self.guidance_forecast, action)
            for i, action in enumerate(chosen)
        )

    def _setting(self, key: str) -> float:
        return self.settings.get(key, _MODES[self.name][key])


def parse_mode(text: str) -> Mode:
    """The mode with a written form such as `uniform:3,branch=1`; raises AsdmError for what is none."""
    name, _, rest = text.partition(":")
    words = [word.strip() for word in rest.split(",") if word.strip()]
    first = words.pop(0) if words and "=" not in words[0] else None
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key in values:
            raise AsdmError(f"{word!r} in {text!r} is no setting", f"Modes are written like {MODE_GRAMMAR}.")
        values[key] = value
    if name in _MODES and first is None:
        raise AsdmError(f"{text!r} says not how often to compute", f"Modes are written like {MODE_GRAMMAR}.")
    light = cut(_whole(values.pop("branch", "0"), text), parse_forecast(values.pop("forecast", LINEAR.name)))
    guidance = _whole(values.pop("guidance", "1"), text)
    guidance_forecast = parse_forecast(values.pop("guidance-forecast", LINEAR.name))
    settings = {key: _number(value, text) for key, value in values.items()}
    steps: tuple[int, ...] = ()
    interval = 1.0
    if name == "explicit":
        steps = tuple(_whole(word, text) for word in (first or "").split("/"))
    elif name in _MODES:
        interval = _number(first or "", text)
    return Mode(name, interval, settings, steps, light, guidance, guidance_forecast)


def _number(word: str, text: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise AsdmError(f"{word!r} in {text!r} is no number", f"Modes are written like {MODE_GRAMMAR}.")
    return number


def _whole(word: str, text: str) -> int:
    number = _number(word, text)
    if number != int(number):
        raise AsdmError(f"{word!r} in {text!r} is no whole number", f"Modes are written like {MODE_GRAMMAR}.")
    return int(number)


def _power(shares: Shares, mode: Mode) -> Shares:
    return np.power(shares, mode._setting("p"))


def _power_late(shares: Shares, mode: Mode) -> Shares:
    return 1 - np.power(1 - shares, mode._setting("p"))


def _centred(shares: Shares, mode: Mode) -> Shares:
    """Evenly spread under a signed root around the centre: the further away, the sparser."""
    p, centre = mode._setting("p"), mode._setting("centre")
    if not 0 <= centre <= 1:
        raise AsdmError("the centre of a centred schedule is a share of the run, 0 to 1")
    low, high = -(centre ** (1 / p)), (1 - centre) ** (1 / p)
    at = low + (high - low) * shares
    spread: Shares = centre + np.sign(at) * np.power(np.abs(at), p)
    return spread


def _gaussian(shares: Shares, mode: Mode) -> Shares:
    """Quantiles of the normal distribution cut to the run."""
    mu, sigma = mode._setting("mu"), mode._setting("sigma")
    low, high = ndtr((0 - mu) / sigma), ndtr((1 - mu) / sigma)
    if high - low < 1e-12:
        raise AsdmError("a gaussian schedule needs its centre in or near the run, which is 0 to 1")
    quantiles: Shares = ndtri(low + (high - low) * (shares + 0.5 / len(shares)))
    clipped: Shares = np.clip(mu + sigma * quantiles, 0, 1)
    return clipped


_SPREADS: Final[Mapping[str, Callable[[Shares, Mode], Shares]]] = {
    "uniform": lambda shares, mode: shares,
    "power": _power,
    "power-late": _power_late,
    "centred": _centred,
    "gaussian": _gaussian,
}
