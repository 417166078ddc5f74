"""Prompts for calibration and for held-out comparison: a user's own, the bundled world's captions, or general ones."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Final

from diffusers import StableDiffusionPipeline

from asdm_compress.core.errors import AsdmError
from asdm_compress.models.names import MINI_SD_FOLDER
from asdm_compress.scenes.captions import Caption, sample_captions

CALIBRATION_SEED: Final = 1
HELD_OUT_SEED: Final = 2
EVALUATION_SEED: Final = 3
PROBE_SEED: Final = 7
# Of a user's own prompts at least, where there are four times as many: of fewer pictures no report says much.
KEPT_BACK: Final = 8

_SUBJECTS: Final = (
    "an old fisherman", "a red bicycle", "a bowl of ripe apricots", "two dogs", "a wooden chair", "a steam locomotive",
    "a woman with a violin", "a stone bridge", "a cup of coffee", "a flock of geese", "a yellow taxi", "a sleeping cat",
    "three children", "a lighthouse", "a bunch of tulips", "an astronaut", "a sailing boat", "a plate of noodles",
)  # fmt: skip
_HELD_OUT_SUBJECTS: Final = (
    "a mountain goat", "a grand piano", "a loaf of bread", "a young carpenter", "a market stall", "a glass vase",
    "a rowing boat", "an open umbrella", "two musicians", "a basket of lemons", "a windmill", "a white horse",
)  # fmt: skip
_PLACES: Final = (
    "on a beach", "in an empty room", "at a crowded night market", "beside a mountain lake", "in front of a brick wall",
    "under a cloudy sky", "in a garden", "on a snowy street",
)  # fmt: skip
_STYLES: Final = (
    "photograph, natural light", "oil painting", "pencil drawing", "wide shot at dusk", "watercolour",
    "close-up, shallow depth of field", "black and white photograph", "digital illustration",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PromptSplit:
    """Prompts that a search may see, and prompts that only reports use.

    `captions` are the held-out prompts' claims, `seen_captions` the others', where they are of the bundled model's
    world.
    """

    calibration: tuple[str, ...]
    held_out: tuple[str, ...]
    captions: tuple[Caption, ...] | None = None
    seen_captions: tuple[Caption, ...] | None = None

    def of_own(self, given: int) -> str:
        """What became of so many prompts that a user gave."""
        unused = given - len(self.calibration) - len(self.held_out)
        rest = f"; {unused} are not used" if unused else ""
        return (
            f"of {given} prompts {len(self.calibration)} are measured and fitted on, and {len(self.held_out)} are kept "
            f"back for the report{rest}"
        )


def distinct(prompts: Sequence[str]) -> tuple[str, ...]:
    """Prompts in order, each once. Raises AsdmError for fewer than two that differ."""
    found = tuple(dict.fromkeys(prompts))
    if len(found) < 2:
        raise AsdmError(
            "all prompts are the same, and what is reported on has to be others than what chose",
            "Give two that differ.",
        )
    return found


def choose_prompts(
    pipeline: StableDiffusionPipeline, own: Sequence[str] | None, calibration: int, held_out: int
) -> PromptSplit:
    """Split a user's own prompts, each taken once; without any, take such as the pipeline understands.

    Of a user's own a fourth is kept back where that is no more than `KEPT_BACK`, and more only in the proportion of the
    two numbers. Raises AsdmError for fewer than two that differ.
    """
    if own is not None:
        own = distinct(own)
        wanted = round(len(own) * held_out / (calibration + held_out))
        back = min(max(1, wanted, min(KEPT_BACK, held_out, len(own) // 4)), len(own) - 1)
        return PromptSplit(tuple(own[: len(own) - back][:calibration]), tuple(own[len(own) - back :][:held_out]))
    if understands_scenes(pipeline):
        seen = sample_captions(calibration, CALIBRATION_SEED, held_out=False)
        unseen = sample_captions(held_out, HELD_OUT_SEED, held_out=True)
        return PromptSplit(tuple(c.text for c in seen), tuple(c.text for c in unseen), unseen, seen)
    general = _general_prompts(_SUBJECTS, calibration, CALIBRATION_SEED)
    others = _held_out_prompts(held_out, HELD_OUT_SEED)
    for found, wanted in ((general, calibration), (others, held_out)):
        if len(found) < wanted:
            raise AsdmError(
                f"there are {len(found)} general prompts for this, and {wanted} are asked for",
                "Give your own with --prompts, or ask for fewer.",
            )
    return PromptSplit(general, others)


def probe_prompts(pipeline: StableDiffusionPipeline, count: int, own: Sequence[str] | None = None) -> tuple[str, ...]:
    """Prompts that a training is probed on, and its best step chosen by; neither reports nor evaluations use them.

    Of a user's own the first. Raises AsdmError where fewer than two of those differ.
    """
    if own is not None:
        return distinct(own)[:count]
    if understands_scenes(pipeline):
        return tuple(caption.text for caption in sample_captions(count, PROBE_SEED, held_out=True))
    return _held_out_prompts(count, PROBE_SEED)


def evaluation_prompts(pipeline: StableDiffusionPipeline, count: int) -> tuple[tuple[str, ...], tuple[Caption, ...]]:
    """Prompts that no search has seen, and their claims where they are of the bundled model's world.

    Those name one, two and three objects in turn, and all have a combination never seen in training.
    """
    if not understands_scenes(pipeline):
        return _held_out_prompts(count, EVALUATION_SEED), ()
    sets = [sample_captions(-(-count // 3), EVALUATION_SEED + n, n, held_out=True) for n in (1, 2, 3)]
    captions = tuple(sets[i % 3][i // 3] for i in range(count))
    return tuple(caption.text for caption in captions), captions


def _held_out_prompts(count: int, use: int) -> tuple[str, ...]:
    """So many of the prompts that no search sees, or all that there are of one use: no two uses have one in common."""
    everything = _general_prompts(_HELD_OUT_SUBJECTS, len(_HELD_OUT_SUBJECTS) * len(_PLACES) * len(_STYLES), 0)
    quarter = len(everything) // 4
    parts = {HELD_OUT_SEED: (0, 1), PROBE_SEED: (1, 2), EVALUATION_SEED: (2, 4)}
    first, last = (quarter * n for n in parts[use])
    return everything[first:last][:count]


def _general_prompts(subjects: Sequence[str], count: int, seed: int) -> tuple[str, ...]:
    """So many different prompts, or all that there are."""
    everything = [f"{a} {b}, {c}" for a, b, c in product(subjects, _PLACES, _STYLES)]
    return tuple(random.Random(seed).sample(everything, min(count, len(everything))))


def read_prompts(path: Path) -> list[str]:
    """The non-empty lines of a UTF-8 file; raises AsdmError for one that cannot be read or has fewer than two."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
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
