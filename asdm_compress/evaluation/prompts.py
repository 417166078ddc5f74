"""Prompts for calibration and for held-out comparison: a user's own, the bundled world's captions, or general ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from diffusers import StableDiffusionPipeline

from asdm_compress.core.errors import AsdmError
from asdm_compress.models.names import MINI_SD_FOLDER
from asdm_compress.scenes.captions import Caption, sample_captions

CALIBRATION_SEED: Final = 1
HELD_OUT_SEED: Final = 2

_SUBJECTS: Final = (
    "a portrait of an old fisherman", "a red bicycle leaning on a wall", "a bowl of ripe apricots", "a mountain lake",
    "two dogs running on a beach", "a crowded night market", "a wooden chair in an empty room", "a steam locomotive",
)  # fmt: skip
_STYLES: Final = ("photograph, natural light", "oil painting", "pencil drawing", "wide shot at dusk")


@dataclass(frozen=True, slots=True)
class PromptSplit:
    """Prompts that a search may see, and prompts that only reports use.

    `captions` are the held-out prompts' claims, where they are of the bundled model's world.
    """

    calibration: tuple[str, ...]
    held_out: tuple[str, ...]
    captions: tuple[Caption, ...] | None = None


def choose_prompts(
    pipeline: StableDiffusionPipeline, own: Sequence[str] | None, calibration: int, held_out: int
) -> PromptSplit:
    """Split a user's own prompts; without any, take such as the pipeline understands."""
    if own is not None:
        share = max(1, round(len(own) * calibration / (calibration + held_out)))
        share = min(share, len(own) - 1)
        return PromptSplit(tuple(own[:share][:calibration]), tuple(own[share:][:held_out]))
    if understands_scenes(pipeline):
        seen = sample_captions(calibration, CALIBRATION_SEED, held_out=False)
        unseen = sample_captions(held_out, HELD_OUT_SEED, held_out=True)
        return PromptSplit(tuple(c.text for c in seen), tuple(c.text for c in unseen), unseen)
    everything = [f"{subject}, {style}" for style in _STYLES for subject in _SUBJECTS]
    middle = len(everything) // 2
    return PromptSplit(tuple(everything[:middle][:calibration]), tuple(everything[middle:][:held_out]))


def read_prompts(path: Path) -> list[str]:
    """The non-empty lines of a UTF-8 file; raises AsdmError for one that cannot be read or has fewer than two."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise AsdmError(f"the prompts file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise AsdmError(f"the prompts file {path} is not UTF-8 text") from error
    lines = [line for line in lines if line]
    if len(lines) < 2:
        raise AsdmError(f"the prompts file {path} has {len(lines)} prompts", "Give at least two, one per line.")
    return lines


def understands_scenes(pipeline: StableDiffusionPipeline) -> bool:
    """Whether the pipeline has the bundled model's vocabulary, so that captions of its world mean something to it."""
    bundled = json.loads((MINI_SD_FOLDER / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = pipeline.tokenizer.get_vocab()
    return bool(vocabulary == bundled["model"]["vocab"])
