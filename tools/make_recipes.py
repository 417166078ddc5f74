"""Write recipes/: the plans of published students, depth patterns, and ours for latency budgets of SD 1.x and 2.x.

    python tools/make_recipes.py

All are plans alone, without any search; `tests/test_recipes.py` replays every one of them. Ours are rungs of
`ladder.py`: those that `bench_recipes.py` has found to keep a budget, and none where it has not measured yet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import UNet2DConditionModel
from ladder import RUNGS, plan_of

from asdm_compress.assembly.plan import Plan, edited
from asdm_compress.core.edits import DROP, SHARED
from asdm_compress.models.edits import legal_edits
from asdm_compress.models.families import FAMILIES, architecture
from asdm_compress.profiling.counting import count_row_macs
from asdm_compress.workflows.recipes import describe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# One of every machine that families were measured on; none that was put aside.
MEASURED = sorted(p for p in (Path(__file__).parent / "results").glob("recipes*.json") if p.suffixes == [".json"])
BASE = {
    **{f"down_blocks.{i}.layers.1": DROP for i in range(3)},
    "down_blocks.3.resnets.1": DROP,
    "up_blocks.0.resnets.1": DROP,
    **{f"up_blocks.{i}.layers.1": DROP for i in (1, 2, 3)},
}
SMALL = {**BASE, "mid_block": DROP}
TINY = {
    **{site: edit for site, edit in BASE.items() if not site.startswith(("down_blocks.3", "up_blocks.0"))},
    "levels.3": DROP,
}
BK_SOURCE = """\
BK-SDM (Kim et al., 2305.15798), what its public code takes out for {name} (github.com/Nota-NetsPresso/BK-SDM at
e13670c); published with {published} parameters in the UNet."""
BK_PUBLISHED = {"base": ("0.58 B", "0.59 B"), "small": ("0.49 B", "0.49 B"), "tiny": ("0.33 B", "0.33 B")}
SEGMIND_SOURCE = """\
Segmind's {name} (github.com/segmind/distill-sd), which has the architecture of BK-SDM-{like}. The config in its folder
is stale: every command goes by the weights."""
SHALLOW_SOURCE = """\
A depth pattern: {depths} layers per level of the encoder and one more of the decoder. The shallow levels go first:
there few weights take much of the compute (of SD 1.5's UNet about 1 % of the weights and 15 % of the MACs)."""
SHARED_SOURCE = """\
Nothing is taken out: what both branches of classifier-free guidance (2207.12598) have in common, the first ResNet and
the first self-attention, is computed once. With guidance {saved:.1%} fewer MACs at {pixels} px, the same pictures."""
COUNTED = """\
Counted (asdm-compress recipes show): {params:,} of {all_params:,} parameters, {macs:.1f} of {all_macs:.1f} GMACs
(of the two rows of an image of {pixels} px with guidance one; attention's products included once)."""
LADDER_SOURCE = """\
The first {rungs} of the {all} rungs of tools/ladder.py, which says where their order comes from: what BK-SDM
(2305.15798) takes out of every level, shallow levels first; self-attention at the highest resolution (2504.21292 on how
local it is); the middle and the deepest level, as BK-SDM-Small and -Tiny; the transformers of the highest resolution,
where SDXL (2307.01952) has none.
Latency: {ratio:.3f} of the teacher's {clock}, on {device} (CPU threads: {threads}), bf16, batch {batch}, 512 px, random
weights (tools/bench_recipes.py, tools/results/{file}). On another machine it is another: time it there.
DAMAGE: NOT MEASURED, on no pre-trained weights: none were at hand. Compare pictures before using a student, and expect
to distil one of a small budget. For a plan by what edits do to your own checkpoint, on your own machine:
asdm-compress assemble YOUR-MODEL --budget latency={budget}x"""
FAMILY_NAMES = {"sd15": "sd15", "sd21-base": "sd21"}
GENERATIONS = {"v1": "sd15", "v2": "sd21-base"}


def shallow(depths: tuple[int, ...]) -> dict[str, str]:
    """The plan that leaves so many layers per level in the encoder, and one more in the decoder."""
    plan = {}
    for level, depth in enumerate(depths):
        up = len(depths) - 1 - level
        if depth < 2:
            deepest = level == len(depths) - 1
            plan[f"down_blocks.{level}.{'resnets' if deepest else 'layers'}.1"] = DROP
            plan[f"up_blocks.{up}.{'resnets' if deepest else 'layers'}.1"] = DROP
    return plan


def main() -> None:
    """Write every recipe."""
    for version, family in GENERATIONS.items():
        for name, edits in (("base", BASE), ("small", SMALL), ("tiny", TINY)):
            source = BK_SOURCE.format(name=name.capitalize(), published=BK_PUBLISHED[name][version == "v2"])
            _write(f"bk-sdm-{name}-{version}", family, edits, source)
    for name, edits, like in (("small", BASE, "Base"), ("tiny", TINY, "Tiny")):
        _write(f"segmind-{name}", "sd15", edits, SEGMIND_SOURCE.format(name=f"{name}-sd", like=like))
    for depths in ((1, 2, 2, 2), (1, 1, 2, 2), (1, 1, 1, 2)):
        for version, family in GENERATIONS.items():
            source = SHALLOW_SOURCE.format(depths=", ".join(map(str, depths)))
            _write(f"shallow-{'-'.join(map(str, depths))}-{version}", family, shallow(depths), source)
    for version, family in GENERATIONS.items():
        _write_shared(f"shared-{version}", family)
    for path in MEASURED:
        write_measured(json.loads(path.read_text(encoding="utf-8")), RECIPES, path.name)


def write_measured(measured: Mapping[str, Any], folder: Path, file: str) -> None:
    """Our recipe for every budget that a rung was measured to keep, as `file` says."""
    for family, budgets in measured["budgets"].items():
        for budget, rungs in budgets.items():
            edits = plan_of(rungs)
            row = next(r for r in measured["rows"] if (r["model"], r["edits"]) == (family, edits))
            source = LADDER_SOURCE.format(
                rungs=rungs, all=len(RUNGS), ratio=row["latency_ratio"], device=measured["device"],
                threads=measured["threads"], clock=measured["clock"], batch=measured["batch"], budget=budget,
                file=file,
            )  # fmt: skip
            name = f"{FAMILY_NAMES[family]}-latency-{budget}x"
            _write(name, family, edits, source, [f"latency={budget}x"], folder)


def _write_shared(name: str, family: str) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**FAMILIES[family].unet_config)
    edits = {path: SHARED for path, legal in legal_edits(unet).items() if SHARED in legal}
    pixels = FAMILIES[family].image_size
    macs = [
        count_row_macs(model, pixels // 8, pixels // 8, 77)[""].total for model in (unet, edited(unet, Plan(edits)))
    ]
    _write(name, family, edits, SHARED_SOURCE.format(saved=1 - macs[1] / macs[0], pixels=pixels))


def _write(
    name: str, family: str, edits: dict[str, str], source: str, budget: list[str] | None = None, folder: Path = RECIPES
) -> None:
    with torch.device("meta"):
        facts: dict[str, Any] = architecture(UNet2DConditionModel(**FAMILIES[family].unet_config))
    # Inpainting, depth and instruction checkpoints differ in their first convolution alone, and what is only taken out
    # does not hang on the groups of what stays.
    facts.pop("in_channels")
    facts.pop("norm_num_groups")
    content = {
        "asdm_recipe": 1,
        "base": {"model": family, "architecture": facts},
        "edits": [{"site": site, "edit": edit} for site, edit in edits.items()],
    }
    if budget:
        content["budget"] = budget
    text = yaml.safe_dump(content, sort_keys=False, width=120, allow_unicode=True)
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    counts = describe(path)
    counted = COUNTED.format(
        params=counts.parameters, all_params=counts.teacher_parameters, macs=counts.macs / 1e9,
        all_macs=counts.teacher_macs / 1e9, pixels=counts.image_size,
    )  # fmt: skip
    said = f"{source}\n{counted}\nFor every checkpoint of this architecture, inpainting and depth variants among them."
    comments = "".join(f"# {line}\n" for line in said.splitlines())
    path.write_text(comments + text, encoding="utf-8")


if __name__ == "__main__":
    main()
