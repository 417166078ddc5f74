"""The set of images that distances are to: scenes of the bundled world, a folder of images, or published moments."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from asdm_compress.core.errors import AsdmError
from asdm_compress.core.images import BROKEN_IMAGE
from asdm_compress.evaluation.distances import Array, Moments
from asdm_compress.evaluation.inception import FEATURES
from asdm_compress.evaluation.quality import scene_features
from asdm_compress.evaluation.record import Reference
from asdm_compress.evaluation.viewing import Viewing
from asdm_compress.evaluation.weights import sha256_of
from asdm_compress.scenes.draw import draw_scenes
from asdm_compress.scenes.world import sample_scene

SCENES: Final = 600
_SCENES_SEED: Final = 4_242
_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """The images of a folder and those below it, by name."""

    path: Path
    files: tuple[Path, ...]

    @staticmethod
    def of(path: Path) -> ImageFolder:
        """Raises AsdmError for a folder with fewer than two images."""
        files = tuple(sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES))
        if len(files) < 2:
            raise AsdmError(f"the reference {path} holds {len(files)} images", "Give a folder of PNG or JPEG files.")
        return ImageFolder(path, files)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, rows: range, viewing: Viewing) -> list[Image.Image]:
        """Some of its images, as measuring networks see them; raises AsdmError for one that is broken."""
        found = []
        for row in rows:
            try:
                with Image.open(self.files[row]) as image:
                    found.append(viewing.of_file(image))
            except BROKEN_IMAGE as error:
                raise AsdmError(f"the image {self.files[row]} cannot be read", "Remove or replace it.") from error
        return found

    def record(self) -> Reference:
        """For `eval.json`; the hash is of all names and bytes."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(os.fsencode(file.relative_to(self.path).as_posix()))
            digest.update(bytes.fromhex(sha256_of(file)))
        return Reference(
            name=_name(self.path), kind="image folder", count=len(self), sha256=digest.hexdigest()
        )  # fmt: skip


def _name(path: Path) -> str:
    """What a folder is called in reports, where `teacher` means the teacher's paired images."""
    whole = path.resolve()
    return f"{whole.parent.name}/{whole.name}" if whole.name == "teacher" else whole.name


def read_moments(path: Path) -> tuple[Moments, Reference]:
    """Mean and covariance of Inception features from an .npz with mu and sigma, as pytorch-fid writes it."""
    try:
        with np.load(path, allow_pickle=False) as content:
            mean, covariance = content["mu"].astype(float), content["sigma"].astype(float)
    except (OSError, KeyError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise AsdmError(f"{path} holds no statistics: {error}", "Give an .npz with mu and sigma.") from error
    if mean.shape != (FEATURES,) or covariance.shape != (FEATURES, FEATURES):
        raise AsdmError(f"{path} holds statistics of {mean.shape}, not of {FEATURES} features", "Give Inception's.")
    record = Reference(name=path.name, kind="statistics", count=0, sha256=sha256_of(path))
    return Moments.from_covariance(mean, covariance), record


def rendered_scenes(object_counts: Sequence[int], count: int = SCENES) -> tuple[Array, Reference]:
    """The reader's features (N, 128) of drawn scenes, as many of one, two and three objects as the prompts name.

    Other scenes than those of the prompts, likewise with a combination never seen in training.
    """
    rng = np.random.default_rng(_SCENES_SEED)
    wanted = [object_counts[i % len(object_counts)] for i in range(count)]
    drawn = draw_scenes([sample_scene(rng, objects, held_out=True) for objects in wanted])
    digest = hashlib.sha256(drawn.numpy().tobytes()).hexdigest()
    record = Reference(name="rendered scenes", kind="rendered scenes", count=count, sha256=digest)
    return scene_features(drawn), record
