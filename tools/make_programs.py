"""Print which programs open which students, and why others do not, as the guides have it.

    python tools/make_programs.py

Decided by `asdm_compress.models.programs`, which says where every program's needs were read, and by the students'
configs; no weights are needed. `tools/write_documents.py` puts it into the guide to `apply`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import build, specify
from asdm_compress.core.edits import DROP, Edit
from asdm_compress.core.recipe import find_recipe, load_recipe
from asdm_compress.models.families import FAMILIES
from asdm_compress.models.programs import Layout, Verdict, verdicts
from asdm_compress.models.stock_form import stock_form

FIRST, SECOND = "sd15", "sd21"  # families
SELF_ATTENTION = "up_blocks.3.attentions.2.transformer_blocks.0.attn1"
LAYOUTS: tuple[Layout, ...] = ("folder", "ldm", "sdcpp", "onnx")
COLUMNS = ("diffusers", "diffusers with asdm-compress", "ComfyUI", "AUTOMATIC1111", "stable-diffusion.cpp",
           "ONNX Runtime")  # fmt: skip


def table() -> str:
    """The table in Markdown, and under it the reasons by number."""
    reasons: list[str] = []
    lines = [f"| of Stable Diffusion | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for name, (family, edits, channels) in _rows().items():
        found = _verdicts(family, edits, channels)
        lines.append(f"| {name} | {' | '.join(_cell(found[column], reasons) for column in COLUMNS)} |")
    notes = [f"{number}. {reason}." for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes])


def _rows() -> dict[str, tuple[str, Mapping[str, Edit], int]]:
    """The family, what is taken out, and the channels that the UNet takes."""
    published = ("bk-sdm-base-v1", "bk-sdm-small-v1", "bk-sdm-tiny-v1", "segmind-small", "segmind-tiny",
                 "shallow-1-1-1-2-v1", "shared-v1")  # fmt: skip
    second = ("bk-sdm-base-v2", "bk-sdm-small-v2", "bk-sdm-tiny-v2", "shallow-1-1-1-2-v2")
    return {
        "1.x, nothing taken out": (FIRST, {}, 4),
        "1.x inpainting": (FIRST, {}, 9),
        "1.x depth": (FIRST, {}, 5),
        "1.x instruct-pix2pix": (FIRST, {}, 8),
        **{f"`{name}`": (FIRST, _edits(name), 4) for name in published},
        "1.x, sub-units taken out": (FIRST, {SELF_ATTENTION: DROP}, 4),
        "1.x, convolutions in slots, narrower modules": (FIRST, {"mid_block": "conv1x1*8@timestep"}, 4),
        "2.x, nothing taken out": (SECOND, {}, 4),
        "2.x inpainting": (SECOND, {}, 9),
        "2.x depth": (SECOND, {}, 5),
        **{f"`{name}`": (SECOND, _edits(name), 4) for name in second},
    }


def _edits(recipe: str) -> Mapping[str, Edit]:
    return load_recipe(find_recipe(recipe)).as_edits()


def _verdicts(family: str, edits: Mapping[str, Edit], channels: int) -> dict[str, Verdict]:
    """Of every program, for the layout that it opens, or else the first that it reads; whole pipelines."""
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**{**FAMILIES[family].unet_config, "in_channels": channels})
    spec = specify(teacher, Plan(edits))
    student = build(spec.config, spec.edits)
    found: dict[str, Verdict] = {}
    for layout in LAYOUTS:
        # As `export` writes it: single files have the plain form of edits that compute the same.
        written = stock_form(student) if layout in ("ldm", "sdcpp") else student
        for verdict in verdicts(written, layout, is_whole=True):
            if verdict.program not in found or (verdict.opens and not found[verdict.program].opens):
                found[verdict.program] = verdict
    return found


def _cell(verdict: Verdict, reasons: list[str]) -> str:
    if not verdict.why:
        return "yes" if verdict.opens else "no"
    if verdict.why not in reasons:
        reasons.append(verdict.why)
    return f"{'yes' if verdict.opens else 'no'} ({reasons.index(verdict.why) + 1})"


if __name__ == "__main__":
    print(table())
