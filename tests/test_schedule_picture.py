"""The picture of a schedule: every part of the UNet at every step, in the colour of what is done with it."""

from __future__ import annotations

import re
from collections import Counter

from asdm_compress.inheritance.actions import FULL, conditional_only, cut, inherit, skip
from asdm_compress.inheritance.forecast import LINEAR
from asdm_compress.reporting.calibration import steps_svg
from asdm_compress.reporting.schedule_map import map_on

COLOURS = {"computed": "#2563eb", "part": "#93c5fd", "held": "#d1d5db", "forecast": "#fdba74"}
ACTIONS = (FULL, FULL, cut(0, LINEAR, True), cut(2), inherit(["mid_block"]), conditional_only(LINEAR), skip(LINEAR))


def boxes(svg, colour):
    """How many boxes of a colour there are beside the one in the legend."""
    outlines = re.findall(rf'<path d="([^"]*)"[^>]*fill: {colour}', svg)
    return sum(outline.count("M") for outline in outlines) - 1


def test_every_part_has_a_box_at_every_step_in_the_colour_of_what_is_done(unet):
    svg = steps_svg(unet, ACTIONS, ())
    cells = Counter(cell for row in map_on(unet, ACTIONS).cells for cell in row)
    assert {kind: boxes(svg, COLOURS[kind]) for kind in cells} == cells
    assert cells["held"] > cells["part"] == 0
    for name in ("down 0 attention 1", "down 0 downsampler", "mid resnet 0", "up 2 resnet 1", "unconditional branch"):
        assert f"<!-- {name} -->" in svg
    assert "<!-- fitted correction -->" in svg


def test_without_corrections_there_is_no_row_for_them(unet):
    svg = steps_svg(unet, ACTIONS[3:5], ())
    assert "fitted correction" not in svg
    assert "inherited by a forecast" not in svg
