"""How images are seen by the networks that measure them: resized and compressed as a protocol says."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from PIL import Image

RESIZE_FILTER: Final = "bicubic (Pillow, antialiased)"


@dataclass(frozen=True, slots=True)
class Viewing:
    """`size`: pixels per side after resizing, None for as they are. `jpeg`: a quality to save with, before and after.

    BK-SDM's published images are saved as JPEG at 512 pixels, resized, and saved as JPEG again; that costs a few points
    of FID, on the reference too, and belongs to its protocol.
    """

    size: int | None = None
    jpeg: int | None = None

    def of(self, image: Image.Image) -> Image.Image:
        """The image as a measuring network gets it."""
        image = self._compressed(image.convert("RGB"))
        if self.size is None or image.size == (self.size, self.size):
            return image
        return self._compressed(image.resize((self.size, self.size), Image.Resampling.BICUBIC))

    def of_file(self, image: Image.Image) -> Image.Image:
        """An image of a reference set, which is a file already and was compressed as it was."""
        image = image.convert("RGB")
        if self.size is None or image.size == (self.size, self.size):
            return image
        return self._compressed(image.resize((self.size, self.size), Image.Resampling.BICUBIC))

    def all_of(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Several at once."""
        return [self.of(image) for image in images]

    @property
    def filter(self) -> str | None:
        """What the protocol card says of it."""
        if self.size is None:
            return None
        return RESIZE_FILTER + (f", JPEG quality {self.jpeg} before and after" if self.jpeg else "")

    def _compressed(self, image: Image.Image) -> Image.Image:
        if self.jpeg is None:
            return image
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=self.jpeg)
        return Image.open(io.BytesIO(stream.getvalue())).convert("RGB")
