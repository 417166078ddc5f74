"""What pictures are worth by themselves, whatever the full run's look like: what a network sees in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from asdm_compress.assembly.store import measurement_folder, weights_hash
from asdm_compress.core.files import CACHE_HINT, disk_errors
from asdm_compress.core.provenance import content_hash
from asdm_compress.evaluation.distances import CMMD_SCALE, Frechet, Kernel, Moments, SetDistance, gaussian
from asdm_compress.evaluation.instruments import Instruments
from asdm_compress.scenes.captions import Caption
from asdm_compress.scheduling.rollouts import Judge, Progress, mean_interval, surely_less
from asdm_compress.scheduling.ways import Way

OTHER_SEEDS: Final = 10_000_000  # from a split's seeds to those of the pictures that distances are to
FARTHER: Final = 1.05  # times the full run's own distance: up to there a run in fewer steps is as good as it


@dataclass(frozen=True, slots=True)
class Worth:
    """How much of its prompt every picture shows, and how far all of them are from the full run's with other seeds.

    `shown` are shares of claims that hold, of the bundled world's captions, or CLIP scores; `distance` is Fréchet's in
    the scene reader's features, or CMMD.
    """

    shown: tuple[float, ...]
    distance: float

    def mean(self) -> float:
        """Of what is shown."""
        return float(np.mean(self.shown))

    def is_behind(self, other: Worth) -> bool:
        """Whether these pictures surely show less of the same prompts, pair by pair."""
        return surely_less(self.shown, other.shown)

    def is_as_good_as(self, full: Worth) -> bool:
        """Whether these are not surely behind the full run's pictures, nor `FARTHER` away than those are themselves."""
        return not self.is_behind(full) and self.distance <= FARTHER * full.distance

    def text(self) -> str:
        """For tables."""
        return f"{self.mean():.3f} ± {mean_interval(self.shown):.3f}; {self.distance:.3g}"

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
        name = content_hash(
            {"networks": opened, "claims": captions is not None, "vae": weights_hash(judge.pipeline.vae)}
        )
        self._file = None if judge.folder is None else judge.folder / f"worth-{name}.jsonl"
        self._known: dict[str, Worth] = {}
        if self._file is not None and self._file.exists():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                try:
                    kept = json.loads(line)
                    self._known[kept["way"]] = Worth(tuple(kept["shown"]), float(kept["distance"]))
                except (ValueError, KeyError):
                    continue  # cut short by a kill
        seeds = replace(judge.settings, seed=judge.settings.seed + OTHER_SEEDS)
        place = None if judge.folder is None else measurement_folder(judge.pipeline, judge.prompts, seeds, 0)
        others = Judge(judge.pipeline, judge.prompts, seeds, place, judge.batch, judge.target)
        self._distance = self._to(self._read(others.pictures)[1])
        self.full = self._worth(judge.pictures)

    @property
    def names(self) -> tuple[str, str]:
        """What is shown, and what the distance is, for people."""
        return ("CLIP score", "CMMD") if self.captions is None else ("claims that hold", "Fréchet distance")

    def worth(self, way: Way) -> Worth:
        """What a way's pictures are worth; they are sampled once for their score too."""
        if way.key not in self._known:
            pictures = self.judge.pictures_of(way)
            self.judge.note(way, pictures)
            found = self._known[way.key] = self._worth(pictures)
            if self._file is not None:
                line = json.dumps({"way": way.key, "name": way.name, "shown": found.shown, "distance": found.distance})
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
        return Worth(shown, self._distance.value(features))

    def _read(self, pictures: Sequence[Image]) -> tuple[tuple[float, ...], NDArray[np.float64]]:
        if self.captions is None:
            seen = self.instruments.of_prompted(pictures, self.judge.prompts)
            return tuple(seen["clip_score"].tolist()), seen["cmmd"].double().numpy()
        seen = self.instruments.of_scenes(pictures, self.captions)
        right, of = seen["verdict"][:, 1::2].sum(1), seen["verdict"][:, 2::2].sum(1)
        return tuple((right / of).tolist()), seen["scene"].double().numpy()

    def _to(self, reference: NDArray[np.float64]) -> SetDistance:
        if self.captions is None:
            return Kernel(reference, gaussian, unbiased=False, scale=CMMD_SCALE)
        return Frechet(Moments.of(reference))
