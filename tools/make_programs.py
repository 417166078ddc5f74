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

SELF_ATTENTION = "up_blocks.3.attentions.2.transformer_blocks.0.attn1"
LAYOUTS: tuple[Layout, ...] = ("folder", "ldm", "sdcpp", "onnx")
COLUMNS = ("diffusers", "diffusers with asdm-compress", "ComfyUI", "AUTOMATIC1111", "stable-diffusion.cpp",
           "ONNX Runtime")  # fmt: skip


def table() -> str:
    """The table in Markdown, and under it the reasons by number."""
    reasons: list[str] = []
    lines = [f"| Stable Diffusion 1.x | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for name, (edits, channels) in _rows().items():
        found = _verdicts(edits, channels)
        lines.append(f"| {name} | {' | '.join(_cell(found[column], reasons) for column in COLUMNS)} |")
    notes = [f"{number}. {reason}." for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes])


def _rows() -> dict[str, tuple[Mapping[str, Edit], int]]:
    """What is taken out, and the channels that the UNet takes."""
    published = ("bk-sdm-base-v1", "bk-sdm-small-v1", "bk-sdm-tiny-v1", "shallow-1-1-1-2-v1")
    return {
        "nothing taken out": ({}, 4),
        "nothing taken out, inpainting": ({}, 9),
        "nothing taken out, depth": ({}, 5),
        **{f"`{name}`": (load_recipe(find_recipe(name)).as_edits(), 4) for name in published},
        "sub-units taken out": ({SELF_ATTENTION: DROP}, 4),
        "convolutions in slots, narrower modules": ({"mid_block": "conv1x1*8@timestep"}, 4),
    }


def _verdicts(edits: Mapping[str, Edit], channels: int) -> dict[str, Verdict]:
    """Of every program, for the layout that it opens, or else the first that it reads; whole pipelines."""
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**{**FAMILIES["sd15"].unet_config, "in_channels": channels})
    spec = specify(teacher, Plan(edits))
    student = build(spec.config, spec.edits)
    found: dict[str, Verdict] = {}
    for layout in LAYOUTS:
        for verdict in verdicts(student, layout, is_whole=True):
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
