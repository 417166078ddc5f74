"""Ways of sampling that are tried against one another: a schedule or mode, or fewer steps, of some sampler."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from asdm_compress.core.provenance import content_hash
from asdm_compress.inheritance.forecast import HOLD, Forecast
from asdm_compress.inheritance.modes import parse_mode
from asdm_compress.inheritance.schedule import Rule, Schedule
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scheduling.menu import EVERYTHING, Choice, Menu, light_name
from asdm_compress.scheduling.timing import KindTimes, Loop

SOLVERS = ("ddim", "dpm++", "unipc")  # whose fewer steps a user could take instead


@dataclass(frozen=True, slots=True)
class Way:
    """A number of steps of a sampler, the pipeline's own where none is named, by a rule or in full.

    `seconds` is the predicted time of a run.
    """

    name: str
    steps: int
    seconds: float
    rule: Rule | None = None
    scheduler: str | None = None

    @property
    def key(self) -> str:
        """The same for ways that do the same."""
        rule, more = self.rule, dict[str, str]()
        actions = [action.name for action in rule.actions] if isinstance(rule, Schedule) else rule and self.name
        if isinstance(rule, Schedule) and rule.corrections:
            more["corrections"] = _fingerprint(rule)
        return content_hash({"steps": self.steps, "scheduler": self.scheduler, "rule": json.dumps(actions), **more})

    def loop(self, pipeline: StableDiffusionPipeline, texts: Tensor, settings: SamplingSettings) -> Loop:
        """Its sampling loop for these texts, from the seed of `settings`."""
        scheduler = make_scheduler(self.scheduler, pipeline) if self.scheduler else None
        return Loop(pipeline, texts, replace(settings, steps=self.steps), self.rule, scheduler)


def _fingerprint(schedule: Schedule) -> str:
    """A hash of every correction's bytes."""
    digest = hashlib.sha256()
    for (step, feature), correction in sorted(schedule.corrections.items(), key=lambda item: item[0]):
        digest.update(f"{step}/{feature}".encode())
        for tensor in (correction.weight, correction.bias):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def scheduled(menu: Menu, times: KindTimes, choices: Sequence[Choice], name: str) -> Way:
    """A schedule of a menu's choices."""
    actions = tuple(menu.action(choice) for choice in choices)
    return Way(name, len(choices), times.run(choices), Schedule(actions))


def fewer_steps(times: KindTimes, share: float, schedulers: Sequence[str | None]) -> list[Way]:
    """As many full steps of each sampler as a share of the time allows."""
    count = min(times.fewer_steps(share), times.steps)
    seconds = times.outside + count * times.full_step
    return [Way(f"{count} steps of {s or 'the same sampler'}", count, seconds, None, s) for s in schedulers if count]


def uniform_caches(menu: Menu, times: KindTimes, share: float, forecast: Forecast = HOLD) -> list[Way]:
    """DeepCache's schedule (2312.00858) at every branch: computing as often as a share of the time allows.

    With another forecast than holding it is this package's own.
    """
    found: list[Way] = []
    for light in _cuts(menu):
        for interval in range(2, times.steps + 1):
            way = _uniform_cache(menu, times, light, interval, forecast)
            if way.seconds <= share * times.full_run * (1 + 1e-9):
                found.append(way)
                break
    return found


def cheapest_cache(menu: Menu, times: KindTimes) -> Way | None:
    """The schedule of DeepCache's kind that takes least: it computes everything once."""
    ways = [_uniform_cache(menu, times, light, times.steps, HOLD) for light in _cuts(menu)]
    return min(ways, key=lambda way: way.seconds, default=None)


def _cuts(menu: Menu) -> list[int]:
    return [light for light in range(len(menu.lights)) if light_name(menu, light).startswith("cut.")]


def _uniform_cache(menu: Menu, times: KindTimes, light: int, interval: int, forecast: Forecast) -> Way:
    branch = light_name(menu, light).removeprefix("cut.")
    rule = f"uniform:{interval},branch={branch},forecast={forecast.name}"
    mode = parse_mode(rule)
    computed = set(mode.computed_steps(times.steps))
    choices = [EVERYTHING if i in computed else Choice(light, False, forecast) for i in range(times.steps)]
    return Way(rule, times.steps, times.run(choices), mode)
