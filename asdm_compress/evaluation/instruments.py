"""The networks that measure images, and what they find in a chunk of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from asdm_compress.evaluation.clip import Clip, load_clip
from asdm_compress.evaluation.fidelity import to_tensor
from asdm_compress.evaluation.inception import INPUT_SIZE, Inception, load_inception
from asdm_compress.evaluation.lpips import Lpips, load_lpips
from asdm_compress.evaluation.record import Extractor
from asdm_compress.evaluation.weights import sha256_of
from asdm_compress.scenes.captions import Caption
from asdm_compress.scenes.reader import WEIGHTS as READER_WEIGHTS
from asdm_compress.scenes.reader import SceneReader, load_reader
from asdm_compress.scenes.verdict import ATTRIBUTES, judge
from asdm_compress.scenes.world import IMAGE_SIZE

Tensors = dict[str, Tensor]
# Columns of a verdict: whether all holds, then right and of by attribute.
VERDICT: Final = 1 + 2 * len(ATTRIBUTES)


@dataclass(frozen=True, slots=True)
class Weights:
    """Where the weights of measuring networks are; None for those that are not used."""

    inception: Path | None = None
    clip: Path | None = None
    cmmd: Path | None = None
    lpips: Path | None = None


class Instruments:
    """The measuring networks of an evaluation, opened.

    `reads_scenes` adds the bundled world's reader. CMMD may use another CLIP than the scores do.
    """

    def __init__(self, weights: Weights, reads_scenes: bool, device: torch.device) -> None:
        self.device = device
        self.reader: SceneReader | None = load_reader() if reads_scenes else None
        self.inception: Inception | None = load_inception(weights.inception, device) if weights.inception else None
        self.clip: Clip | None = load_clip(weights.clip, device) if weights.clip else None
        same = weights.cmmd == weights.clip
        self.cmmd: Clip | None = (self.clip if same else load_clip(weights.cmmd, device)) if weights.cmmd else None
        self.lpips: Lpips | None = load_lpips(weights.lpips, device) if weights.lpips else None
        self.records = list(_records(weights, reads_scenes, self))

    def of_images(self, images: Sequence[Image]) -> Tensors:
        """What the set distances take, of images as they are to be seen: by network, one row per image.

        Images of a reference may have different sizes.
        """
        found: Tensors = {}
        if self.inception is not None:
            parts = [self.inception(_bytes(group).to(self.device)) for group in _by_size(images)]
            found["inception"], found["logits"] = (torch.cat(both).cpu() for both in zip(*parts, strict=True))
        if self.cmmd is not None:
            found["cmmd"] = self.cmmd.of_images(images).cpu()
        return found

    def of_prompted(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensors:
        """The same, and the CLIP score of each image with its prompt."""
        found = self.of_images(images)
        if self.clip is not None:
            embedded = found["cmmd"].to(self.device) if self.cmmd is self.clip else self.clip.of_images(images)
            found["clip_score"] = (embedded * self.clip.of_texts(prompts)).sum(1).cpu()
        return found

    def of_scenes(self, images: Sequence[Image], captions: Sequence[Caption]) -> Tensors:
        """The reader's features, and what of each caption is right; for images of the bundled world alone."""
        if self.reader is None:
            return {}
        pixels = to_tensor(images)
        with torch.no_grad():
            features = self.reader.features(pixels)[1]
        rows = torch.zeros(len(images), VERDICT, dtype=torch.long)
        for row, (caption, seen) in enumerate(zip(captions, self.reader.read(pixels), strict=True)):
            verdict = judge(caption, seen)
            counts = [n for name in ATTRIBUTES for n in (verdict.right[name], verdict.of[name])]
            rows[row] = torch.tensor([verdict.holds, *counts])
        return {"scene": features, "verdict": rows}

    def of_pairs(self, teacher: Sequence[Image], model: Sequence[Image]) -> Tensors:
        """LPIPS of each pair."""
        if self.lpips is None:
            return {}
        return {"lpips": self.lpips(to_tensor(teacher).to(self.device), to_tensor(model).to(self.device)).cpu()}


def _records(weights: Weights, reads_scenes: bool, opened: Instruments) -> Sequence[Extractor]:
    found = []
    if reads_scenes:
        found.append(_record("scene-reader", READER_WEIGHTS, IMAGE_SIZE))
    if weights.inception:
        found.append(_record("inception", weights.inception, INPUT_SIZE))
    if weights.clip and opened.clip:
        found.append(_record("clip", weights.clip, opened.clip.input_size))
    if weights.cmmd and opened.cmmd:
        found.append(_record("cmmd-clip", weights.cmmd, opened.cmmd.input_size))
    if weights.lpips and opened.lpips:
        found.append(_record(f"lpips-{opened.lpips.name}", weights.lpips, 0))
    return found


def _record(name: str, path: Path, size: int) -> Extractor:
    return Extractor(name=name, weights=path.name, sha256=sha256_of(path), input_size=size)


def _bytes(images: Sequence[Image]) -> Tensor:
    arrays = [np.asarray(image.convert("RGB"), dtype=np.uint8) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _by_size(images: Sequence[Image]) -> list[list[Image]]:
    """Neighbours of one size together, in their order."""
    groups: list[list[Image]] = []
    for image in images:
        if groups and groups[-1][0].size == image.size:
            groups[-1].append(image)
        else:
            groups.append([image])
    return groups
