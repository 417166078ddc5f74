"""The card of a student that a workflow has made: what it says is counted here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from diffusers import UNet2DConditionModel

from asdm_compress.core.recipe import Recipe
from asdm_compress.models.assembled_unet import AssembledUNet2DConditionModel
from asdm_compress.models.families import latent_size_of
from asdm_compress.models.loading import text_tokens_of
from asdm_compress.models.names import HUB_NAMES, NAMES
from asdm_compress.models.single_file import PIPELINES
from asdm_compress.models.source import Source
from asdm_compress.profiling.counting import count, count_row_macs
from asdm_compress.reporting.card import CardContent, CountedCosts, render_card

CARD: Final = "README.md"
PYTHON: Final = "asdm_compress, from Python"


@dataclass(frozen=True, slots=True)
class Origin:
    """What a student was made of, and by which command."""

    source: Source
    command: str = PYTHON

    @property
    def repository(self) -> str | None:
        """The base model's id on the hub, where it came from there."""
        name = self.source.name
        if name in HUB_NAMES:
            return HUB_NAMES[name][0]
        is_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
        return name if is_id else None

    @property
    def reference(self) -> str:
        """What a recipe calls the base model, by which commands open it where they can: of a path the last part."""
        if self.source.name in NAMES:
            return self.source.name
        # A folder that is called as a known model is not that model.
        return f"./{self.base}" if self.base in NAMES else self.base

    @property
    def base(self) -> str:
        """The base model's name; of a path the last part alone."""
        return self.repository or Path(self.source.name).name or self.source.name


def write_card(
    folder: Path,
    name: str,
    origin: Origin,
    recipe: Recipe,
    teacher: UNet2DConditionModel,
    student: UNet2DConditionModel,
    measured_here: bool = False,
    variant: str | None = None,
) -> None:
    """Write the card of a student folder that is to be called `name`; the two UNets may be on the meta device."""
    size = latent_size_of(teacher)
    tokens = text_tokens_of(origin.source)
    content = CardContent(
        name=name,
        base=origin.base,
        repository=origin.repository,
        recipe=recipe,
        command=origin.command,
        counted=(_counted(teacher, size, tokens), _counted(student, size, tokens)),
        image_size=size * 8,
        is_stock=not isinstance(student, AssembledUNet2DConditionModel),
        is_pipeline=origin.source.is_pipeline,
        measured_here=measured_here,
        pipeline_class=PIPELINES.get(int(student.config["in_channels"]), PIPELINES[4]),
        variant=variant,
    )
    (folder / CARD).write_text(render_card(content), encoding="utf-8")


def _counted(unet: UNet2DConditionModel, size: int, tokens: int) -> CountedCosts:
    macs, peak = count_row_macs(unet, size, size, tokens), count(unet, 1, size, size, tokens).peak_bytes
    return CountedCosts(sum(p.numel() for p in unet.parameters()), macs[""].total, peak[""])
