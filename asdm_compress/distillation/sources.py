"""Where training data come from: the bundled world's renderer, or captions alone. Folders are in `image_folder`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from torch import Tensor

from asdm_compress.core.errors import AsdmError
from asdm_compress.scenes.captions import caption_of
from asdm_compress.scenes.draw import draw_scenes
from asdm_compress.scenes.world import Scene, sample_scene

SCENES_SEED: Final = 20_240_601
DEFAULT_SCENES: Final = 20_000
_BLOCK: Final = 256  # scenes drawn from one generator, so that any of them is reached without drawing all before it


@dataclass(frozen=True, slots=True)
class Item:
    """One example: its caption, and its image (3, H, W) in [-1, 1] unless there are captions alone."""

    name: str
    caption: str
    image: Tensor | None = None


@dataclass(frozen=True, slots=True)
class BadItem:
    """One that cannot be used, and why."""

    name: str
    reason: str


class Source(Protocol):
    """So many items, read in ranges; reading a range twice gives the same."""

    def __len__(self) -> int: ...

    def identity(self) -> Mapping[str, Any]:
        """What decides every item, JSON-like, for the address of what is made from them."""
        ...

    def read(self, start: int, stop: int, image_size: int) -> Iterator[Item | BadItem]:
        """The items from `start` to before `stop`, images of `image_size` pixels a side."""
        ...


@dataclass(frozen=True, slots=True)
class SceneSource:
    """Training scenes of the bundled world, none with a combination that is held out."""

    count: int = DEFAULT_SCENES
    seed: int = SCENES_SEED

    def __len__(self) -> int:
        return self.count

    def identity(self) -> Mapping[str, Any]:
        """The renderer's world and seed; the count decides where the last range ends."""
        return {"kind": "scenes", "seed": self.seed, "block": _BLOCK, "count": self.count}

    def read(self, start: int, stop: int, image_size: int) -> Iterator[Item | BadItem]:
        """Scenes drawn anew each time."""
        for number in range(start, min(stop, self.count)):
            scene, caption = _scene_block(self.seed, number // _BLOCK)[number % _BLOCK]
            image = draw_scenes([scene], image_size)[0] * 2 - 1
            yield Item(f"scene {number}", caption, image)


@lru_cache(maxsize=4)
def _scene_block(seed: int, block: int) -> tuple[tuple[Scene, str], ...]:
    rng = np.random.default_rng([seed, block])
    scenes = [sample_scene(rng, held_out=False) for _ in range(_BLOCK)]
    return tuple((scene, caption_of(scene, rng).text) for scene in scenes)


@dataclass(frozen=True, slots=True)
class CaptionSource:
    """Captions alone: the teacher makes the latents."""

    captions: tuple[str, ...]

    @staticmethod
    def from_file(path: Path, size: int | None = None) -> CaptionSource:
        """The non-empty lines of a UTF-8 file; raises AsdmError for one that cannot be read or has none."""
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except OSError as error:
            raise AsdmError(f"the captions {path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise AsdmError(f"the captions {path} are no UTF-8 text") from error
        captions = tuple(line.strip() for line in lines if line.strip())[:size]
        if not captions:
            raise AsdmError(f"{path} has no captions", "Write one per line.")
        return CaptionSource(captions)

    def __len__(self) -> int:
        return len(self.captions)

    def identity(self) -> Mapping[str, Any]:
        """The captions themselves."""
        return {"kind": "captions", "captions": list(self.captions)}

    def read(self, start: int, stop: int, image_size: int) -> Iterator[Item | BadItem]:
        """Captions without images."""
        for number in range(start, min(stop, len(self.captions))):
            yield Item(f"line {number + 1}", self.captions[number])
