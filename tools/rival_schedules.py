"""Schedules of other methods, re-created from their papers and code as schedules of this package, for benchmarks.

DeepCache's uniform and non-uniform ones (2312.00858), the encoder inherited as in Faster Diffusion (2312.09608), the
gate of T-GATE (2404.02747), and the rule of Block Caching (2312.03209): a block is computed again once its relative L1
changes since then, along the model's own runs, add up to a threshold. Its learned scales and shifts are left out.
T-GATE's gate drops the branch without the prompt; here the difference to it is held, which is nearer to the full run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from asdm_compress.inheritance.actions import FULL, Action, Inherit, conditional_only, inherit
from asdm_compress.inheritance.evaluator import Evaluator
from asdm_compress.inheritance.forecast import HOLD
from asdm_compress.inheritance.graph import graph_of
from asdm_compress.inheritance.modes import parse_mode
from asdm_compress.inheritance.places import find_places
from asdm_compress.inheritance.program import program_of
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.models.call import UNetCall
from asdm_compress.sampling.run import SamplingRun
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scheduling.goals import Choosing
from asdm_compress.scheduling.guided_unet import GuidedUNet
from asdm_compress.scheduling.menu import Menu, light_name
from asdm_compress.scheduling.timing import KindTimes
from asdm_compress.scheduling.ways import Way, uniform_caches

THRESHOLDS = tuple(float(x) for x in np.geomspace(0.02, 3.0, 24))


def power_caches(choosing: Choosing, share: float, lights: Sequence[int]) -> list[Way]:
    """DeepCache's non-uniform schedule at some cuts, at every centre and power as often as the time allows.

    Intervals may be fractions, so that every number of computed steps is tried.
    """
    times, found = choosing.every_times, []
    for light in lights:
        cut = light_name(choosing.every, light).removeprefix("cut.")
        for centre, p in ((0.3, 1.2), (0.3, 1.4), (0.5, 1.4)):
            for count in range(times.steps - 1, 0, -1):
                interval = times.steps / (count - 0.5)  # between those of this and of one step less
                rule = f"centred:{interval:.4f},centre={centre},p={p},branch={cut},forecast=hold"
                computed = len(parse_mode(rule).computed_steps(times.steps))
                light_steps = times.seconds[light, False] * (times.steps - computed)
                seconds = times.outside + computed * times.full_step + light_steps
                if seconds <= share * times.full_run:
                    found.append(Way(rule, times.steps, seconds, parse_mode(rule)))
                    break
    return found


def caches_in_fewer_steps(menu: Menu, times: KindTimes, share: float, steps: int) -> list[Way]:
    """DeepCache's uniform schedule at every cut in fewer steps of the same sampler, as often as the time allows."""
    fewer = replace(times, steps=steps)
    left = share * times.full_run / fewer.full_run
    ways = uniform_caches(menu, fewer, left) if steps > 1 and left < 1 else []
    return [replace(way, name=f"{way.name}, {steps} steps") for way in ways]


def encoder_schedules(unet: Any, steps: int) -> list[Way]:
    """Faster Diffusion: steps between key steps take the encoder's outputs from the last key step."""
    blocks = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
    light = inherit([path for path in [*blocks, "mid_block"] if path in find_places(unet)], "output", HOLD)
    lists = {"its own key steps": {round(k * steps / 50) for k in (0, 1, 2, 3, 5, 10, 15, 25, 35)}}
    lists |= {f"every {n}": set(range(0, steps, n)) for n in (2, 3, 5)}
    return [
        Way(
            f"Faster Diffusion, {name}", steps, 0.0, Schedule(tuple(FULL if i in keys else light for i in range(steps)))
        )
        for name, keys in lists.items()
    ]


def gates(unet: Any, steps: int) -> list[Way]:
    """T-GATE: from a gate step on, cross-attention held and only the branch with the prompt computed."""
    paths = [p.path for p in find_places(unet).values() if p.level == "sub-unit" and p.path.endswith(".attn2")]
    after = conditional_only(HOLD, Action(tuple(Inherit(path, "branch") for path in paths)))
    found = []
    for gate in sorted({max(1, round(steps * part)) for part in (0.1, 0.2, 0.3, 0.4, 0.6, 0.8)}):
        actions = tuple(FULL if i < gate else after for i in range(steps))
        found.append(Way(f"T-GATE, gate {gate}", steps, 0.0, Schedule(actions)))
    return found


@torch.no_grad()
def relative_changes(
    pipeline: StableDiffusionPipeline, texts: Tensor, settings: SamplingSettings
) -> dict[str, list[float]]:
    """By unit with a residual branch: mean |f_i - f_(i-1)| / mean |f_(i-1)| of the branch, 0 for the first step."""
    unet = pipeline.unet
    places = [p for p in find_places(unet).values() if p.level == "unit" and p.branches is not None]
    graph, evaluator = graph_of(unet), Evaluator(unet)
    features = {p.path: p.branches[0] for p in places if p.branches}
    program = program_of(graph, (), list(features.values()))
    before: dict[str, Tensor] = {}
    found: dict[str, list[float]] = {path: [] for path in features}

    def evaluate(call: UNetCall) -> Tensor:
        prediction, recorded = evaluator.evaluate(program, call)
        now = dict(zip(program.recorded, recorded, strict=True))
        for path, feature in features.items():
            last = before.get(path)
            change = 0.0 if last is None else float((now[feature] - last).abs().mean() / last.abs().mean())
            found[path].append(change)
            before[path] = now[feature]
        return prediction

    run = SamplingRun(pipeline, texts, settings, GuidedUNet(unet.dtype, texts.shape[1], evaluate))
    while not run.finished:
        run.advance()
    return found


def block_caching(changes: Mapping[str, Sequence[float]], threshold: float) -> Schedule:
    """Block Caching's schedule for a threshold."""
    steps = len(next(iter(changes.values())))
    held: list[list[str]] = [[] for _ in range(steps)]
    for path, values in changes.items():
        total = 0.0
        for step in range(1, steps):
            total += values[step]
            if total > threshold:
                total = 0.0
            else:
                held[step].append(path)
    return Schedule(tuple(inherit(paths, "branch", HOLD) if paths else FULL for paths in held))


def block_caching_ways(changes: Mapping[str, Sequence[float]], steps: int) -> Iterator[Way]:
    """Its schedules over a range of thresholds, the slowest first."""
    for threshold in THRESHOLDS:
        yield Way(f"Block Caching, δ {threshold:.3g}", steps, 0.0, block_caching(changes, threshold))
