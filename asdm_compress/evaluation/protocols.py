"""How an evaluation is made: this program's own way, or a published one's, with what departs from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from asdm_compress.core.defaults import GUIDANCE, STEPS
from asdm_compress.core.errors import AsdmError
from asdm_compress.evaluation.viewing import Viewing

IMAGES: Final = 60
SEED: Final = 1000


@dataclass(frozen=True, slots=True)
class Rules:
    """What a protocol fixes. `sampler` and `image_size` None are the model's own; `view_*` see `Viewing`.

    `needs` are what it cannot go without: prompts, reference, inception, clip.
    """

    name: str
    images: int = IMAGES
    steps: int = STEPS
    guidance: float = GUIDANCE
    seed: int = SEED
    sampler: str | None = None
    image_size: int | None = None
    view_size: int | None = None
    view_jpeg: int | None = None
    needs: tuple[str, ...] = ()

    @property
    def viewing(self) -> Viewing:
        """How measuring networks see the images."""
        return Viewing(self.view_size, self.view_jpeg)


OWN: Final = Rules("own")
# BK-SDM (Kim et al., 2305.15798): its published code's settings; JPEG is how it keeps images, at Pillow's quality.
BK_SDM: Final = Rules(
    "bk-sdm", 30_000, 25, 7.5, 1234, "pndm", 512, 256, 75, needs=("prompts", "reference", "inception", "clip")
)
PROTOCOLS: Final = {rules.name: rules for rules in (OWN, BK_SDM)}
_WORDS: Final = {
    "images": "images",
    "steps": "sampling steps",
    "guidance": "guidance scale",
    "seed": "first seed",
    "sampler": "sampler",
    "image_size": "pixels per side",
    "view_size": "pixels per side that are measured",
    "view_jpeg": "JPEG quality",
}
# What no setting can bring nearer.
_ALWAYS: Final = {
    "bk-sdm": (
        "every image starts from a seed of its own on the CPU, the first seed plus its number; published is one "
        "generator on the GPU for all images in a row",
        "Inception sees images resized as in TensorFlow and torch-fidelity; the published FID resizes with pytorch-fid",
        "precision is that of this run; published is fp16",
        "prompts are the first captions of the file that is given, one per image; published is the fixed list in "
        "BK-SDM's data/mscoco_val2014_30k/metadata.csv, which --prompts takes",
    )
}
_CLIP_G: Final = 1408  # the width of the published ViT-g/14


def choose_rules(name: str, changes: Mapping[str, Any]) -> tuple[Rules, list[str]]:
    """A protocol with what a user changes of it (None for nothing), and the departures from the published one.

    Raises AsdmError for an unknown protocol.
    """
    if name not in PROTOCOLS:
        raise AsdmError(f"unknown protocol {name!r}", f"Use {' or '.join(PROTOCOLS)}.")
    published = PROTOCOLS[name]
    rules = replace(published, **{key: value for key, value in changes.items() if value is not None})
    if name == OWN.name:
        return rules, []
    return rules, [*departures(rules, published), *_ALWAYS[name]]


def departures(rules: Rules, published: Rules) -> list[str]:
    """What of a protocol's settings is not as published."""
    found = []
    for field in fields(Rules):
        ours, theirs = getattr(rules, field.name), getattr(published, field.name)
        if ours != theirs:
            found.append(f"{_WORDS[field.name]}: {ours}; published: {theirs}")
    return found


def clip_departure(width: int) -> list[str]:
    """What to say of another CLIP than BK-SDM's, told by the width of its vision transformer."""
    if width == _CLIP_G:
        return []
    return ["CLIP scores are of another CLIP model; published: ViT-g/14 of LAION-2B (s34B b88K)"]
