"""The model card: the README.md that a student folder carries, as the hub and its users read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Final

from huggingface_hub import ModelCard, ModelCardData

from asdm_compress.core.provenance import package_version
from asdm_compress.core.recipe import Evidence, Recipe
from asdm_compress.core.units import format_bytes, format_count, format_seconds
from asdm_compress.reporting.markdown import BEGIN, END


@dataclass(frozen=True, slots=True)
class CountedCosts:
    """Costs of one UNet that are exact on any machine: parameters, MACs, and bytes of live activations at the peak."""

    parameters: int
    macs: int
    activation_bytes: int


@dataclass(frozen=True, slots=True)
class CardContent:
    """What a card says.

    `base` is the model's name as it was given, `repository` its id on the hub where it has one. `counted` are teacher
    and student for one image of `image_size` pixels. The recipe's evidence is what was measured, on the model itself
    where `measured_here`, else on the one that the recipe was made for.
    """

    name: str
    base: str
    repository: str | None
    recipe: Recipe
    command: str
    counted: tuple[CountedCosts, CountedCosts]
    image_size: int
    is_stock: bool
    is_pipeline: bool
    measured_here: bool
    pipeline_class: str = "StableDiffusionPipeline"
    variant: str | None = None


_TAGS: Final = {"StableDiffusionPipeline": "text-to-image"}


def render_card(content: CardContent) -> str:
    """The whole README.md with its metadata."""
    data = ModelCardData(
        base_model=content.repository,
        library_name="diffusers",
        pipeline_tag=_TAGS.get(content.pipeline_class, "image-to-image") if content.is_pipeline else None,
        tags=["stable-diffusion", "pruning", "asdm-compress"],
    )
    place = files("asdm_compress.reporting") / "templates" / "card.md.j2"
    with as_file(place) as path:
        card = ModelCard.from_template(
            data,
            template_path=str(path),
            content=content,
            variant=f', variant="{content.variant}"' if content.variant else "",
            version=package_version("asdm-compress"),
            counted=_counted_rows(content.counted),
            measured=_measured_rows(content.recipe.evidence),
            figures_begin=BEGIN,
            figures_end=END,
        )
    return str(card).rstrip("\n") + "\n"


Row = tuple[str, str, str, str]


def _counted_rows(counted: tuple[CountedCosts, CountedCosts]) -> Sequence[Row]:
    teacher, student = counted
    pairs = (
        ("parameters", teacher.parameters, student.parameters, format_count),
        ("MACs", teacher.macs, student.macs, format_count),
        ("activations at the peak", teacher.activation_bytes, student.activation_bytes, format_bytes),
    )
    return [(name, show(a), show(b), f"{b / a:.3f}x") for name, a, b, show in pairs]


def _measured_rows(evidence: Evidence | None) -> Sequence[Row]:
    if evidence is None:
        return []
    teacher, measured = evidence.teacher, evidence.measured
    return [
        (
            "latency of one step",
            format_seconds(teacher.latency),
            format_seconds(measured.latency),
            f"{evidence.measured_latency_ratio:.3f}x",
        ),
        ("damage (relative squared error of the noise prediction)", "0", f"{evidence.measured_damage:.4g}", ""),
        ("damage on held-out prompts", "0", f"{evidence.held_out_damage:.4g}", ""),
    ]
