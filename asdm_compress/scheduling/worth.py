"""What pictures are worth by themselves, whatever the full run's look like: what a network sees in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from asdm_compress.assembly.store import measurement_folder, weights_hash
from asdm_compress.core.files import CACHE_HINT, disk_errors
from asdm_compress.core.provenance import content_hash, versions
from asdm_compress.evaluation.distances import (
    CMMD_SCALE,
    Frechet,
    Kernel,
    Moments,
    SetDistance,
    estimates,
    gaussian,
)
from asdm_compress.evaluation.instruments import Instruments
from asdm_compress.scenes.captions import Caption
from asdm_compress.scheduling.rollouts import CONFIDENCE, Judge, Progress, mean_interval, surely_less, with_interval
from asdm_compress.scheduling.ways import Way

OTHER_SEEDS: Final = 10_000_000  # from a split's seeds to those of the pictures that distances are to
VERSION: Final = 1  # to be raised when the meaning of what is kept changes


@dataclass(frozen=True, slots=True)
class Worth:
    """How much of its prompt every picture shows, and how far all of them are from the full run's with other seeds.

    `shown` are shares of claims that hold, of the bundled world's captions, or CLIP scores; `distance` is Fréchet's in
    the scene reader's features, or CMMD, and `farther` says whether it is surely more than the full run's own (95 %
    interval of the difference, the same pictures of both resampled).
    """

    shown: tuple[float, ...]
    distance: float
    farther: bool = False

    def mean(self) -> float:
        """Of what is shown."""
        return float(np.mean(self.shown))

    def is_behind(self, other: Worth) -> bool:
        """Whether these pictures surely show less of the same prompts, pair by pair (95 %)."""
        return surely_less(self.shown, other.shown, CONFIDENCE)

    def is_as_good_as(self, full: Worth) -> bool:
        """Whether these pictures are not surely worse: of few prompts little is sure, and more of them say more."""
        return not self.is_behind(full) and not self.farther

    def text(self) -> str:
        """For tables."""
        return f"{with_interval(self.mean(), mean_interval(self.shown), 3)}; {self.distance:.3g}"

    def as_json(self) -> dict[str, Any]:
        """For files: the mean of what is shown, and half the width of its two-sided 95 % interval (Student)."""
        interval = mean_interval(self.shown)
        return {
            "pictures": len(self.shown), "shown": self.mean(), "distance": self.distance,
            "shown_interval": interval if np.isfinite(interval) else None,
        }  # fmt: skip


def best_of(worths: Sequence[Worth]) -> int:
    """Which is best: of those that do not surely show less than the one that shows most, the nearest."""
    most = max(worths, key=Worth.mean)
    standing = [number for number, worth in enumerate(worths) if not worth.is_behind(most)]
    return min(standing, key=lambda number: worths[number].distance)


class QualityJudge:
    """Says what pictures of a judge's prompts are worth, by `captions` of the bundled world, or else by CLIP.

    What is known is kept in the judge's folder, a line each as soon as it is known.
    """

    def __init__(self, judge: Judge, instruments: Instruments, captions: Sequence[Caption] | None) -> None:
        self.judge, self.instruments, self.captions = judge, instruments, captions
        opened = [record.model_dump() for record in instruments.records]
        vae = weights_hash(judge.pipeline.vae)
        name = content_hash(
            {
                "version": VERSION, "networks": opened, "claims": captions is not None, "vae": vae,
                "seeds": OTHER_SEEDS, "packages": versions(),
            }
        )  # fmt: skip
        self._file = None if judge.folder is None else judge.folder / f"worth-{name}.jsonl"
        self._known: dict[str, Worth] = {}
        if self._file is not None and self._file.exists():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                try:
                    kept = json.loads(line)
                    self._known[kept["way"]] = Worth(tuple(kept["shown"]), float(kept["distance"]), kept["farther"])
                except (ValueError, KeyError):
                    continue  # cut short by a kill
        seeds = replace(judge.settings, seed=judge.settings.seed + OTHER_SEEDS)
        place = None if judge.folder is None else measurement_folder(judge.pipeline, judge.prompts, seeds, 0)
        others = Judge(judge.pipeline, judge.prompts, seeds, place, judge.batch, judge.target)
        self._distance = self._to(self._read(others.pictures)[1])
        shown, self._features = self._read(judge.pictures)
        self.full = Worth(shown, self._distance.value(self._features))

    @property
    def names(self) -> tuple[str, str]:
        """What is shown, and what the distance is, for people."""
        return ("CLIP score", "CMMD") if self.captions is None else ("claims that hold", "Fréchet distance")

    def worth(self, way: Way) -> Worth:
        """What a way's pictures are worth; their score is known with it."""
        if way.key not in self._known:
            pictures = self.judge.pictures_of(way)
            self.judge.note(way, pictures)
            found = self._known[way.key] = self._worth(pictures)
            if self._file is not None:
                line = json.dumps({"way": way.key, "name": way.name, **asdict(found)})
                with disk_errors(self._file, CACHE_HINT), self._file.open("a", encoding="utf-8") as file:
                    file.write(f"\n{line}\n")  # anew even behind a line that a kill cut short
        return self._known[way.key]

    def worths(self, ways: Sequence[Way], progress: Progress) -> list[Worth]:
        """The same of several ways."""
        found = []
        for way in ways:
            found.append(self.worth(way))
            progress(len(found), len(ways))
        return found

    def _worth(self, pictures: Sequence[Image]) -> Worth:
        shown, features = self._read(pictures)
        _, distance, more = estimates(self._distance, self._features, features)
        return Worth(shown, distance.value, more.low is not None and more.low > 0)

    def _read(self, pictures: Sequence[Image]) -> tuple[tuple[float, ...], NDArray[np.float64]]:
        """What each picture shows, and features (N, D), read so many at once as are sampled."""
        parts: list[tuple[Tensor, Tensor]] = []
        for first in range(0, len(pictures), self.judge.batch):
            some = slice(first, first + self.judge.batch)
            if self.captions is None:
                seen = self.instruments.of_prompted(pictures[some], self.judge.prompts[some])
                parts.append((seen["clip_score"], seen["cmmd"]))
            else:
                seen = self.instruments.of_scenes(pictures[some], self.captions[some])
                right, of = seen["verdict"][:, 1::2].sum(1), seen["verdict"][:, 2::2].sum(1)
                parts.append((right / of, seen["scene"]))
        shown, features = (torch.cat(some) for some in zip(*parts, strict=True))
        return tuple(shown.tolist()), features.double().numpy()

    def _to(self, reference: NDArray[np.float64]) -> SetDistance:
        if self.captions is None:
            return Kernel(reference, gaussian, unbiased=False, scale=CMMD_SCALE)
        return Frechet(Moments.of(reference))
