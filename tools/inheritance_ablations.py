"""What a search of schedules is made of, and the same search without one of it."""

from __future__ import annotations

from dataclasses import replace

from asdm_compress.inheritance.forecast import HOLD
from asdm_compress.scheduling.goals import Choosing
from asdm_compress.scheduling.menu import light_name
from asdm_compress.scheduling.search import DynamicProgram, find_front

NEVER = 1e6  # seconds: what is left out of a search is given a time that no budget has
ABLATIONS = (
    "forecasts", "dynamic program", "fitted corrections", "guidance reuse", "skipped steps",
    "denoised latents", "the unit level", "the cut level", "variable depth",
)  # fmt: skip


def without(choosing: Choosing, what: str) -> Choosing:
    """The same choice to be made without one ingredient."""
    menu, seconds = choosing.surrogate.menu, dict(choosing.times.seconds)
    names = {light: light_name(menu, light) for light in range(len(menu.lights))}
    surrogate, fitter = choosing.surrogate, choosing.fitter
    if what == "forecasts":
        surrogate = replace(surrogate, menu=replace(menu, forecasts=(HOLD,)))
    if what == "fitted corrections":
        fitter = None
    shallow = next((light for light, name in names.items() if name == "cut.0"), 0)
    for kind in seconds:
        light, conditional = kind
        name = names.get(light, "")
        gone = (
            (what == "guidance reuse" and conditional)
            or (what == "skipped steps" and name.startswith("skip"))
            or (what == "denoised latents" and name == "skip.denoised")
            or (what == "the unit level" and name.endswith("units"))
            or (what == "the cut level" and name.startswith("cut."))
            or (what == "variable depth" and name.startswith("cut.") and light != shallow)
        )
        if gone:
            seconds[kind] = NEVER
    times = replace(choosing.times, seconds=seconds)
    program = DynamicProgram(surrogate, times)
    front = find_front(program)
    corrected = find_front(program.at(times.corrected())) if fitter is not None else front
    return replace(choosing, surrogate=surrogate, times=times, front=front, corrected_front=corrected, fitter=fitter)
