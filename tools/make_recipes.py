"""Write the recipes of published students into recipes/: which modules BK-SDM, Segmind and depth patterns take out.

    python tools/make_recipes.py

They are plans alone, without any search of ours; `tests/test_recipes.py` replays every one of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import UNet2DConditionModel

from asdm_compress.core.edits import DROP
from asdm_compress.models.families import FAMILIES, architecture

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
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
BK_SOURCE = "BK-SDM (Kim et al., 2305.15798), the removals of its public code (Nota-NetsPresso/BK-SDM e13670c)"
SEGMIND_SOURCE = "Segmind distill-sd, whose {} has the architecture of BK-SDM-{}"
SHALLOW_SOURCE = "A depth pattern: layers per level, shallow levels first, where few weights take much of the compute"
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
            _write(f"bk-sdm-{name}-{version}", family, edits, BK_SOURCE)
    for name, edits, like in (("small", BASE, "Base"), ("tiny", TINY, "Tiny")):
        _write(f"segmind-{name}", "sd15", edits, SEGMIND_SOURCE.format(f"{name}-sd", like))
    for depths in ((1, 2, 2, 2), (1, 1, 2, 2), (1, 1, 1, 2)):
        for version, family in GENERATIONS.items():
            _write(f"shallow-{'-'.join(map(str, depths))}-{version}", family, shallow(depths), SHALLOW_SOURCE)


def _write(name: str, family: str, edits: dict[str, str], source: str) -> None:
    with torch.device("meta"):
        facts: dict[str, Any] = architecture(UNet2DConditionModel(**FAMILIES[family].unet_config))
    # Inpainting, depth and instruction checkpoints differ in their first convolution alone.
    facts.pop("in_channels")
    content = {
        "asdm_recipe": 1,
        "base": {"model": family, "architecture": facts},
        "edits": [{"site": site, "edit": edit} for site, edit in edits.items()],
    }
    comments = f"# {source}.\n# For every checkpoint of this architecture, inpainting and depth variants among them.\n"
    text = yaml.safe_dump(content, sort_keys=False, width=120, allow_unicode=True)
    (RECIPES / f"{name}.yaml").write_text(comments + text, encoding="utf-8")


if __name__ == "__main__":
    main()
