"""Tries ways of sampling on prompts: how near their pictures come to those of the full run, pair by pair."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL.Image import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.stats import t as student_t
from torch import Tensor

from asdm_compress.assembly.store import weights_hash
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import CACHE_HINT, disk_errors, output_file
from asdm_compress.evaluation.fidelity import compare_pairs
from asdm_compress.sampling.images import check_latents, decode
from asdm_compress.sampling.settings import SamplingSettings, encode
from asdm_compress.scheduling.ways import Way

CONFIDENCE: Final = 0.95
SURE: Final = 0.99  # at one look, that a way is behind, before it is left out of a race
LOOK: Final = 8  # prompts between two looks, however many are sampled at once
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Score:
    """PSNR in dB and SSIM of every picture against the full run's."""

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]

    def mean(self, metric: str = "psnr") -> float:
        """Over the pictures."""
        return float(np.mean(getattr(self, metric)))

    def lower(self, metric: str = "psnr") -> float:
        """What the mean is above with a confidence of 95 %; minus infinity for a single picture."""
        values = getattr(self, metric)
        return self.mean(metric) - _half_width(values, CONFIDENCE)

    def text(self) -> str:
        """Mean PSNR and half the width of its two-sided 95 % interval, of more than one picture."""
        return f"{with_interval(self.mean(), mean_interval(self.psnr), 2)} dB"

    def as_json(self) -> dict[str, float]:
        """For files: means, and half the width of their two-sided 95 % intervals (Student)."""
        return {
            "pairs": len(self.psnr),
            "psnr": self.mean(),
            "psnr_interval": _finite(mean_interval(self.psnr)),
            "ssim": self.mean("ssim"),
            "ssim_interval": _finite(mean_interval(self.ssim)),
        }


def is_behind(one: Score, other: Score, metric: str = "psnr") -> bool:
    """Whether one is surely of a lower mean than another of the same prompts."""
    return surely_less(getattr(one, metric), getattr(other, metric))


def surely_less(ones: Sequence[float], others: Sequence[float], sure: float = SURE) -> bool:
    """Whether the mean of some values is lower than that of their partners, pair by pair and as `sure` (Student)."""
    ahead = tuple(b - a for a, b in zip(ones, others, strict=True))
    return float(np.mean(ahead)) > _half_width(ahead, sure)


def with_interval(mean: float, half: float, digits: int) -> str:
    """A mean and half the width of its interval where there is one, for people."""
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")


def mean_interval(values: Sequence[float]) -> float:
    """Half the width of the two-sided 95 % interval of a mean (Student); infinity of a single value."""
    return _half_width(values, (1 + CONFIDENCE) / 2)


def gain(ours: Score, theirs: Score) -> tuple[float, float]:
    """Mean difference of PSNR in dB, pair by pair, and half the width of its 95 % interval."""
    differences = tuple(a - b for a, b in zip(ours.psnr, theirs.psnr, strict=True))
    return float(np.mean(differences)), mean_interval(differences)


class Judge:
    """Prompts and seeds of one split, and the full run's pictures of them, or those of another `target`.

    Everything is kept in `folder`, one line or file as soon as it is known, so that a run that was cut off goes on.
    """

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        prompts: Sequence[str],
        settings: SamplingSettings,
        folder: Path | None = None,
        batch: int = 8,
        target: Way | None = None,
    ) -> None:
        self.pipeline, self.prompts, self.settings = pipeline, tuple(prompts), settings
        self.target = target or Way("full", settings.steps, 0.0)
        self.texts = encode(pipeline, prompts, settings.guidance)
        self.folder, self.batch = folder, batch
        # The folder is of everything that latents hang on; pictures also hang on the VAE.
        self._scores = None if folder is None else folder / f"scores-{weights_hash(pipeline.vae)}.jsonl"
        self._known = _read_lines(self._scores) if self._scores else {}
        self.full = self._full()
        self.pictures: list[Image] = decode(pipeline, self.full, batch)

    def score(self, way: Way, count: int | None = None) -> Score:
        """A way's score on the first `count` prompts, or on all; only what is not known yet is sampled."""
        count = min(len(self.prompts), len(self.prompts) if count is None else count)
        known = len(self._known.get(way.key, Score((), ())).psnr)
        if known < count:
            self._note(way, self._pictures(way, known, count), known)
        found = self._known[way.key]
        return Score(found.psnr[:count], found.ssim[:count])

    def note(self, way: Way, pictures: Sequence[Image]) -> None:
        """Take a way's pictures of all prompts, which were sampled for something else, for its score too."""
        known = len(self._known.get(way.key, Score((), ())).psnr)
        if known < len(self.prompts):
            self._note(way, pictures[known:], known)

    def _note(self, way: Way, pictures: Sequence[Image], first: int) -> None:
        """Score the next pictures, and keep it."""
        psnr, ssim = compare_pairs(pictures, self.pictures[first : first + len(pictures)])
        before = self._known.get(way.key, Score((), ()))
        found = self._known[way.key] = Score((*before.psnr, *psnr), (*before.ssim, *ssim))
        if self._scores:
            line = json.dumps({"way": way.key, "name": way.name, "psnr": found.psnr, "ssim": found.ssim})
            with disk_errors(self._scores, CACHE_HINT):
                self._scores.parent.mkdir(parents=True, exist_ok=True)
                with self._scores.open("a", encoding="utf-8") as file:
                    file.write(f"\n{line}\n")  # anew even behind a line that a kill cut short

    def scores(self, ways: Sequence[Way], progress: Progress | None = None) -> list[Score]:
        """The scores of several ways."""
        found = []
        for way in ways:
            found.append(self.score(way))
            if progress:
                progress(len(found), len(ways))
        return found

    def race(
        self, ways: Sequence[Way], metric: str = "psnr", leave: int = 1, progress: Progress | None = None
    ) -> list[Way]:
        """The `leave` ways, or more, that are nearest to the full run, the best first, of which all prompts are known.

        After every `LOOK` prompts those ways drop out that are, pair by pair, surely behind the last one to be left.
        """
        running, whole = list(ways), len(self.prompts)
        total = len(ways) * whole
        for first in range(0, whole, LOOK):
            count = min(first + LOOK, whole)
            for number, way in enumerate(running, start=1):
                self.score(way, count)
                if progress:  # as if those that dropped out went on
                    progress(round(len(ways) * (first + (count - first) * number / len(running))), total)
            running.sort(key=lambda way: self.score(way, count).mean(metric), reverse=True)
            if count < whole and len(running) > leave:
                last = self.score(running[leave - 1], count)
                others = [way for way in running[leave:] if not is_behind(self.score(way, count), last, metric)]
                running = [*running[:leave], *others]
        return running

    def pictures_of(self, way: Way, count: int | None = None) -> list[Image]:
        """A way's pictures, one for each of the first `count` prompts, or of all."""
        return self._pictures(way, 0, count)

    def _pictures(self, way: Way, first: int, last: int | None) -> list[Image]:
        """Plain grey ones where a way has no numbers, so that it is far from the full run and the others go on."""
        latents = self._sampled(way, first, last)
        fine = latents.isfinite().flatten(1).all(1)
        latents = torch.where(fine[:, None, None, None], latents, torch.zeros_like(latents))
        try:
            return decode(self.pipeline, latents, self.batch)
        except AsdmError:  # the VAE overflows; it did not for the full run
            return [self._picture(latents[i : i + 1]) for i in range(len(latents))]

    def _picture(self, latents: Tensor) -> Image:
        try:
            return decode(self.pipeline, latents)[0]
        except AsdmError:
            return decode(self.pipeline, torch.zeros_like(latents))[0]

    def _full(self) -> Tensor:
        path = self.folder / "full.safetensors" if self.folder else None
        if path is not None and path.exists():
            try:
                return load_file(path)["latents"].to(self.pipeline.device)
            except (SafetensorError, KeyError):
                pass
        found = self.latents_of(self.target)
        if path is not None:
            with output_file(path, CACHE_HINT) as aside:
                save_file({"latents": found.cpu().contiguous()}, aside)
        return found

    def latents_of(self, way: Way, *, first: int = 0, last: int | None = None) -> Tensor:
        """A way's final latents, of the prompts from `first` to before `last`, or to the end.

        Raises AsdmError where they are no numbers.
        """
        found = self._sampled(way, first, last)
        check_latents(found, self.pipeline.unet.dtype)
        return found

    @torch.no_grad()
    def _sampled(self, way: Way, first: int, last: int | None) -> Tensor:
        parts, last = [], min(len(self.texts), len(self.texts) if last is None else last)
        for start in range(first, last, self.batch):
            here = replace(self.settings, seed=self.settings.seed + start)
            parts.append(way.loop(self.pipeline, self.texts[start : min(start + self.batch, last)], here)())
        return torch.cat(parts)


def _half_width(values: Sequence[float], quantile: float) -> float:
    if len(values) < 2:
        return float("inf")
    return float(student_t.ppf(quantile, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def _finite(value: float) -> Any:
    return value if np.isfinite(value) else None


def _read_lines(path: Path) -> dict[str, Score]:
    """What is kept; a line that a kill left half-written is measured again."""
    known: dict[str, Score] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                found = Score(tuple(record["psnr"]), tuple(record["ssim"]))
                before = known.get(record["way"])
                if before is None or len(found.psnr) > len(before.psnr):
                    known[record["way"]] = found
            except (ValueError, KeyError):
                continue
    return known
